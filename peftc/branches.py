"""The low-rank branch that methods put beside a product with a frozen weight, as patterns and as what they found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc.fusion import Editor
from peftc.ir import value as fake
from peftc.patterns import Match, Miss, Pattern, add, anything, cast, either, mul, number, op, value

aten = torch.ops.aten

GROUPED = ("transformers.grouped_mm_fallback.default",)
_TRANSPOSED = (aten.transpose.int,)
MOST = 4  # branches beside one product: of q, k and v, and one more


def entering(which: int = 0) -> Pattern:
    """x as a branch reads it: cast to the branch's precision, with dropout or without."""
    x = cast(value("x"))
    return either(op(aten.dropout.default, x, number(f"p{which}"), anything(f"training{which}")), x)


def product(x: Pattern, weight: Pattern, name: str | None = None) -> Pattern:
    """x Wᵀ: one matrix, or one of a stack for each group of rows that `ends` tells apart."""
    swapped = op(_TRANSPOSED, weight, -2, -1)
    return either(op(aten.linear.default, x, weight, name=name), op(GROUPED, x, swapped, value("ends"), name=name))


def branch(which: int = 0) -> Pattern:
    """s B A x, named a, b and scale, with the number of the branch."""
    thin = product(product(entering(which), value(f"a{which}")), value(f"b{which}"), name=f"wide{which}")
    return cast(either(mul(thin, number(f"scale{which}")), thin), f"cast{which}")


def beside(base: Pattern) -> Pattern:
    """`base` with one branch beside it, or several, all of one x."""
    chains = [add(base, branch(0))]
    for which in range(1, MOST):
        chains.append(add(chains[-1], branch(which)))
    return either(*reversed(chains))


@dataclass(frozen=True)
class Branch:
    """One low-rank branch as it was found: A [r, n_in] and B [n_out, r], or a stack of each."""

    a: fx.Node
    b: fx.Node
    scale: float
    p: float
    training: fx.Node | None


def branches(match: Match) -> list[Branch]:
    """Those of one product, in the order in which they were added."""
    return [
        Branch(match[f"a{i}"], match[f"b{i}"], match[f"scale{i}"] or 1.0, match[f"p{i}"] or 0.0, match[f"training{i}"])
        for i in range(MOST)
        if match[f"a{i}"] is not None
    ]


def check_branches(match: Match, editor: Editor, frozen: tuple[fx.Node | None, ...]) -> Miss | None:
    """Why branches beside a frozen product cannot be computed with it, or None."""
    found = branches(match)
    for node in frozen:
        if node is not None and editor.learns(node):
            return _miss(match, f"{node.target if node.op == 'get_attr' else node.name} learns, too", node)
    if not any(editor.learns(one.a) or editor.learns(one.b) for one in found):
        return _miss(match, f"nothing of {found[0].a.name} and {found[0].b.name} learns", found[0].a)
    if len({fake(one.a).dtype for one in found}) > 1:
        return _miss(match, "its branches are of different precisions", *(one.a for one in found))
    if len({(one.p, one.training) for one in found}) > 1:
        return _miss(match, "its branches have different dropouts", *(one.a for one in found))
    if fake(match.root).dtype != fake(match["x"]).dtype:
        return _miss(match, f"the sum is kept in {str(fake(match.root).dtype).removeprefix('torch.')}", match.root)
    return None


def joined(match: Match, editor: Editor, before: fx.Node) -> Branch:
    """All branches beside one product as one, in front of `before`: A stacked, s B side by side."""
    found = branches(match)
    for one in found:
        editor.hoist(one.a, before)
        editor.hoist(one.b, before)
    if len(found) == 1:
        return found[0]
    a = editor.emit(match, before, aten.cat.default, [one.a for one in found], -2)
    scaled = [
        one.b if one.scale == 1 else editor.emit(match, before, aten.mul.Tensor, one.b, one.scale) for one in found
    ]
    b = editor.emit(match, before, aten.cat.default, scaled, -1)
    return Branch(a, b, 1.0, found[0].p, found[0].training)


def _miss(match: Match, reason: str, *culprits: fx.Node) -> Miss:
    return Miss(match.root, reason, culprits)
