"""Fusions of branches, adapters and experts: they compute what they replace, or say why they do not fire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the grouped product
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fusioncases import Case, few, fires, lora, misses, number, operations, rewritten, same, sizes


@given(
    outs=st.lists(sizes, min_size=1, max_size=3), n_in=sizes, ranks=st.tuples(*[st.integers(1, 4)] * 3),
    tokens=st.integers(2, 5), bias=st.booleans(), transposed=st.booleans(), train_bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=15)
def test_lora_linear(
    outs: list[int], n_in: int, ranks: tuple[int, ...], tokens: int, bias: bool, transposed: bool, train_bias: bool
) -> None:
    """Any number of layers on one input, in one operation."""
    layers = range(len(outs))
    shapes: dict[str, tuple[int, ...]] = {}
    for i in layers:
        shapes |= {f"w{i}": (n_in, outs[i]) if transposed else (outs[i], n_in)}
        shapes |= {f"a{i}": (ranks[i], n_in), f"b{i}": (outs[i], ranks[i])}
        shapes |= {f"c{i}": (outs[i],)} if bias or transposed else {}

    def function(case: Any, x: Tensor) -> Tensor:
        results = []
        for i in layers:
            weight, added = getattr(case, f"w{i}"), getattr(case, f"c{i}", None)
            y = torch.addmm(added, x, weight) if transposed and added is not None else F.linear(x, weight, added)
            results.append(lora(x, y, getattr(case, f"a{i}"), getattr(case, f"b{i}"), 0.5 + i))
        return torch.cat(results, -1)

    trained = tuple(f"{kind}{i}" for kind in "ab" for i in layers)
    trained += tuple(name for name in shapes if name[0] == "c" and train_bias)
    fused = fires(Case(function, **shapes), (number(tokens, n_in),), trained, lora_linear=1)
    assert operations(fused).count("peftc.lora_linear.default") == 1
    assert not {"aten.linear.default", "aten.addmm.default"} & set(operations(fused))


@given(
    n_in=sizes, parts=st.tuples(sizes, sizes, sizes), rank=st.integers(1, 4), tokens=st.integers(2, 5),
    ranges=st.booleans(),
)  # fmt: skip
@few
def test_lora_on_rows_of_a_fused_weight(
    n_in: int, parts: tuple[int, int, int], rank: int, tokens: int, ranges: bool
) -> None:
    """Branches on the first and the last rows of one weight become one branch beside it."""
    total, (first, middle, last) = sum(parts), parts
    index = {"q": torch.arange(first), "v": torch.arange(first + middle, total)}
    starts = {"q": (0, first), "v": (first + middle, total)}

    def function(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        for name, a, b in (("q", case.a0, case.b0), ("v", case.a1, case.b1)):
            start, end = starts[name]
            if ranges:
                changed = lora(x, y.narrow(-1, start, end - start), a, b, 2.0)
                y = torch.slice_scatter(y, changed, -1, start, end)
            else:
                rows = getattr(case, name)
                y = y.index_copy(-1, rows, lora(x, y.index_select(-1, rows), a, b, 2.0))
        return y

    shapes = {"w": (total, n_in), "a0": (rank, n_in), "a1": (rank, n_in), "b0": (first, rank), "b1": (last, rank)}
    model = Case(function, **shapes)
    for name, rows in index.items():
        model.register_buffer(name, rows)
    trained = ("a0", "a1", "b0", "b1")
    fires(model, (number(tokens, n_in),), trained, lora_rows=2, lora_linear=1)


def test_branches_of_one_layer_are_joined() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        y = lora(x, F.linear(x, case.w), case.a0, case.b0, 2.0)
        return lora(x, y, case.a1, case.b1, 0.5)

    shapes = {"w": (5, 7), "a0": (2, 7), "a1": (3, 7), "b0": (5, 2), "b1": (5, 3)}
    fires(Case(function, **shapes), (number(4, 7),), ("a0", "b0", "a1", "b1"), lora_linear=1)


def test_a_transposed_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = Conv1D(5, 7)
            self.a, self.b = nn.Parameter(number(2, 7)), nn.Parameter(number(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(lora(x, self.plain(x), self.a, self.b, 2.0))

    # Conv1D flattens x and shapes y: here the branch, unlike peftc's own, reads x as it was
    _, _, (fired,) = rewritten(Layer(), (number(2, 3, 7),), ("a", "b"), ["lora_linear"])
    assert fired.nearest is not None
    assert fired.nearest.reason == "view_1 is view, not linear"


@given(outs=st.lists(sizes, min_size=1, max_size=2), n_in=sizes, tokens=st.integers(2, 5), bias=st.booleans())
@few
def test_dora_linear(outs: list[int], n_in: int, tokens: int, bias: bool) -> None:
    """Lengths multiply what the branch is added to, and not the bias."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, out in enumerate(outs):
        shapes |= {f"w{i}": (out, n_in), f"a{i}": (2, n_in), f"b{i}": (out, 2), f"m{i}": (out,)}
        shapes |= {f"c{i}": (out,)} if bias else {}

    def function(case: Any, x: Tensor) -> Tensor:
        results = []
        for i in range(len(outs)):
            w, a, b, m, c = (getattr(case, f"{kind}{i}", None) for kind in "wabmc")
            assert w is not None
            y = F.linear(x, w, c)
            scaled = (m / w.norm(dim=1)) * lora(x, y if c is None else y - c, a, b, 2.0)  # type: ignore[arg-type]
            results.append(scaled if c is None else scaled + c)
        return torch.cat(results, -1)

    trained = tuple(name for name in shapes if name[0] in "abm")
    fires(Case(function, **shapes), (number(tokens, n_in),), trained, dora_linear=1, lora_linear=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dora_in_half_precision_is_one_operation_and_as_near(dtype: torch.dtype) -> None:
    """Beside the same graph in float64, with branches in float32: no gradient is further off than twice the plain's."""

    def function(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        inner = lora(x.to(case.a.dtype), y.to(case.a.dtype), case.a, case.b, 2.0)
        return torch.as_tensor((case.m * inner).to(x.dtype))

    def case(frozen: torch.dtype, learning: torch.dtype) -> Case:
        model = Case(function, w=(24, 32), a=(2, 32), b=(24, 2), m=(24,)).to(learning)
        model.w = nn.Parameter(case_weight.to(frozen))
        return model

    case_weight, x = number(24, 32).to(dtype), number(40, 32).to(dtype)
    exact, _, _ = rewritten(case(torch.float64, torch.float64), (x.double(),), ("a", "b", "m"), [])
    plain, fused, (fired,) = rewritten(case(dtype, torch.float32), (x,), ("a", "b", "m"), ["dora_linear"])
    assert fired.count == (dtype is torch.bfloat16)  # fp16 has bits for more than is read off an output
    found = []
    for module, tokens in ((exact, x.double()), (plain, x), (fused, x)):
        result = module(tokens)
        result = result[0] if isinstance(result, tuple) else result
        weights = torch.linspace(0.5, 1.5, result.numel()).view(result.shape).to(result.dtype)
        learned = [module.get_parameter(name) for name in "abm"]
        found.append([one.double() for one in torch.autograd.grad((result * weights).sum(), learned)])
    for true, slow, fast in zip(*found, strict=True):
        near = float((slow - true).abs().max()) + torch.finfo(dtype).eps * float(true.abs().max())
        assert float((fast - true).abs().max()) <= 2 * near


def test_a_residual_is_no_bias() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(x + case.m * lora(x, F.linear(x, case.w), case.a, case.b, 2.0))

    shapes = {"w": (5, 5), "a": (2, 5), "b": (5, 2), "m": (5,)}
    fused = fires(Case(function, **shapes), (number(4, 5),), ("a", "b", "m"), dora_linear=1)
    assert "aten.add.Tensor" in operations(fused)


def test_lora_linear_says_why_not() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return lora(x, F.linear(x, case.w), case.a, case.b, 2.0)

    shapes = {"w": (5, 7), "a": (2, 7), "b": (5, 2)}
    x = number(4, 7)
    assert misses(Case(function, **shapes), (x,), ("a", "b", "w"), "lora_linear") == "w learns, too"
    assert misses(Case(function, **shapes), (x,), (), "lora_linear") == "nothing of a and b learns"

    def gated(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.as_tensor(lora(x, y, case.a, case.b, 2.0) + y)

    assert misses(Case(gated, **shapes), (x,), ("a", "b"), "lora_linear") == "linear is read by add_1, too"

    def two_dropouts(case: Any, x: Tensor) -> Tensor:
        y = lora(x, F.linear(x, case.w), case.a, case.b, 2.0, 0.1)
        return lora(x, y, case.a1, case.b1, 2.0, 0.2)

    more = {**shapes, "a1": (2, 7), "b1": (5, 2)}
    _, _, (fired,) = rewritten(Case(two_dropouts, **more), (x,), ("a", "b", "a1", "b1"), ["lora_linear"])
    assert fired.count == 1  # the inner one; the other stays beside it


@given(outs=st.lists(sizes, min_size=1, max_size=3), n_in=sizes, tokens=st.integers(2, 5), seed=st.integers(0, 2**31))
@few
def test_seeded_dropout(outs: list[int], n_in: int, tokens: int, seed: int) -> None:
    """One mask for the group, decided by `torch.manual_seed`; the plain graph is given the same one."""
    shapes = {f"w{i}": (out, n_in) for i, out in enumerate(outs)}
    shapes |= {f"a{i}": (2, n_in) for i in range(len(outs))} | {f"b{i}": (out, 2) for i, out in enumerate(outs)}

    def function(case: Any, x: Tensor) -> Tensor:
        w, a, b = ([getattr(case, f"{kind}{i}") for i in range(len(outs))] for kind in "wab")
        return torch.cat([lora(x, F.linear(x, w[i]), a[i], b[i], 2.0, 0.3) for i in range(len(outs))], -1)

    trained = tuple(name for name in shapes if name[0] in "ab")
    plain, fused, (fired,) = rewritten(Case(function, **shapes), (number(tokens, n_in),), trained, ["lora_linear"])
    assert fired.count == 1
    x = number(tokens, n_in, seed=3)
    same(plain.eval(), fused.eval(), (x,))
    before = torch.get_rng_state()
    fused(x)
    assert torch.equal(before, torch.get_rng_state())

    for node in plain.graph.nodes:
        if node.target is torch.ops.aten.dropout.default:
            node.target, node.args = _masked, (*node.args[:2], seed)
    plain.recompile()
    with torch.random.fork_rng(devices=[]):
        same(plain.train(), _Reseeded(fused.train(), seed), (x,))


def _masked(x: Tensor, p: float, seed: int) -> Tensor:
    """The mask that a fused group draws first behind `torch.manual_seed(seed)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = torch.randint(2**63 - 1, ())
    return torch.as_tensor(torch.ops.peftc.seeded_dropout(x, drawn, p, 0))


class _Reseeded(nn.Module):
    def __init__(self, module: nn.Module, seed: int) -> None:
        super().__init__()
        self.__dict__["module"], self.seed = module, seed

    def named_parameters(self, *given: Any, **options: Any) -> Any:
        return self.__dict__["module"].named_parameters(*given, **options)

    def forward(self, *given: Any) -> Any:
        torch.manual_seed(self.seed)
        return self.__dict__["module"](*given)


def test_a_branch_beside_a_scaled_product_is_doras() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l * lora(x, F.linear(x, case.w), case.a, case.b, 2.0))

    shapes = {"w": (5, 7), "a": (2, 7), "b": (5, 2), "l": (5,)}
    fires(Case(function, **shapes), (number(4, 7),), ("a", "b", "l"), dora_linear=1, scaled_linear=0)


# ---- Adapters and experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@given(n_in=sizes, n_out=sizes, size=sizes, tokens=st.integers(2, 5), bias=st.booleans(), behind=st.booleans())
@few
def test_adapter(activation: str, n_in: int, n_out: int, size: int, tokens: int, bias: bool, behind: bool) -> None:
    """Behind a layer, where x is the residual, or beside it."""
    n_in = n_out if behind else n_in
    f: Any = torch.tanh if activation == "tanh" else getattr(F, activation)

    def function(case: Any, x: Tensor, h: Tensor) -> Tensor:
        h = x if behind else h
        inner = f(F.linear(x, case.down, case.c if bias else None))
        return h + 1.5 * F.linear(inner, case.up, case.d if bias else None)

    shapes = {"down": (size, n_in), "up": (n_out, size)} | ({"c": (size,), "d": (n_out,)} if bias else {})
    inputs = number(tokens, n_in), number(tokens, n_out, seed=2)
    if behind:
        fires(Case(lambda case, x: function(case, x, x), **shapes), inputs[:1], tuple(shapes), adapter=1)
    else:
        fires(Case(function, **shapes), inputs, tuple(shapes), adapter=1)


def test_a_frozen_feed_forward_layer_is_no_adapter() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(F.linear(x, case.down)), case.up)

    reason = misses(Case(function, down=(3, 5), up=(5, 3)), (number(2, 5),), (), "adapter")
    assert reason == "down and up are no adapter's"


@given(
    counts=st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(lambda counts: sum(counts) > 1), n_in=sizes,
    n_out=sizes, rank=st.integers(1, 3), added=st.booleans(), branches=st.integers(0, 2),
)  # fmt: skip
@few
def test_experts(counts: list[int], n_in: int, n_out: int, rank: int, added: bool, branches: int) -> None:
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    product = torch.ops.transformers.grouped_mm_fallback

    def function(case: Any, x: Tensor, extra: Tensor, ends: Tensor) -> Tensor:
        y = product(x, case.w.transpose(-2, -1), ends)
        y = y + extra if added else y
        for i in range(branches):
            a, b = getattr(case, f"a{i}"), getattr(case, f"b{i}")
            thin = product(product(x, a.transpose(-2, -1), ends), b.transpose(-2, -1), ends)
            y = y + 2.0 * thin
        return torch.as_tensor(y + 0 * extra)

    e = len(counts)
    shapes = {"w": (e, n_out, n_in)}
    for i in range(branches):
        shapes |= {f"a{i}": (e, rank, n_in), f"b{i}": (e, n_out, rank)}
    inputs = number(sum(counts), n_in), number(sum(counts), n_out, seed=2), ends
    trained = tuple(name for name in shapes if name != "w")
    fired = {"expert_lora": 1, "expert_linear": 0} if branches else {"expert_lora": 0, "expert_linear": 1}
    fused = fires(Case(function, **shapes), inputs, trained, **fired)
    assert "transformers.grouped_mm_fallback.default" not in operations(fused)
