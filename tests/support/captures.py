"""One capture for all tests of a process whose models are alike: it takes seconds, and each compile uses a graph up."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel

from peftc.capture.capture import Captured, capture, over
from peftc.capture.examples.asking import fake_mode_of
from peftc.capture.inputs import Example
from peftc.graph.ir import set_tensor, tensors

captures: dict[Hashable, Captured] = {}


def captured_once(model: nn.Module, example: Example, *more: Any) -> Captured:
    """`capture`, once for each kind of model and shape of inputs; each caller gets a graph of its own."""
    kind = kind_of(model)
    key = (
        kind,
        type(example),
        str(shapes(example.args)),
        str(shapes(example.kwargs)),
        str(example.constants),
        str(example.config),
    )
    if key not in captures:
        captures[key] = capture(model, example, *more)
    known = captures[key]  # it holds the model, whose id is nobody else's then
    graph = fx.Graph()
    graph.output(graph.graph_copy(known.module.graph, {}))
    module = fx.GraphModule(known.module, graph, class_name=type(model).__name__)
    for name, tensor in tensors(known.module).items():  # the second name of a tied weight is read by nothing
        set_tensor(module, name, tensor)
    own = replace(known, module=module, example=example)
    return own if known.model is model else over(own, model, None)


def kind_of(model: nn.Module) -> Hashable:
    """Equal for models that differ in their numbers alone; of what no library made, the model itself."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    own = hooked or "forward" in vars(model) or fake_mode_of(model) is not None
    if own or not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return id(model)
    first: dict[int, str] = {}
    return (
        type(model),
        model.config.to_json_string(use_diff=False),
        *((type(module).__name__, str(settings(module))) for module in model.modules()),
        *((name, first.setdefault(id(t), name), t.shape, t.dtype, t.device) for name, t in tensors(model).items()),
    )


def settings(module: nn.Module) -> dict[str, Any]:
    """What is set on a module but its mode: probabilities, scales, the way it attends."""
    found = {name: given for name, given in vars(module).items() if isinstance(given, bool | int | float | str)}
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found | {"training": None, "attention": attention}


def shapes(given: Any) -> Any:
    """The inputs with tensors' shapes and kinds in their place."""
    if isinstance(given, dict):
        return {name: shapes(item) for name, item in given.items()}
    if isinstance(given, tuple | list):
        return [shapes(item) for item in given]
    return (given.shape, given.dtype, given.device) if hasattr(given, "dtype") else given
