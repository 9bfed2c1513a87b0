"""Fusions: each rule computes what it replaces, fires where it should, and says why it did not.

The oracle is the graph as it was captured, run beside the rewritten one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the grouped product
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftc
from golden import check
from paths import GOLDEN
from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from peftc.graph.ir import get_attribute, set_tensor
from peftc.graph.normalise import tidy
from peftc.optimise.fuse import Fired, fuse
from peftc.protocol.rule import Fusion, fusions
from peftc.show.tables import fusions_table, rendered
from zoo import ZOO, inputs

# The same sums of at most a few hundred numbers of size 1, in another order: a few hundred roundings of 6e-8.
TOLERANCE = 1e-5

sizes = st.integers(1, 9)
# Exporting takes a quarter of a second: few examples, of many shapes each.
few = settings(max_examples=8)


class Case(nn.Module):
    """A function of tensors and of the module's own parameters, to be captured."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=random)))
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        return self.function(self, *(item for item in (x, y, z) if item is not None))


def rule(name: str) -> Fusion:
    return next(one for one in fusions() if one.name == name)


def rewritten(
    model: nn.Module, inputs: tuple[Tensor, ...], trained: tuple[str, ...], rules: list[str]
) -> tuple[fx.GraphModule, fx.GraphModule, tuple[Fired, ...]]:
    """The captured graph, the same with `rules` applied, and what they did."""
    module = capture(model, example_inputs(model, inputs)).module
    for name in trained:
        set_tensor(module, name, nn.Parameter(get_attribute(module, name).clone()))
    tidy(module)
    copied = fx.Graph()
    copied.output(copied.graph_copy(module.graph, {}))
    plain = fx.GraphModule(module, copied)
    fired = fuse(module, module.graph, rules=[rule(name) for name in rules])
    module.graph.lint()
    module.recompile()
    return plain, module, fired


def same(plain: nn.Module, fused: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Outputs and the gradients of inputs and of all that learns, under a loss in which every output counts."""
    found = []
    for module in (plain, fused):
        given = tuple(item.clone().requires_grad_(item.is_floating_point()) for item in inputs)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        result = module(*given)
        result = result[0] if isinstance(result, tuple) else result
        weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
        floating = [item for item in given if item.requires_grad]
        gradients = torch.autograd.grad((result * weights).sum(), [*floating, *parameters.values()])
        names = [*range(len(floating)), *parameters]
        found.append({"output": result, **dict(zip(map(str, names), gradients, strict=True))})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        scale = float(expected.detach().abs().max().clamp_min(1))
        torch.testing.assert_close(found[1][name] / scale, expected / scale, rtol=TOLERANCE, atol=TOLERANCE)


def fires(model: nn.Module, inputs: tuple[Tensor, ...], trained: tuple[str, ...], **counts: int) -> fx.GraphModule:
    """Rewrites with the rules of `counts`, in their order, and compares numbers and counts."""
    plain, fused, fired = rewritten(model, inputs, trained, list(counts))
    assert {one.rule: one.count for one in fired} == counts
    same(plain, fused, inputs)
    return fused


def misses(model: nn.Module, inputs: tuple[Tensor, ...], trained: tuple[str, ...], name: str) -> str:
    """The reason of the nearest miss of a rule that does not fire."""
    _, _, (fired,) = rewritten(model, inputs, trained, [name])
    assert fired.count == 0
    assert fired.nearest is not None
    return fired.nearest.reason


def operations(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def number(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- RMSNorm ---------------------------------------------------------------------------------------------------


def _llama(case: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return torch.as_tensor(case.w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype))


def _gemma(case: Any, x: Tensor) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.as_tensor((normal * (1.0 + case.w.float())).type_as(x))


def _t5(case: Any, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return torch.as_tensor(case.w * (x * torch.rsqrt(variance + 1e-6)).to(case.w.dtype))


def _divided(case: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * case.w)


def _bare(case: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


NORMS = [_llama, _gemma, _t5, _divided, _bare]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
@given(batch=st.integers(2, 4), rows=sizes, width=sizes, trains=st.booleans())
@few
def test_rms_norm(norm: Any, batch: int, rows: int, width: int, trains: bool) -> None:
    model = Case(norm, w=(width,))
    trained = ("w",) if trains and norm is not _bare else ()
    fires(model, (number(batch, rows, width),), trained, rms_norm=1)


@pytest.mark.parametrize("norm", NORMS[:3], ids=lambda norm: norm.__name__)
def test_rms_norm_fires_in_half_precision(norm: Any) -> None:
    model, x = Case(norm, w=(6,)).bfloat16(), number(2, 3, 6).bfloat16()
    plain, fused, (fired,) = rewritten(model, (x,), (), ["rms_norm"])
    assert fired.count == 1
    # the plain graph rounds to 8 bits once or twice, and so does the fused one
    torch.testing.assert_close(fused(x), plain(x), rtol=2**-7, atol=2**-7)


def test_rms_norm_says_what_differs() -> None:
    def centred(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)))

    assert misses(Case(centred, w=(6,)), (number(2, 3, 6),), (), "rms_norm") == (
        "sub stands where x is to be read again"
    )

    def half(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))

    model = Case(half, w=(6,)).bfloat16()
    reason = misses(model, (number(2, 3, 6).bfloat16(),), (), "rms_norm")
    assert reason == "it computes in bfloat16 what is given in bfloat16"

    def seen(case: Any, x: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.as_tensor(case.w * normal + normal.sin())

    fused = fires(Case(seen, w=(6,)), (number(2, 3, 6),), ("w",), rms_norm=1)  # the inner one, without the weight
    assert "aten.sin.default" in operations(fused)


# ---- Activations -----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(batch=st.integers(2, 4), rows=sizes, width=sizes, swapped=st.booleans())
@few
def test_gated_activation(name: str, batch: int, rows: int, width: int, swapped: bool) -> None:
    def function(_: Any, gate: Tensor, up: Tensor) -> Tensor:
        activated = ACTIVATIONS[name](gate)
        return up * activated if swapped else activated * up

    inputs = number(batch, rows, width), number(batch, rows, width, seed=2)
    fused = fires(Case(function), inputs, (), gated_activation=1)
    assert operations(fused) == ["peftc.gated_activation.default"]


def test_gated_activation_needs_equal_shapes_and_the_activation_for_itself() -> None:
    gate, up = number(2, 3, 5), number(2, 3, 1)
    reason = misses(Case(lambda _, a, b: F.silu(a) * b), (gate, up), (), "gated_activation")
    assert reason.startswith("what is gated is")

    def twice(_: Any, a: Tensor, b: Tensor) -> Tensor:
        activated = F.silu(a)
        return activated * b + activated

    reason = misses(Case(twice), (gate, number(2, 3, 5, seed=2)), (), "gated_activation")
    assert reason == "silu is read by add, too"


def _new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def _bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize("spelling", [_new, _bloom])
@given(rows=st.integers(2, 5), width=sizes)
@few
def test_spelt_gelu(spelling: Callable[[Tensor], Tensor], rows: int, width: int) -> None:
    fused = fires(Case(lambda _, x: spelling(x)), (number(rows, width),), (), spelt_gelu=1)
    assert operations(fused) == ["aten.gelu.default"]


def test_a_gelu_of_other_constants_is_none() -> None:
    def other(_: Any, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))

    assert misses(Case(other), (number(2, 3),), (), "spelt_gelu") == "0.8 is not 0.797885"


# ---- Low-rank branches -----------------------------------------------------------------------------------------


def _lora(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
    return y + scale * F.linear(F.linear(F.dropout(x, p), a), b)


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
            results.append(_lora(x, y, getattr(case, f"a{i}"), getattr(case, f"b{i}"), 0.5 + i))
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
                changed = _lora(x, y.narrow(-1, start, end - start), a, b, 2.0)
                y = torch.slice_scatter(y, changed, -1, start, end)
            else:
                rows = getattr(case, name)
                y = y.index_copy(-1, rows, _lora(x, y.index_select(-1, rows), a, b, 2.0))
        return y

    shapes = {"w": (total, n_in), "a0": (rank, n_in), "a1": (rank, n_in), "b0": (first, rank), "b1": (last, rank)}
    model = Case(function, **shapes)
    for name, rows in index.items():
        model.register_buffer(name, rows)
    trained = ("a0", "a1", "b0", "b1")
    fires(model, (number(tokens, n_in),), trained, lora_rows=2, lora_linear=1)


def test_branches_of_one_layer_are_joined() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        y = _lora(x, F.linear(x, case.w), case.a0, case.b0, 2.0)
        return _lora(x, y, case.a1, case.b1, 0.5)

    shapes = {"w": (5, 7), "a0": (2, 7), "a1": (3, 7), "b0": (5, 2), "b1": (5, 3)}
    fires(Case(function, **shapes), (number(4, 7),), ("a0", "b0", "a1", "b1"), lora_linear=1)


def test_a_transposed_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = Conv1D(5, 7)
            self.a, self.b = nn.Parameter(number(2, 7)), nn.Parameter(number(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(_lora(x, self.plain(x), self.a, self.b, 2.0))

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
            scaled = (m / w.norm(dim=1)) * _lora(x, y if c is None else y - c, a, b, 2.0)  # type: ignore[arg-type]
            results.append(scaled if c is None else scaled + c)
        return torch.cat(results, -1)

    trained = tuple(name for name in shapes if name[0] in "abm")
    fires(Case(function, **shapes), (number(tokens, n_in),), trained, dora_linear=1, lora_linear=0)


def test_a_residual_is_no_bias() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(x + case.m * _lora(x, F.linear(x, case.w), case.a, case.b, 2.0))

    shapes = {"w": (5, 5), "a": (2, 5), "b": (5, 2), "m": (5,)}
    fused = fires(Case(function, **shapes), (number(4, 5),), ("a", "b", "m"), dora_linear=1)
    assert "aten.add.Tensor" in operations(fused)


def test_lora_linear_says_why_not() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return _lora(x, F.linear(x, case.w), case.a, case.b, 2.0)

    shapes = {"w": (5, 7), "a": (2, 7), "b": (5, 2)}
    x = number(4, 7)
    assert misses(Case(function, **shapes), (x,), ("a", "b", "w"), "lora_linear") == "w learns, too"
    assert misses(Case(function, **shapes), (x,), (), "lora_linear") == "nothing of a and b learns"

    def gated(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.as_tensor(_lora(x, y, case.a, case.b, 2.0) + y)

    assert misses(Case(gated, **shapes), (x,), ("a", "b"), "lora_linear") == "linear is read by add_1, too"

    def two_dropouts(case: Any, x: Tensor) -> Tensor:
        y = _lora(x, F.linear(x, case.w), case.a, case.b, 2.0, 0.1)
        return _lora(x, y, case.a1, case.b1, 2.0, 0.2)

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
        return torch.cat([_lora(x, F.linear(x, w[i]), a[i], b[i], 2.0, 0.3) for i in range(len(outs))], -1)

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


# ---- Trained factors of outputs --------------------------------------------------------------------------------


@given(
    n_in=sizes, n_out=sizes, tokens=st.integers(2, 5), bias=st.booleans(), transposed=st.booleans(),
    train_bias=st.booleans(), dead=st.booleans(), times=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=15)
def test_scaled_linear(
    n_in: int, n_out: int, tokens: int, bias: bool, transposed: bool, train_bias: bool, dead: bool, times: int
) -> None:
    """One vector or several, with entries that are 0; the bias is scaled, too."""
    shapes: dict[str, tuple[int, ...]] = {"w": (n_in, n_out) if transposed else (n_out, n_in)}
    shapes |= {f"l{i}": (n_out,) for i in range(times)} | ({"c": (n_out,)} if bias else {})

    def function(case: Any, x: Tensor) -> Tensor:
        added: Any = case.c if bias else None
        y = F.linear(x, case.w, added) if not transposed else torch.addmm(added, x, case.w) if bias else x @ case.w
        return torch.as_tensor(case.l1 * (y * case.l0) if times > 1 else case.l0 * y)

    model = Case(function, **shapes)
    if dead:
        with torch.no_grad():
            model.get_parameter("l0")[0] = 0
    trained = tuple(name for name in shapes if name[0] == "l" or (name == "c" and train_bias))
    fused = fires(model, (number(tokens, n_in),), trained, dora_linear=0, scaled_linear=1)
    assert not {"aten.linear.default", "aten.addmm.default", "aten.matmul.default"} & set(operations(fused))


@given(n_in=sizes, parts=st.tuples(sizes, sizes, sizes), tokens=st.integers(2, 5), ranges=st.booleans())
@few
def test_factors_of_rows_of_a_fused_weight(n_in: int, parts: tuple[int, int, int], tokens: int, ranges: bool) -> None:
    """Those of the first and the last rows are multiplied together."""
    total, (first, middle, last) = sum(parts), parts
    index = {"k": torch.arange(first), "v": torch.arange(first + middle, total)}

    def function(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w, case.c)
        for name, start, end, length in (("k", 0, first, case.l0), ("v", first + middle, total, case.l1)):
            if ranges:
                y = torch.slice_scatter(y, length * y.narrow(-1, start, end - start), -1, start, end)
            else:
                y = y.index_copy(-1, getattr(case, name), y.index_select(-1, getattr(case, name)) * length)
        return y

    model = Case(function, w=(total, n_in), c=(total,), l0=(first,), l1=(last,))
    for name, rows in index.items():
        model.register_buffer(name, rows)
    fires(model, (number(tokens, n_in),), ("l0", "l1"), scaled_rows=2, scaled_linear=1)


def test_scaled_linear_says_why_not() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l * F.linear(x, case.w))

    shapes, x = {"w": (5, 7), "l": (5,)}, number(2, 4, 7)
    assert misses(Case(function, **shapes), (x,), ("l", "w"), "scaled_linear") == "w learns, too"
    assert misses(Case(function, **shapes), (x,), (), "scaled_linear") == "l does not learn"
    assert misses(Case(function, w=(5, 7), l=(1,)), (x,), ("l",), "scaled_linear") == "l has no entry for each row"
    assert misses(Case(function, w=(5, 7), l=(4, 1)), (x,), ("l",), "scaled_linear") == "l has no entry for each row"

    def seen(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.as_tensor(case.l * y + y)

    assert misses(Case(seen, **shapes), (x,), ("l",), "scaled_linear") == "linear is read by add, too"

    def shared(case: Any, x: Tensor) -> Tensor:
        return torch.cat([case.l * F.linear(x, case.w[:5]), F.linear(x, case.w[:3])], -1)

    model = Case(shared, w=(6, 7), l=(5,))
    assert misses(model, (x,), ("l",), "scaled_linear") == "the weight is read by slice_2, too"

    def wide(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l.float() * F.linear(x, case.w))

    model = Case(wide, **shapes).bfloat16()
    reason = misses(model, (x.bfloat16(),), ("l",), "scaled_linear")
    assert reason == "the product is scaled in float32"


def test_scaled_rows_says_why_not() -> None:
    def seen(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        part = case.l * y.narrow(-1, 1, 3)
        return torch.as_tensor(torch.slice_scatter(y, part, -1, 1, 4) * part.sum())

    shapes, x = {"w": (5, 7), "l": (3,)}, number(4, 7)
    assert misses(Case(seen, **shapes), (x,), ("l",), "scaled_rows") == "mul is read by sum_1, too"

    def gated(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.slice_scatter(y, F.linear(x, case.u) * y.narrow(-1, 1, 3), -1, 1, 4)

    reason = misses(Case(gated, w=(5, 7), u=(3, 7)), (x,), ("u",), "scaled_rows")
    assert reason == "linear_1 is no vector"

    def common(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.slice_scatter(y, case.l * y.narrow(-1, 1, 3), -1, 1, 4)

    reason = misses(Case(common, w=(5, 7), l=(1,)), (x,), ("l",), "scaled_rows")
    assert reason == "l has no entry for each row"


def test_a_branch_beside_a_scaled_product_is_doras() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l * _lora(x, F.linear(x, case.w), case.a, case.b, 2.0))

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


# ---- The loss --------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(2, 3), length=st.integers(2, 5), width=sizes, vocabulary=st.integers(2, 9), bias=st.booleans(),
    scale=st.sampled_from([None, "multiplied", "divided"]), total=st.booleans(), ignored=st.booleans(),
)  # fmt: skip
@settings(max_examples=15)
def test_chunked_loss(
    batch: int, length: int, width: int, vocabulary: int, bias: bool, scale: str | None, total: bool, ignored: bool
) -> None:
    bias = bias and scale is None

    def function(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, case.w, case.c if bias else None)
        logits = logits * 0.25 if scale == "multiplied" else logits / 4.0 if scale == "divided" else logits
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        reduction = "sum" if total else "mean"
        return F.cross_entropy(logits.float().view(-1, vocabulary), shifted.view(-1), reduction=reduction)

    labels = torch.arange(batch * length).view(batch, length) % vocabulary
    if ignored:
        labels[0, 1:] = -100
    shapes = {"w": (vocabulary, width), **({"c": (vocabulary,)} if bias else {})}
    fires(Case(function, **shapes), (number(batch, length, width), labels), (), chunked_loss=1)


def test_chunked_loss_says_why_not() -> None:
    def function(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, case.w).view(-1, 7), labels.view(-1))

    labels = torch.arange(6).view(2, 3)
    model, hidden = Case(function, w=(7, 4)), number(2, 3, 4)
    assert misses(model, (hidden, labels), ("w",), "chunked_loss") == "the head's w learns"
    assert misses(model, (hidden[:, 0], labels[:, 0]), (), "chunked_loss") == (
        "it has one label an example, none a token"
    )

    def capped(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = torch.tanh(F.linear(hidden, case.w) / 30.0) * 30.0
        return F.cross_entropy(logits.view(-1, 7), labels.view(-1))

    reason = misses(Case(capped, w=(7, 4)), (hidden, labels), (), "chunked_loss")
    assert reason == "tanh is tanh, not linear"


# ---- What is told ----------------------------------------------------------------------------------------------


def test_every_rule_says_what_it_is() -> None:
    for one in fusions():
        assert type(one).__doc__
        assert one.pattern.size > 0
    names = [one.name for one in fusions()]
    assert len(names) == len(set(names))


def test_the_table_of_fusions(request: pytest.FixtureRequest) -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        normal = case.n * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return _lora(normal, F.linear(normal, case.w), case.a, case.b, 2.0)

    model = Case(function, n=(7,), w=(5, 7), a=(2, 7), b=(5, 2))
    names = ["rms_norm", "gated_activation", "lora_linear"]
    _, _, fired = rewritten(model, (number(2, 3, 7),), ("a", "b", "w"), names)
    check(GOLDEN / "fusions" / "table.txt", rendered(fusions_table(fired)) + "\n", request.config)
    assert [one.to_json()["fired"] for one in fired] == [1, 0, 0]
    told = fired[2].to_json()["nearest_miss"]
    assert told["reason"] == "w learns, too"
    assert told["nodes"] == ("w",)


# ---- Whole models ----------------------------------------------------------------------------------------------

LORA = "apply lora(r=4) to attn.*, mlp.*"
IA3 = "apply ia3 to attn.k, attn.v, mlp.down"
# model, spec -> how often each rule fires; those that are not named never do
COUNTS: list[tuple[str, str, dict[str, int]]] = [
    ("llama", LORA, {"rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("gpt2", LORA, {"spelt_gelu": 2, "lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("mistral", LORA, {"rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("qwen2", LORA, {"rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("qwen3", LORA, {"rms_norm": 9, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("gemma2", LORA, {"rms_norm": 9, "gated_activation": 2, "lora_linear": 8}),
    ("gemma3", LORA, {"rms_norm": 13, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("phi", LORA, {"spelt_gelu": 2, "lora_linear": 6, "chunked_loss": 1}),
    ("phi3", LORA, {"rms_norm": 5, "gated_activation": 2, "lora_rows": 10, "lora_linear": 8, "chunked_loss": 1}),
    ("gpt_neox", LORA, {"lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("opt", LORA, {"lora_linear": 8, "chunked_loss": 1}),
    ("bloom", LORA, {"spelt_gelu": 2, "lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("falcon", LORA, {"lora_rows": 6, "lora_linear": 6, "chunked_loss": 1}),
    ("mixtral", LORA,
     {"rms_norm": 5, "gated_activation": 2, "lora_rows": 4, "lora_linear": 4, "expert_lora": 4, "chunked_loss": 1}),
    ("gpt_oss", LORA, {"rms_norm": 5, "lora_rows": 4, "lora_linear": 4, "expert_lora": 4, "chunked_loss": 1}),
    ("llama4", LORA, {"rms_norm": 9, "gated_activation": 4, "lora_linear": 8, "chunked_loss": 1}),
    ("bert", LORA, {"lora_linear": 8}),
    ("modernbert", LORA, {"gated_activation": 2, "lora_rows": 10, "lora_linear": 8, "chunked_loss": 1}),
    ("t5", LORA, {"rms_norm": 12, "lora_linear": 22, "chunked_loss": 1}),
    ("t5_gated", LORA,
     {"spelt_gelu": 4, "rms_norm": 12, "gated_activation": 4, "lora_linear": 22, "chunked_loss": 1}),
    ("bart", LORA, {"lora_linear": 22, "chunked_loss": 1}),
    ("vit", LORA, {"lora_linear": 8}),
    ("mixtral", "apply adapter(size=8, at=parallel) to mlp",
     {"rms_norm": 5, "gated_activation": 2, "adapter": 2, "expert_linear": 4, "chunked_loss": 1}),
    ("bert", "apply adapter(size=8) to attn, mlp", {"adapter": 4}),
    ("t5", "apply adapter(size=8) to attn, mlp", {"rms_norm": 12, "adapter": 10, "chunked_loss": 1}),
    ("llama", "apply dora(r=4) to attn.*, mlp.*",
     {"rms_norm": 5, "gated_activation": 2, "dora_linear": 8, "chunked_loss": 1}),
    ("qwen2", "apply dora(r=4) to attn.*", {"rms_norm": 5, "gated_activation": 2, "dora_linear": 4, "chunked_loss": 1}),
    ("gpt2", IA3, {"spelt_gelu": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("qwen2", IA3, {"rms_norm": 5, "gated_activation": 2, "scaled_linear": 4, "chunked_loss": 1}),
    ("phi3", IA3, {"rms_norm": 5, "gated_activation": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("bloom", IA3, {"spelt_gelu": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("t5", IA3, {"rms_norm": 12, "scaled_linear": 12, "chunked_loss": 1}),
    ("llama", "apply vera(r=4) to attn.*", {"rms_norm": 5, "gated_activation": 2, "chunked_loss": 1}),
    ("llama", "apply loha(r=2) to attn.*, mlp.*",
     {"rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
]  # fmt: skip


def marked(cases: list[tuple[str, str, dict[str, int]]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-{case[1].split()[1]}", marks=marks) for case in cases]


@pytest.mark.parametrize(("name", "spec", "counts"), [*marked(COUNTS[:1]), *marked(COUNTS[1:], pytest.mark.slow)])
def test_whole_models(name: str, spec: str, counts: dict[str, int]) -> None:
    """Losses and gradients in eval mode, where there is no dropout, and the loss that training computes in chunks."""
    model = ZOO[name]()
    batch = inputs(model)
    plain, fused = (_at_random(peftc.compile(model, spec, fuse=fuse)).eval() for fuse in (False, True))
    assert {one.rule: one.count for one in fused.fired if one.count} == counts
    losses = [module(**batch).loss for module in (plain, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=TOLERANCE, atol=TOLERANCE)
    for loss in losses:
        loss.backward()
    learned = fused.trainable_parameters()
    for key, parameter in plain.trainable_parameters().items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max().clamp_min(1e-2))  # of the largest entry, 1e-2 where all are smaller
        difference = learned[key].grad / scale - parameter.grad / scale  # type: ignore[operator]
        assert difference.abs().max() < TOLERANCE, key


def _at_random(module: peftc.CompiledModule) -> peftc.CompiledModule:
    """Numbers that hide nothing, the same for modules whose parameters come in another order."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(module.trainable_parameters().items())):
            parameter.copy_(0.1 * number(*parameter.shape, seed=seed))
    return module


@pytest.fixture
def llama() -> peftc.CompiledModule:
    return _at_random(peftc.compile(ZOO["llama"](), LORA))


def test_training_returns_the_loss_alone(llama: peftc.CompiledModule) -> None:
    """The same loss and gradients as eval mode's, which has the logits, too."""
    batch = inputs(llama.base)
    with_logits = llama.eval()(**batch)
    without = llama.train()(**batch)
    assert without.logits is None
    assert with_logits.logits.shape == (2, 7, 97)
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(llama.trainable_parameters().values())
    gradients = [torch.autograd.grad(result.loss, parameters) for result in (without, with_logits)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    del batch["labels"]
    assert llama(**batch).logits is not None
    assert llama(**batch).loss is None


@pytest.mark.slow
def test_training_returns_logits_to_who_asks(llama: peftc.CompiledModule) -> None:
    batch = inputs(llama.base)
    llama.logits_in_training = True
    assert llama(**batch).logits is not None
    assert peftc.compile(llama.base, LORA, fuse=False)(**batch).logits is not None


@pytest.mark.slow
def test_a_head_that_learns_returns_logits() -> None:
    model = ZOO["llama"]()
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q\ntrain head")
    assert compiled(**inputs(model)).logits is not None
    told = {one.rule: str(one.nearest) for one in compiled.fired}
    assert told["chunked_loss"] == "the head's lm_head.weight learns"
