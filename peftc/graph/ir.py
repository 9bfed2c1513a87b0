"""The small graph helpers every stage shares: tracing plain PyTorch, splicing it, saying who wrote what.

The graph is a flat ATen `torch.fx.Graph` straight from `torch.export`. Every node has its fake value in
`meta["val"]`, and every node peftc adds carries a `Provenance` in `meta["peftc"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from peftc.diagnostics.source import Span

PROVENANCE = "peftc"
COPY = "peftc copy"  # on a node that has a fake value of another: whose memory that stands for here
FOUND = "peftc found"  # beside a fake mode: what was computed of which fake values, for as long as these are there
STACK = "nn_module_stack"
Memory = tuple[int, str]
NOWHERE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export says of a node that no module made


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who put a node into the graph: the pass, the site it serves, and the statement that asked for it."""

    pass_name: str
    site: str
    span: Span | None = None


def value(node: fx.Node) -> torch.Tensor:
    """The fake tensor `node` computes. Only for nodes known to yield one tensor."""
    return cast(torch.Tensor, node.meta["val"])


def is_tensor(node: fx.Node) -> bool:
    """Whether `node` computes exactly one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_mutable(node: fx.Node) -> bool:
    """Whether `node` writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def memory(node: fx.Node) -> Memory:
    """Which memory a value lies in: views of one tensor share it."""
    return _memory(node, int(value(node).untyped_storage()._cdata))


def _memory(node: fx.Node, fake: int) -> Memory:
    """Nodes of equal blocks have one fake value, and what a block is given may have that of what it returns."""
    while True:
        shared, name = node.meta.get(COPY, (None, ""))
        if fake in _storages_of(shared):
            return fake, name
        source = next((one for one in node.all_input_nodes if fake in _storages(one)), None)
        if source is None:
            return fake, ""
        node = source


def share(node: fx.Node, name: str) -> None:
    """Says that the fake value of `node` is another's, too; here it lies in memory called `name`."""
    node.meta[COPY] = (node.meta["val"], name)


def expression(size: Any) -> Any:
    """A size as a symbolic expression, which compares without adding a guard; a number as it is."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def memories(node: fx.Node) -> set[Memory]:
    """The same of all tensors that a node computes."""
    return {_memory(node, fake) for fake in _storages(node)}


def _storages(node: fx.Node) -> set[int]:
    return _storages_of(node.meta.get("val"))


def _storages_of(given: Any) -> set[int]:
    if isinstance(given, torch.Tensor):
        return {given.untyped_storage()._cdata}
    leaves = pytree.tree_leaves(given) if isinstance(given, tuple | list | dict) else ()
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode, and so the shape environment, that `graph` was captured under."""
    for node in graph.nodes:
        if isinstance(fake := node.meta.get("val"), FakeTensor):
            return fake.fake_mode
    raise ValueError("a graph without a single tensor has no fake mode")


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of `graph`, whose nodes have meta of their own, and each node's copy."""
    new = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph, known))
    return new, known


def flat(root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> fx.GraphModule:
    """`graph` over the tensors of `root`; its Python is written when it is run, as passes change it before."""
    return _LazyGraphModule(root, graph, class_name)


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made `node`, '' where none is known."""
    stack = node.meta.get(STACK)
    path = str(list(stack.values())[-1][0]).partition("@")[0] if stack else ""
    return "" if path == NOWHERE else path


def own_name(tensor: str, module: str, aliases: Mapping[str, list[str]]) -> str:
    """Of a tied tensor's names, the one that belongs to the module at hand."""
    return next((name for name in aliases.get(tensor, []) if name.rpartition(".")[0] == module), tensor)


def block_of(node: fx.Node, blocks: Container[str]) -> str | None:
    """Which of `blocks`, paths of modules, computes `node`: of several that lie in one another, the outermost."""
    paths = (str(path).partition("@")[0] for path, _ in (node.meta.get(STACK) or {}).values())
    return next((path for path in paths if path in blocks), None)


def call_of(node: fx.Node, block: str) -> str | None:
    """Which call of the module at `block` computes `node`, where one runs more than once: the same word for each."""
    stack = (node.meta.get(STACK) or {}).items()
    return next((str(call) for call, (path, _) in stack if str(path).partition("@")[0] == block), None)


def get_attribute(root: nn.Module, path: str) -> Any:
    """`root.a.b.c` for the dotted path `a.b.c`."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def set_tensor(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Registers `tensor` as parameter or buffer at a dotted path, making the empty modules on the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = cast(nn.Module, root._modules[part])
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root._parameters.pop(leaf, None)
        root.register_buffer(leaf, tensor)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, a tied one under each of its names."""
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def aliases_of(values: Mapping[str, torch.Tensor | nn.Module]) -> nn.Module:
    """A module with frozen parameters over the same memory as `values`, by full name: tied ones stay one object."""
    root = nn.Module()
    seen: dict[int, torch.Tensor] = {}
    for name, there in values.items():
        if isinstance(there, nn.Module):  # the body of a higher-order operator
            root.add_module(name, there)
        else:
            set_tensor(root, name, alias_of(there, seen))
    return root


def alias_of(tensor: torch.Tensor, seen: dict[int, torch.Tensor]) -> torch.Tensor:
    """A frozen tensor over the same memory, one for each that there is."""
    if id(tensor) not in seen:
        detached = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        seen[id(tensor)] = nn.Parameter(detached, requires_grad=False) if is_parameter else detached
    return seen[id(tensor)]


def keep_unread(root: nn.Module, made: nn.Module) -> None:
    """Gives `made`, a GraphModule on `root`, the tensors of `root` that no node reads and that it therefore left out.

    Such as the start that a method took out of a weight: it is saved, and needed to take it out again.
    """
    known = tensors(made)
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if name not in known:
            set_tensor(made, name, tensor)


def attribute_node(graph: fx.Graph, root: nn.Module, path: str) -> fx.Node:
    """The one `get_attr` node of `path`, made at the top of the graph on first use."""
    for node in graph.find_nodes(op="get_attr", target=path):
        return cast(fx.Node, node)
    first = next(iter(graph.find_nodes(op="placeholder")))
    with graph.inserting_before(first):
        made = graph.create_node("get_attr", path)
    tensor = get_attribute(root, path)
    mode = fake_mode(graph)
    known = vars(mode).setdefault(FOUND, {})
    key = (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    if key in known:
        made.meta["val"] = known[key]
        share(made, path)
    else:
        unread = isinstance(tensor, FakeTensor)
        made.meta["val"] = known[key] = tensor if unread else mode.from_tensor(tensor, static_shapes=True)
    return made


def compute(node: fx.Node) -> None:
    """Gives `node` the fake value that `computed` finds; nodes of equal blocks get one, found once."""
    known = vars(fake_mode(node.graph)).setdefault(FOUND, {})
    node.meta.pop(COPY, None)
    if (key := asked(node)) not in known:
        node.meta["val"] = computed(node)
        known[key] = [given.meta["val"] for given in node.all_input_nodes], node.meta["val"]
        return
    node.meta["val"] = known[key][1]
    if not any(_storages(node) & _storages(given) for given in node.all_input_nodes):  # else it lies where that does
        share(node, f"{node.name} {next(_names)}")


def asked(node: fx.Node) -> tuple[Any, str]:
    """What a node computes of which fake values: equal for nodes that compute the same, while these values are held."""
    return node.target, str(fx.map_arg((node.args, node.kwargs), cast(Any, _Asked)))


class _Asked:
    """An operand, as it is written down to be compared with others."""

    def __init__(self, node: fx.Node) -> None:
        self.value = node.meta["val"]

    def __repr__(self) -> str:
        tensors = isinstance(self.value, torch.Tensor | list | tuple)
        return f"<{id(self.value)}>" if tensors else str(expression(self.value))


_names = count()


def computed(node: fx.Node) -> Any:
    """The fake value of `node` from those of its inputs, whatever its own says; sizes stay symbols.

    A guard that the shape environment learnt here could fix the batch or the length for good: none is kept. A size that
    the data alone tells gets a new symbol, which the next trace is not to look for among what it returns.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
    mode = fake_mode(node.graph)
    assert callable(node.target)
    assert mode.shape_env is not None
    sizes = mode.shape_env
    with (
        mode,
        sizes.suppress_guards(),
        sizes.ignore_fresh_unbacked_symbols(),
        enable_python_dispatcher(),
        torch.no_grad(),
    ):
        return node.target(*args, **kwargs)


def elsewhere(graph: fx.Graph, fakes: Any) -> Any:
    """Fake values like `fakes`, of tensors that are no views, in memory of their own."""
    mode = fake_mode(graph)
    assert mode.shape_env is not None
    with mode, mode.shape_env.suppress_guards():
        return pytree.tree_map_only(
            torch.Tensor,
            lambda fake: torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device),
            fakes,
        )


def moved(node: fx.Node, before: fx.Node, where: Memory) -> None:
    """Says that `node` lies in memory of its own, whose value is as that of `before`, which lies in `where`.

    So do its views behind it. Where their values are laid out as they were, these stand for the new ones: then a loop
    that writes into a tensor part by part, each time read by views, does not have them all computed again each time.
    """
    if described(node) == described(before):
        node.meta["val"] = before.meta["val"]
        share(node, f"{node.name} {next(_names)}")
        return
    touched, after = {node}, False
    for other in node.graph.nodes:
        if after and not touched.isdisjoint(other.all_input_nodes) and where in memories(other):
            other.meta["val"] = computed(other)
            touched.add(other)
        after = after or other is node


def described(node: fx.Node) -> tuple[Any, ...]:
    """What there is to a tensor but its memory, in a form that compares without adding a guard."""
    fake = value(node)
    return (
        fake.dtype,
        fake.device,
        [expression(size) for size in fake.shape],
        [expression(size) for size in fake.stride()],
        expression(fake.storage_offset()),
    )


def trace(function: Callable[..., torch.Tensor], *fakes: torch.Tensor) -> fx.Graph:
    """Traces plain PyTorch on fake values to an ATen graph whose placeholders are the arguments, in order.

    What the function makes of nothing, such as `arange`, is as fake as they are.
    Nodes that were copied from one template have one fake value, which tracing would take for one argument.
    """
    distinct = [fake if id(fake) not in map(id, fakes[:place]) else fake.detach() for place, fake in enumerate(fakes)]
    modes = (fake.fake_mode for fake in distinct if isinstance(fake, FakeTensor))
    mode: AbstractContextManager[Any] = next(modes, nullcontext())
    with mode:
        module = make_fx(function, pre_dispatch=True)(*distinct)
    module.graph.eliminate_dead_code()
    return module.graph


def splice(
    graph: fx.Graph,
    template: fx.Graph,
    args: Sequence[fx.Node],
    after: fx.Node,
    stamp: Provenance,
    inside: fx.Node | None = None,
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Copies `template`'s body behind `after`, with `args` for its placeholders.

    Returns the node that computes its result and all nodes that were made. The copies inherit the module
    stack of `inside` (else of `after`), so that they are drawn in, and folded into, the block they serve.
    """
    known = dict(zip(template.find_nodes(op="placeholder"), args, strict=True))
    end = after.next
    with graph.inserting_before(end):
        result = graph.graph_copy(template, known)
    made = tuple(between(after, end))
    for node in made:
        node.meta[PROVENANCE] = stamp
        node.meta[STACK] = (inside or after).meta.get(STACK)
        node.meta.pop("stack_trace", None)
    for node in pytree.tree_leaves(result):
        if node in made:  # what another copy of the template has made lies somewhere else
            compute(node)
    return cast(fx.Node, result), made


def between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes strictly between two nodes of one graph, in order."""
    node = start.next
    while node is not end:
        yield node
        node = node.next


def drop_unread(graph: fx.Graph) -> None:
    """Erases every call that no output depends on, random ones, too; a write counts for all views of what it writes."""
    live: set[fx.Node] = set()
    read: set[Memory] = set()  # memory that something behind reads
    for node in reversed(graph.nodes):
        writes = is_mutable(node) and any(is_tensor(source) and memory(source) in read for source in node.args[:1])
        if node.op == "output" or writes or any(user in live for user in node.users):
            live.add(node)
            read |= {memory(source) for source in node.all_input_nodes if is_tensor(source)}
    for node in reversed(graph.nodes):
        if node not in live and node.op != "placeholder":
            graph.erase_node(node)


def users_except(node: fx.Node, excluded: Iterable[fx.Node]) -> list[fx.Node]:
    """The users of `node` that are not among `excluded`, in no particular order."""
    skip = set(excluded)
    return [user for user in node.users if user not in skip]


def redirect(old: fx.Node, new: fx.Node, keep: Iterable[fx.Node] = ()) -> None:
    """Makes every user of `old` read `new`, but for the nodes in `keep` (those that compute `new`)."""
    for user in users_except(old, keep):
        user.replace_input_with(old, new)


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of `node` that are tensors computed in the graph (sizes are left out)."""
    return (argument for argument in node.all_input_nodes if is_tensor(argument))
