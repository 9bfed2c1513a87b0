"""The low-rank branch that methods put beside a product with a frozen weight, as patterns and as what they found."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import (
    Match,
    Miss,
    Pattern,
    add,
    anything,
    cast,
    either,
    mul,
    number,
    op,
    read_elsewhere,
    value,
)
from peftc.protocol.rule import Editor, Fusion

aten = torch.ops.aten

GROUPED = ("transformers.grouped_mm_fallback.default",)
_TRANSPOSED = (aten.transpose.int,)
_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)
_PRODUCTS = (aten.matmul.default, aten.mm.default)
MOST = 4  # branches beside one product: of q, k and v, and one more


def entering(which: int, *, dropped: bool) -> Pattern:
    """x as a branch reads it: cast to the branch's precision, with dropout or without."""
    x = cast(value("x"))
    return op(aten.dropout.default, x, number(f"p{which}"), anything(f"training{which}")) if dropped else x


def product(x: Pattern, weight: Pattern, name: str | None = None) -> Pattern:
    """x Wᵀ: one matrix, or one of a stack for each group of rows that `ends` tells apart."""
    swapped = op(_TRANSPOSED, weight, -2, -1)
    return either(op(aten.linear.default, x, weight, name=name), op(GROUPED, x, swapped, value("ends"), name=name))


def frozen() -> Pattern:
    """W x + bias in the spellings of one layer; the weight may be stored transposed."""
    x, weight, bias = value("x"), value("weight"), value("bias")
    return either(
        op(aten.linear.default, x, weight),
        op(aten.linear.default, x, weight, bias),
        unbiased(),
        op(_PRODUCTS, x, op(_TRANSPOSES, weight, name="transposition")),
        op(aten.addmm.default, bias, x, weight, name="transposed"),
        op(_PRODUCTS, x, weight, name="transposed"),
    )


def unbiased() -> Pattern:
    """W x, made of W x + bias by a method that gives the rows of W other lengths, but not the bias."""
    removed = value("removed")
    return op(aten.sub.Tensor, op(aten.linear.default, value("x"), value("weight"), removed), removed)


def branch(which: int = 0, *, dropped: bool = False) -> Pattern:
    """s B A x, named a, b and scale, with the number of the branch."""
    x = entering(which, dropped=dropped)
    thin = product(product(x, value(f"a{which}")), value(f"b{which}"), name=f"wide{which}")
    return cast(either(mul(thin, number(f"scale{which}")), thin), f"cast{which}")


def beside_one(base: Pattern, which: int = 0) -> Pattern:
    """`base` with a branch beside it; x may itself come out of a dropout, which is then not the branch's."""
    return either(*(add(base, branch(which, dropped=dropped)) for dropped in (False, True)))


def beside(base: Pattern) -> Pattern:
    """`base` with one branch beside it, or several, all of one x."""
    chains = [beside_one(base)]
    for which in range(1, MOST):
        chains.append(beside_one(chains[-1], which))
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


@dataclass(frozen=True)
class Together:
    """What the layers of one group hand to one operation: its arguments, and the node that it is to stand before."""

    here: fx.Node
    x: fx.Node
    weights: list[fx.Node]
    a: list[fx.Node]
    b: list[fx.Node]
    scales: list[float]
    seed: fx.Node | None
    p: float


class BesideFrozen(Fusion):
    """Base of the rules for `beside(frozen())`: layers on one x, in one block and alike, go into one operation."""

    rank = 3

    def check(self, match: Match, editor: Editor) -> Miss | None:
        weight, bias = match["weight"], match["bias"]
        if fake(weight).dim() != 2 or any(fake(one.a).dim() != 2 for one in branches(match)):
            return _miss(match, f"{weight.name} is no matrix", weight)
        if bias is not None and fake(bias).dim() != 1:
            return _miss(match, f"{bias.name} is no vector", bias)
        free = [match["transposition"]] if match["transposition"] else []
        return check_branches(match, editor, (weight,)) or read_elsewhere(match, free)

    def bias(self, match: Match) -> fx.Node | None:
        """The bias that the operation adds."""
        found: fx.Node | None = match["bias"]
        return found

    def group(self, match: Match, editor: Editor) -> Hashable:
        one = branches(match)[0]
        alike = match["transposed"] is None, self.bias(match) is None, one.p, one.training, fake(one.a).dtype
        return match["x"], editor.block(match.root), *alike

    def together(self, matches: Sequence[Match], editor: Editor, *more: str) -> Together:
        """The operands, moved in front of the first layer; `more` names others that have to stand there."""
        here = matches[0].root
        for match in matches:
            for node in (match["weight"], self.bias(match), *(match[name] for name in more)):
                if node is not None:
                    editor.hoist(node, here)
        found = [joined(match, editor, here) for match in matches]
        x, p, training = matches[0]["x"], found[0].p, found[0].training
        seed = editor.emit(matches[0], here, dropout_seed, training, fake(x).device) if p else None
        return Together(
            here, x, [match["weight"] for match in matches], [one.a for one in found], [one.b for one in found],
            [one.scale for one in found], seed, p,
        )  # fmt: skip


def _miss(match: Match, reason: str, *culprits: fx.Node) -> Miss:
    return Miss(match.root, reason, culprits)


def dropout_seed(training: bool, device: torch.device) -> Tensor | None:
    """A seed for the masks of seeded dropout, int64 []; None in `eval()`.

    From the default generator, so that `torch.manual_seed` decides it.

    A function of its own, for a graph to call with `self.training` as it is at run time.
    """
    return torch.randint(2**63 - 1, (), device=device) if training else None
