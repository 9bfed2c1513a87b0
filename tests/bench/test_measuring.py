"""The counters behind `peftc bench`, on computations small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from peftc.bench.allocations import peak_bytes
from peftc.bench.batches import batch_for
from peftc.bench.flops import count_flops
from peftc.bench.saved_bytes import saved_bytes
from peftc.bench.stopwatch import fastest, threads
from zoo import ZOO, inputs

CPU = torch.device("cpu")
FLOAT = 4  # bytes


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


class KeepsOnItsContext(torch.autograd.Function):
    """y = x of a custom function that keeps a tensor where hooks do not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = {"a list": [torch.zeros(11)]}
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


# --- saved bytes -------------------------------------------------------------------------------------------------


def frozen(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out).requires_grad_(False)


def test_a_frozen_linear_saves_only_its_weight() -> None:
    linear, x = frozen(5, 7), leaf(3, 5)
    assert saved_bytes(lambda: linear(x).sum(), linear.parameters()) == 0
    assert saved_bytes(lambda: linear(x).sum(), []) == 7 * 5 * FLOAT


def test_a_linear_that_learns_saves_its_input() -> None:
    linear, x = nn.Linear(5, 7), torch.ones(3, 5)
    assert saved_bytes(lambda: linear(x).sum(), linear.parameters()) == 3 * 5 * FLOAT
    assert saved_bytes(lambda: linear(x).sum(), [*linear.parameters(), x]) == 0


def test_a_storage_counts_once_and_whole() -> None:
    one, two, x = nn.Linear(5, 7), nn.Linear(5, 2), leaf(4, 10)
    own = [*one.parameters(), *two.parameters()]

    def forward() -> Tensor:
        wide = x * 2
        parts = (one(wide[:, :5]), two(wide[:, 5:]), one(wide[:2, :5]))
        return torch.cat([part.flatten() for part in parts]).sum()

    assert saved_bytes(forward, own) == 4 * 10 * FLOAT


def test_two_results_are_two_storages() -> None:
    x = leaf(6)
    assert saved_bytes(lambda: (x.exp() + x.tanh()).sum(), [x]) == 2 * 6 * FLOAT


def test_what_died_with_its_graph_does_not_count() -> None:
    x = leaf(6)

    def forward() -> Tensor:
        for _ in range(3):
            x.exp().tanh()
        return x.exp().sum()

    assert saved_bytes(forward, []) == 6 * FLOAT


def test_a_context_of_a_custom_function_counts() -> None:
    x = leaf(6)
    assert saved_bytes(lambda: KeepsOnItsContext.apply(x).sum(), []) == 11 * FLOAT  # type: ignore[no-untyped-call]


def test_nothing_is_saved_for_what_has_no_gradient() -> None:
    assert saved_bytes(lambda: torch.ones(3).exp().sum(), []) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_what_stays_allocated(name: str) -> None:
    """Between the passes a compiled model holds what autograd saved, the loss, and nothing else of a kilobyte."""
    compiled = peftc.compile(ZOO[name](), "apply lora(r=4) to attn.*").eval()
    _, arguments = batch_for(compiled.base, None, 2, 16)
    held: list[Tensor] = []

    def forward() -> None:
        held.append(compiled(**arguments).loss)

    forward()
    held.clear()
    saved = saved_bytes(lambda: compiled(**arguments).loss, [*compiled.parameters(), *compiled.buffers()])
    from peftc.bench.allocations import _changes

    assert sum(_changes(forward)) == pytest.approx(saved, abs=1000)


# --- peak --------------------------------------------------------------------------------------------------------


def test_the_peak_is_the_highest_sum_at_one_time() -> None:
    def step() -> None:
        x = torch.empty(1000)
        y = x + x
        del x  # 1000 left
        z = torch.cat([y, y])  # 3000
        del y  # 2000
        torch.empty(500)  # 2500
        del z

    assert peak_bytes(step, CPU) == 3000 * FLOAT


def test_the_peak_is_above_what_was_there() -> None:
    there = torch.empty(10_000)
    assert peak_bytes(lambda: there.add_(1), CPU) < 100  # a scalar operand
    assert peak_bytes(lambda: there + there, CPU) == 10_000 * FLOAT


def test_the_peak_sees_into_operations() -> None:
    @torch.library.custom_op("peftc_tests::wasteful", mutates_args=())
    def wasteful(x: Tensor) -> Tensor:
        return torch.cat([x, x, x])[: len(x)].clone()

    x = torch.empty(1000)
    assert peak_bytes(lambda: wasteful(x), CPU) == 4000 * FLOAT


def test_gradients_count() -> None:
    x = leaf(1000)
    # the product's other factor is no tensor; an expanded gradient of 1, its product, and the gradient that stays
    assert 1000 * FLOAT <= peak_bytes(lambda: (x * 2).sum().backward(), CPU) <= 3000 * FLOAT
    assert x.grad is not None


# --- operations --------------------------------------------------------------------------------------------------


def test_products_are_counted_forward_and_backward() -> None:
    x, linear = leaf(3, 5), nn.Linear(5, 7)
    product = 2 * 3 * 5 * 7
    assert count_flops(lambda: linear(x)) == product
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * product
    linear.requires_grad_(False)
    assert count_flops(lambda: linear(x).sum().backward()) == 2 * product


def test_attention_is_counted_on_the_cpu() -> None:
    q, k, v = (leaf(2, 4, rows, 8) for rows in (6, 16, 16))
    product = 2 * (2 * 4) * 6 * 16 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_the_first_step_may_be_counted() -> None:
    """While its blocks are traced."""
    model = ZOO["llama"]().eval()
    compiled = peftc.compile(model, "apply lora(r=4) to attn.q")
    first, second = (count_flops(lambda: compiled(**inputs(model)).loss.backward()) for _ in range(2))
    assert first == second > 0


def test_grouped_products_are_counted() -> None:
    import transformers.integrations.moe  # noqa: F401  # registers the operation

    grouped: Callable[..., Tensor] = torch.ops.transformers.grouped_mm_fallback
    x, weight, ends = leaf(9, 5), leaf(4, 5, 7), torch.tensor([2, 2, 6, 9])
    product = 2 * 9 * 5 * 7
    assert count_flops(lambda: grouped(x, weight, ends)) == product
    assert count_flops(lambda: grouped(x, weight, ends).sum().backward()) == 3 * product


# --- time --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_take_turns() -> None:
    ran: list[str] = []
    steps = {name: lambda name=name: ran.append(name) for name in ("a", "b")}
    found = fastest(steps, 3, CPU)
    assert ran == ["a", "b"] * 3
    assert found.keys() == steps.keys()
    assert all(0 <= seconds < float("inf") for seconds in found.values())


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "roberta", "t5", "bart", "vit"])
def test_a_batch_is_what_the_model_takes(name: str) -> None:
    model = ZOO[name]()
    args, kwargs = batch_for(model, None, 3, 11)
    assert args == ()
    tokens = [tensor for tensor in kwargs.values() if isinstance(tensor, Tensor) and not tensor.is_floating_point()]
    assert {tuple(tensor.shape) for tensor in tokens} <= {(3, 11), (3,)}
    assert torch.isfinite(model(**kwargs).loss)
    if "input_ids" in kwargs:
        ids = kwargs["input_ids"]
        assert ids.unique().numel() > 11
        assert not (ids == model.config.pad_token_id).any()
        assert kwargs["attention_mask"].all()
    again = batch_for(model, None, 3, 11)[1]
    assert all(torch.equal(again[key], value) for key, value in kwargs.items() if isinstance(value, Tensor))


def test_an_example_is_measured_as_it_is() -> None:
    example = (torch.ones(4, 3),)
    args, kwargs = batch_for(nn.Linear(3, 2), example, 7, 9)
    assert kwargs == {}
    assert torch.equal(args[0], example[0])
