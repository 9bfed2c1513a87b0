"""Products with frozen weights whose outputs have a trained factor each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import Pattern, either, mul, read_elsewhere, value
from peftc.protocol.branches import MOST, frozen
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten


def _scaled(base: Pattern) -> Pattern:
    """`base` times one vector, or several: those of the slices of one weight."""
    chains = [mul(value("length0"), base)]
    for which in range(1, MOST):
        chains.append(mul(value(f"length{which}"), chains[-1]))
    return either(*reversed(chains))


@fusion
class ScaledLinear(Fusion):
    """y = l * (W x + b) in one operation that keeps y, and no product beside it.

    The gradient of l comes from y divided by l: an entry that is 0 is multiplied as 2^-63.
    """

    name = "scaled_linear"
    rank = 3
    pattern = _scaled(frozen())

    def check(self, match: Match, editor: Editor) -> Miss | None:
        weight, bias, lengths = match["weight"], match["bias"], _lengths(match)
        if fake(weight).dim() != 2 or (bias is not None and fake(bias).dim() != 1):
            return Miss(match.root, f"{weight.name} is no matrix, or its bias no vector", (weight,))
        rows = fake(weight).shape[match["transposed"] is not None]
        for length in lengths:
            if fake(length).dim() != 1 or fake(length).shape[0] != rows:
                return Miss(match.root, f"{length.name} has no entry for each row", (length,))
        if editor.learns(weight):
            return Miss(match.root, f"{weight.name} learns, too", (weight,))
        if (other := _other_reader(match)) is not None:  # q, k and v of VeRA multiply x by one matrix, once
            return Miss(match.root, f"the weight is read by {other.name}, too", (weight, other))
        if not any(map(editor.learns, lengths)):
            return Miss(match.root, f"{lengths[0].name} does not learn", (lengths[0],))
        if fake(match.root).dtype == torch.float16:
            return Miss(match.root, "y of float16 has too few digits to be divided by a small factor")
        if fake(match.root).dtype != fake(match["x"]).dtype:
            return Miss(match.root, f"the product is scaled in {str(fake(match.root).dtype).removeprefix('torch.')}")
        return read_elsewhere(match, [match["transposition"]] if match["transposition"] else [])

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        length, *others = _lengths(match)
        for other in others:
            length = editor.emit(match, match.root, aten.mul.Tensor, length, other)
        arguments = match["x"], match["weight"], match["bias"], length, match["transposed"] is not None
        return [editor.emit(match, match.root, torch.ops.peftc.scaled_linear.default, *arguments)]


def _other_reader(match: Match) -> fx.Node | None:
    """What reads the weight, or the tensor that it is made of, for something else."""
    path = [match["weight"]]
    while path[-1].op == "call_function" and path[-1].all_input_nodes:
        path.append(path[-1].all_input_nodes[0])
    same = match.root.graph.find_nodes(op="get_attr", target=path[-1].target)
    own = {*match.nodes, *path}
    return next((user for node in (*same, *path) for user in node.users if user not in own), None)


def _lengths(match: Match) -> list[fx.Node]:
    return [match[f"length{which}"] for which in range(MOST) if match[f"length{which}"] is not None]
