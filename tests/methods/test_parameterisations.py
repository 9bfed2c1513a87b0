"""Ways of making a matrix of fewer numbers: each against its definition, and the adapters that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from peftc.protocol.parameterisation import Parameterisation
from peftc.protocol.params import Param, registered
from peftc.protocol.site import Sublayer
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

ALL = registered(Parameterisation)
every_parameterisation = pytest.mark.parametrize("name", ALL)
# What two orders of a few dozen additions of numbers of size 1 may differ by in double precision.
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}


# ---- Any shape, any parameters ---------------------------------------------------------------------------------------


def parameterisations(name: str) -> st.SearchStrategy[Parameterisation]:
    """With any small values of their parameters."""

    def values(parameter: Param) -> st.SearchStrategy[Any]:
        assert not parameter.nested
        if parameter.kind is bool:
            return st.booleans()
        assert parameter.kind is int, f"the tests draw no {parameter.kind.__name__} yet"
        numbers = st.integers(int(parameter.min or 0), 6)
        return st.one_of(numbers, st.none()) if parameter.optional else numbers

    cls = ALL[name]
    drawn = st.fixed_dictionaries({key: values(parameter) for key, parameter in cls.parameters.items()})
    return drawn.map(lambda given: cls(**given)).filter(lambda made: made.conflict() is None)  # type: ignore[return-value]


# Mostly shapes with divisors; 7 and 11 have none.
sides = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 11, 12, 15, 24])


def started(made: Parameterisation, n_out: int, n_in: int, *, zero: bool) -> dict[str, Tensor]:
    """The tensors of one matrix as a method would start them."""
    specs = made.state(n_out, n_in, zero=zero)
    common = made.common([(n_out, n_in)])
    assert not specs.keys() & common.keys()
    return {name: spec.init(torch.empty(spec.shape, dtype=torch.float64)) for name, spec in (specs | common).items()}


def randomised(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=random, dtype=tensor.dtype, requires_grad=True)
        for name, tensor in state.items()
    }


@every_parameterisation
@given(data=st.data(), n_out=sides, n_in=sides, bias=st.booleans(), leading=st.sampled_from([(), (1,), (5,), (2, 3)]))
@settings(max_examples=60)
def test_the_fast_path_is_the_definition(
    name: str, data: st.DataObject, n_out: int, n_in: int, bias: bool, leading: tuple[int, ...]
) -> None:
    """x Wᵀ + b with W formed, its value and its gradients."""
    made = data.draw(parameterisations(name))
    assume(n_out != n_in)
    assume(made.refuses(n_out, n_in) is None)
    state = randomised(started(made, n_out, n_in, zero=False))
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, n_in, generator=random, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(n_out, generator=random, dtype=torch.float64, requires_grad=True) if bias else None
    dense = made.dense(state)
    assert dense.shape == (n_out, n_in)
    fast, slow = made.apply(x, shift, state), F.linear(x, dense, shift)
    torch.testing.assert_close(fast, slow, **CLOSE)
    learning = [*state.values(), x] + ([] if shift is None else [shift])
    towards = torch.randn(slow.shape, generator=random, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(fast, learning, towards), torch.autograd.grad(slow, learning, towards), **CLOSE
    )


@every_parameterisation
@given(data=st.data(), n_out=sides, n_in=sides)
@settings(max_examples=40)
def test_it_starts_at_zero_where_it_shall(name: str, data: st.DataObject, n_out: int, n_in: int) -> None:
    """And a gradient moves it away: not everything it is made of is zero. Else it starts somewhere else."""
    made = data.draw(parameterisations(name))
    assume(made.refuses(n_out, n_in) is None)
    state = {key: tensor.requires_grad_() for key, tensor in started(made, n_out, n_in, zero=True).items()}
    assert not made.dense(state).any()
    made.dense(state).sum().backward()
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in state.values())
    assert made.dense(started(made, n_out, n_in, zero=False)).any()


@every_parameterisation
def test_it_starts_about_as_large_as_a_linear_layer(name: str) -> None:
    """Root mean square within a factor of four of nn.Linear's, 1/sqrt(3 n_in), on average over 20 draws."""
    made = ALL[name]()
    assert isinstance(made, Parameterisation)
    torch.manual_seed(0)
    squares = [made.dense(started(made, 24, 96, zero=False)).square().mean() for _ in range(20)]
    expected = (3 * 96) ** -0.5
    assert expected / 4 < torch.stack(squares).mean().sqrt() < 4 * expected


@pytest.mark.parametrize(
    ("made", "shape", "words"),
    [
        (ALL["phm"](n=4), (6, 8), ("n=4", "6x8")),
        (ALL["phm"](n=4), (8, 6), ("n=4", "8x6")),
        (ALL["phm"](n=4, rank=3), (8, 12), ("rank of 3", "2x3")),
        (ALL["lowrank"](rank=5), (4, 9), ("rank of 5", "4x9")),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_refused_with_its_numbers(
    made: Parameterisation, shape: tuple[int, int], words: tuple[str, ...]
) -> None:
    reason = made.refuses(*shape)
    assert reason is not None
    assert all(word in reason for word in words), reason


@every_parameterisation
@given(data=st.data(), n_out=sides, n_in=sides)
@settings(max_examples=60)
def test_what_is_not_refused_can_be_made(name: str, data: st.DataObject, n_out: int, n_in: int) -> None:
    made = data.draw(parameterisations(name))
    if made.refuses(n_out, n_in) is None:
        assert made.dense(started(made, n_out, n_in, zero=False)).shape == (n_out, n_in)


# ---- Each against its paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_phm_is_a_sum_of_kronecker_products(rank: int | None, shared: bool) -> None:
    """Karimi Mahabadi et al. 2021, equations 4 and 5: W = Σ A_i ⊗ B_i, B_i = s_i t_i where it is of low rank."""
    made = ALL["phm"](n=3, rank=rank, shared=shared)
    assert isinstance(made, Parameterisation)
    state = randomised(started(made, 6, 12, zero=False))
    assert ("A" in made.state(6, 12, zero=False)) is not shared
    expected = torch.zeros(6, 12, dtype=torch.float64)
    for i in range(3):
        block = state["B"][i] if rank is None else state["s"][i] @ state["t"][i]
        assert block.shape == (2, 4)
        expected = expected + torch.kron(state["A"][i], block)
    torch.testing.assert_close(made.dense(state), expected, **CLOSE)


@pytest.mark.parametrize(("n_out", "n_in", "a"), [(6, 10, 2), (10, 6, 5), (12, 8, 4), (7, 9, 3)])
def test_kron_is_one_kronecker_product(n_out: int, n_in: int, a: int) -> None:
    """Edalati et al. 2022, equation 5, entry by entry."""
    made = ALL["kron"](a=a)
    assert isinstance(made, Parameterisation)
    state = randomised(started(made, n_out, n_in, zero=False))
    (rows, columns), (high, wide) = state["A"].shape, state["B"].shape
    assert n_out % rows == 0
    assert n_in % columns == 0
    assert rows <= a
    assert columns <= a
    dense = made.dense(state)
    torch.testing.assert_close(dense, torch.kron(state["A"], state["B"]), **CLOSE)
    for i in range(n_out):
        for j in range(n_in):
            assert dense[i, j] == state["A"][i // high, j // wide] * state["B"][i % high, j % wide]


def test_kron_takes_the_largest_divisor_that_is_small_enough() -> None:
    shapes = [started(ALL["kron"](a=a), 24, 36, zero=True)["A"].shape for a in (1, 5, 8, 30, 99)]  # type: ignore[arg-type]
    assert shapes == [(1, 1), (4, 4), (8, 6), (24, 18), (24, 36)]


def test_lowrank_has_that_rank() -> None:
    made = ALL["lowrank"](rank=3)
    assert isinstance(made, Parameterisation)
    assert torch.linalg.matrix_rank(made.dense(randomised(started(made, 8, 12, zero=False)))) == 3


# ---- Adapters made of them -------------------------------------------------------------------------------------------

SMALL = {"phm": ["phm(n=2)", "phm(n=2, rank=1)", "phm(n=2, rank=1, shared=true)"], "kron": ["kron(a=4)"],
         "lowrank": ["lowrank(rank=2)"], "dense": ["dense"]}  # fmt: skip
CALLS = [call for name in ALL for call in SMALL[name]]
ADAPTERS = [
    f"adapter(size=6, weight={call}{more})"
    for call in CALLS
    for more in ("", ", at=parallel, scale=2.5, residual=learned, bias=false, activation=gelu")
]


class Sublayered(nn.Module):
    """One block with a feed-forward whose inside is wider than its sides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in "ab")
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](F.relu(layer["up"](self.norm(x))))  # type: ignore[index]
        return x


def method_of(call: str) -> Any:
    (application,) = resolve(as_spec(f"apply {call} to mlp")).applications
    return application.method


@pytest.mark.parametrize("call", ADAPTERS)
@pytest.mark.parametrize("entry_width", [12, 18])
def test_an_adapter_is_its_dense_formula(call: str, entry_width: int) -> None:
    """h + t h + s U f(D h + b) + s c, or of x in parallel, with D and U formed; output and gradients."""
    adapter = method_of(call)
    site = Sublayer("mlp", "", frozenset({"mlp"}), width=12, entry_width=entry_width)
    assert adapter.refuses(site) is None
    specs = adapter.state(site) | adapter.shared([site, site])
    state = randomised({name: torch.empty(spec.shape, dtype=torch.float64) for name, spec in specs.items()})
    random = torch.Generator().manual_seed(1)
    x, h = (torch.randn(2, 5, width, generator=random, dtype=torch.float64) for width in (entry_width, 12))

    def matrix(prefix: str) -> Tensor:
        own = {name.removeprefix(prefix).lstrip("."): t for name, t in state.items()
               if name == prefix or name.startswith(prefix + ".")}  # fmt: skip
        common = {name.removeprefix("weight."): t for name, t in state.items() if name.startswith("weight.")}
        return torch.as_tensor(adapter.weight.dense(own | common))

    entering = x if adapter.at == "parallel" else h
    inner = entering @ matrix("down").t() + state.get("down_bias", torch.zeros(()))
    inner = F.gelu(inner) if adapter.activation == "gelu" else F.relu(inner)
    branch = inner @ matrix("up").t() + state.get("up_bias", torch.zeros(()))
    expected = h + adapter.scale * branch + (state["t"] * h if "t" in state else 0)
    actual = adapter.rewrite(site, x, h, **state)
    torch.testing.assert_close(actual, expected, **CLOSE)
    towards = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    learning = [*state.values()]
    torch.testing.assert_close(
        torch.autograd.grad(actual, learning, towards), torch.autograd.grad(expected, learning, towards), **CLOSE
    )


@pytest.mark.parametrize("call", ADAPTERS)
def test_an_adapter_starts_as_the_identity(call: str) -> None:
    adapter = method_of(call)
    site = Sublayer("mlp", "", frozenset({"mlp"}), width=12, entry_width=12)
    state = {name: spec.init(torch.empty(spec.shape)) for name, spec in
             (adapter.state(site) | adapter.shared([site])).items()}  # fmt: skip
    x, h = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    assert torch.equal(adapter.rewrite(site, x, h, **state), h)


def test_a_residual_kronecker_adapter_written_out() -> None:
    """KronA^B with its learned residual, `adapter(weight=kron(a=32), residual=learned)`, in a compiled model.

    h + t h + (A₂ ⊗ B₂) relu((A₁ ⊗ B₁) h + b₁) + b₂ behind the feed-forward, by hooks on the base.
    """
    base = ZOO["bert"]().eval()
    batch = inputs(base)
    compiled = peftc.compile(base, "apply adapter(size=16, weight=kron(a=32), residual=learned) to mlp").eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    handles, learning = [], []
    for binding in compiled.plan.bindings:
        own = {name: get_attribute(compiled, full).detach().clone().requires_grad_()
               for name, full in binding.names.items()}  # fmt: skip
        assert (own["down.A"].shape, own["down.B"].shape) == (
            (16, 32),
            (1, 1),
        )  # of 16x32: both sides divide by 32 or 16
        learning.append(own)

        def hook(_module: Any, _args: Any, h: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            down, up = torch.kron(own["down.A"], own["down.B"]), torch.kron(own["up.A"], own["up.B"])
            return h + own["t"] * h + F.relu(h @ down.t() + own["down_bias"]) @ up.t() + own["up_bias"]

        block = binding.site.name.removesuffix(".mlp")
        handles.append(base.get_submodule(f"{block}.output.dense").register_forward_hook(hook))
    expected = base(**batch)
    expected.loss.backward()
    for handle in handles:
        handle.remove()
    actual = compiled(**batch)
    actual.loss.backward()
    # Single precision, in another order of additions.
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for binding, own in zip(compiled.plan.bindings, learning, strict=True):
        for name, full in binding.names.items():
            torch.testing.assert_close(get_attribute(compiled, full).grad, own[name].grad, rtol=1e-5, atol=1e-5)


# ---- Shared by a statement -------------------------------------------------------------------------------------------

COMPACTER = "adapter(size=4, weight=phm(n=2, rank=1, shared=true)) to mlp"


def test_rules_are_shared_by_a_statement_and_counted_once() -> None:
    """One A for both layers and both matrices, whose gradient is the sum over all of them; another for another line."""
    model = Sublayered()
    example = {"x": torch.randn(2, 3, 12)}
    plan = peftc.plan(model, f"apply {COMPACTER}", example=example)
    shared = {full for binding in plan.bindings for full in binding.names.values() if full.endswith("weight.A")}
    assert len(plan.bindings) == 2
    assert len(shared) == 1
    each = 2 * (2 * 2 + 2 * 6) + 4 + 12  # s and t of D and of U; both biases
    assert plan.trainable == 2 * each + 2 * 2 * 2 == sum(row.parameters for row in plan.rows)
    two = peftc.plan(
        model,
        f"apply {COMPACTER} in layers[0]\napply lora(r=1) to linear\napply {COMPACTER} in layers[1]",
        example=example,
    )
    homes = {full.rpartition(".")[0] for binding in two.bindings for full in binding.shared_names.values()}
    assert len(homes) == 2
    assert two.trainable == plan.trainable + 8 + sum(2 * (12 + 20) for _ in range(2))


def test_shared_rules_learn_from_every_layer() -> None:
    model = Sublayered().double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    compiled = peftc.compile(model, f"apply {COMPACTER}", example={"x": x})
    state = randomised({name: tensor.detach() for name, tensor in compiled.trainable_parameters().items()})
    with torch.no_grad():
        for name, parameter in compiled.trainable_parameters().items():
            parameter.copy_(state[name])
    adapter = compiled.plan.bindings[0].method
    hidden = x
    for layer, binding in zip(model.layers, compiled.plan.bindings, strict=True):
        h = layer["down"](F.relu(layer["up"](model.norm(hidden))))  # type: ignore[index]
        hidden = hidden + adapter.rewrite(
            binding.site, hidden, h, **{n: state[full] for n, full in binding.names.items()}
        )
    hidden.square().sum().backward()
    compiled(x=x).square().sum().backward()
    for name, parameter in compiled.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-10, atol=1e-10)


def test_counts_without_a_model() -> None:
    """Numbers an adapter of the paper's sizes keeps at a layer of T5-base: 2 376 of Compacter, against 37 656 dense."""
    site = Sublayer("mlp", "", frozenset({"mlp"}), width=768, entry_width=768)

    def count(call: str) -> int:
        return sum(prod(spec.shape) for spec in method_of(call).state(site).values())

    assert count("adapter(size=24, weight=phm(n=4, rank=1, shared=true))") == 2376
    assert count("adapter(size=24, weight=phm(n=4))") == 2 * 4**3 + 2 * 24 * 768 // 4 + 24 + 768
    assert count("adapter(size=24)") == 2 * 24 * 768 + 24 + 768
    assert count("adapter(size=24, weight=lowrank(rank=1))") == 2 * (24 + 768) + 24 + 768


def test_every_parameterisation_is_in_the_tests_of_adapters() -> None:
    assert SMALL.keys() == ALL.keys()
    assert methods()["adapter"].parameters["weight"].nested is Parameterisation
