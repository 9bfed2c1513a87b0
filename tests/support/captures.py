"""One capture for all tests of a process whose models are alike: it takes seconds, and each compile uses a graph up."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from peftc.capture.capture import Captured, capture, over
from peftc.capture.examples.asking import fake_mode_of
from peftc.capture.inputs import Example
from peftc.graph.ir import get_attribute, is_tensor, memories, set_tensor, tensors

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


def described(found: Captured, own: dict[str, Tensor]) -> list[Any]:
    """All that each tensor of a graph is, and what it is made of; sizes as expressions, constants as numbers."""
    places: dict[fx.Node, int] = {}
    first: dict[Any, int] = {}

    def operand(node: fx.Node) -> Any:
        return places[node] if node in places else str(node.meta["val"])

    lines: list[Any] = []
    for node in found.module.graph.nodes:
        value = node.meta.get("val")
        args = fx.map_arg((node.args, node.kwargs), operand)
        target: Any = node.target
        if node.op == "get_attr" and target not in own and is_tensor(node):
            target = get_attribute(found.module, target).tolist()
        lies = [first.setdefault(one, len(first)) for one in memories(node)] if is_tensor(node) else []
        if memories(node) or node.op == "output":
            places[node] = len(places)
            stack = [(str(path), cls) for path, cls in (node.meta.get("nn_module_stack") or {}).values()]
            lines.append((node.op, str(target), str(args), str(getattr(value, "shape", "")), lies, stack))
    return lines
