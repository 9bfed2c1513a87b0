"""A combinator at an attention: what it was, what its method makes of it, and the combinator's mix of the two.

The attention stands twice in the graph, once as it was and once with what the inner method put there.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from peftc.attend import attend
from peftc.combinator import INNER, Combinator
from peftc.ir import PROVENANCE, Provenance, attribute_node, splice, trace, users_except, value
from peftc.planning import Binding
from peftc.positions import Rooms
from peftc.rows import path_between
from peftc.site import Attention, Use


def attend_mixed(module: fx.GraphModule, binding: Binding, rooms: Rooms, pass_name: str) -> None:
    """Lets the inner method act on the attention, and replaces the result by `mix(site, x, y, changed, **state)`."""
    site, method = binding.site, binding.method
    assert isinstance(method, Combinator)
    assert isinstance(site, Attention)
    assert isinstance(site.entry, Use)
    assert site.pattern is not None
    stamp = Provenance(pass_name, site.name, binding.span)
    out = site.pattern.out
    readers = users_except(out, [])
    places = [reader.all_input_nodes.index(out) for reader in readers]
    plain = _copied(site, stamp)
    inner = replace(binding, method=method.method, path=f"{binding.path}.{INNER[:-1]}", shared={})
    attend(module, inner, rooms, pass_name)
    changed = readers[0].all_input_nodes[places[0]]
    own = {name: full for name, full in binding.names.items() if not name.startswith(INNER)}
    operands = [attribute_node(module.graph, module, full) for full in own.values()]

    def function(x: Tensor, y: Tensor, changed: Tensor, *given: Tensor) -> Tensor:
        return method.mix(site, x, y, changed, **dict(zip(own, given, strict=True)))

    args = [site.entry.x, plain, changed, *operands]
    result, _ = splice(module.graph, trace(function, *map(value, args)), args, max(plain, changed), stamp, out)
    for reader in readers:
        reader.replace_input_with(changed, result)


def _copied(site: Attention, stamp: Provenance) -> fx.Node:
    """The attention's result once more, from the same operands."""
    pattern = site.pattern
    assert pattern is not None
    softmax = pattern.softmax
    nodes = [pattern.out] if softmax is None else [softmax, *path_between(softmax, pattern.out)]
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(nodes):
        with node.graph.inserting_after(node):
            copies[node] = node.graph.node_copy(node, lambda argument: copies.get(argument, argument))
        copies[node].meta = {**node.meta, PROVENANCE: stamp}
    return copies[pattern.out]
