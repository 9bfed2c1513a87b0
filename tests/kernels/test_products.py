"""Products by whichever way is soonest: all ways have the same numbers, and trying them leaves no trace."""

import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftc.kernels.common import products
from peftc.kernels.common.products import add_product_, product, way_of

NEAR = 1e-5  # of the sum of all magnitudes: fp32, sums in another order
WAYS = [products._plain, products._turned, products._onednn, products._turned_onednn]
OF_ONE_ROW = [products._vector, products._twice]


def near(found: Tensor, expected: Tensor, left: Tensor, right: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert ((found - expected).abs() <= NEAR * (1 + left.abs() @ right.abs())).all()


def drawn(rows: int, inner: int, columns: int, right_turned: bool) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows + inner + columns)
    right = torch.randn(columns, inner, generator=random).t()
    return torch.randn(rows, inner, generator=random), right if right_turned else right.contiguous()


@example(1, 169, 1, False)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_all_ways_have_the_same_numbers(rows: int, inner: int, columns: int, right_turned: bool) -> None:
    left, right = drawn(rows, inner, columns, right_turned)
    expected = (left.double() @ right.double()).float()
    for way in (*WAYS, *(OF_ONE_ROW if rows == 1 else [])):
        if way is not products._turned_onednn or right_turned:
            near(way(left, right), expected, left, right)


@pytest.fixture(params=WAYS + OF_ONE_ROW, ids=lambda way: way.__name__.strip("_"))
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> products.Way:
    """A way that is taken for the soonest."""
    way: products.Way = request.param
    monkeypatch.setattr(products, "_soonest", lambda *_: way)
    return way


@pytest.mark.parametrize("biased", [True, False])
def test_whichever_is_chosen(chosen: products.Way, biased: bool) -> None:
    left, right = drawn(1 if chosen in OF_ONE_ROW else 7, 260, 310, right_turned=True)
    bias = torch.randn(620)[::2] if biased else None
    assert way_of(left, right) is chosen
    expected = left @ right if bias is None else left @ right + bias
    near(product(left, right, bias), expected, left, right)
    out = torch.empty(left.shape[0], 310)
    assert product(left, right, bias, out=out) is out
    near(out, expected, left, right)
    near(add_product_(torch.ones_like(out), left, right), 1 + left @ right, left, right)


def test_the_soonest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a way moves itself."""
    passed = [0.0]

    def slow(left: Tensor, right: Tensor) -> Tensor:
        passed[0] += 2.0
        return left @ right

    def sooner(left: Tensor, right: Tensor) -> Tensor:
        passed[0] += 1.0
        return left @ right

    def hardly(left: Tensor, right: Tensor) -> Tensor:
        passed[0] += 0.99
        return left @ right

    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: passed[0])
    for ways, expected in (((slow, sooner), sooner), ((sooner, slow), sooner), ((sooner, hardly), sooner)):
        products._tried.cache_clear()
        assert products._tried(ways, 2, 16, 16, 1, True, False, 1) is expected
    products._tried.cache_clear()


def test_a_way_that_is_sooner_once_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else is at work takes half of the clock for the first rounds of torch's own way, and then for both's."""
    passed, calls = [0.0], [0]

    def plain(left: Tensor, right: Tensor) -> Tensor:
        calls[0] += 1
        passed[0] += 2.0 if calls[0] <= products.ROUNDS else 1.0 + calls[0] % 2
        return left @ right

    def no_sooner(left: Tensor, right: Tensor) -> Tensor:
        passed[0] += 1.0 + calls[0] // 2 % 2
        return left @ right

    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: passed[0])
    products._tried.cache_clear()
    assert products._tried((plain, no_sooner), 2, 16, 16, 1, True, False, 1) is plain
    products._tried.cache_clear()


@pytest.mark.parametrize("found", [products._plain, products._onednn])
def test_what_adding_costs_beside_a_way_is_tried_with_it(monkeypatch: pytest.MonkeyPatch, found: products.Way) -> None:
    asked = []

    def soonest(*key: object) -> products.Way:
        asked.append(key[5])
        return found

    monkeypatch.setattr(products, "_soonest", soonest)
    left, right = drawn(7, 260, 310, right_turned=True)
    near(product(left, right), left @ right, left, right)
    near(add_product_(torch.ones(7, 310), left, right), 1 + left @ right, left, right)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(0, 300), torch.zeros(300, 300)),
        (torch.zeros(4, 20), torch.zeros(20, 20)),
        (torch.zeros(4, 300, dtype=torch.float64), torch.zeros(300, 300, dtype=torch.float64)),
        (torch.zeros(4, 300, dtype=torch.bfloat16), torch.zeros(300, 300, dtype=torch.bfloat16)),
        (torch.zeros(300, 4).t(), torch.zeros(300, 300)),
        (torch.zeros(4, 300), torch.zeros(300, 600)[:, ::2]),
    ],
    ids=["nothing", "small", "fp64", "bf16", "left turned", "with gaps"],
)  # fmt: skip
def test_the_rest_is_left_to_torch(left: Tensor, right: Tensor) -> None:
    assert way_of(left, right) is products._plain
    assert torch.equal(product(left, right), left @ right)


def test_the_same_bits_in_each_run_where_they_are_asked_for() -> None:
    left, right = drawn(4, 300, 300, right_turned=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert way_of(left, right) is products._plain
        assert way_of(left[:1], right) is products._vector
    finally:
        torch.use_deterministic_algorithms(False)


def test_trying_leaves_no_trace() -> None:
    """Neither in what counts operations, nor in the numbers at random; under autocast nothing is tried."""
    products._soonest.cache_clear()
    products._tried.cache_clear()
    left, right = drawn(5, 257, 303, right_turned=True)
    before = torch.random.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert way_of(left, right) is products._plain
        way_of(left, right)
    assert counter.get_total_flops() == 0
    assert torch.equal(before, torch.random.get_rng_state())
    assert products._tried.cache_info().currsize == 1


def test_torch_compile_sees_one_product() -> None:
    left, right = drawn(5, 257, 303, right_turned=True)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(left, right), left @ right)
