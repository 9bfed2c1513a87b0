"""What the fusions' tests share: a model of one function, what a rule makes of it, and a comparison of the two.

The oracle is the graph as it was captured, run beside the rewritten one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from peftc.graph.ir import get_attribute, set_tensor
from peftc.graph.normalise import tidy
from peftc.optimise.fuse import Fired, fuse
from peftc.protocol.rule import Fusion, fusions

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


def lora(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
    return y + scale * F.linear(F.linear(F.dropout(x, p), a), b)
