"""Rotary positions, as models write them out."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, anything, mul, op, read_elsewhere, several, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_first = op(aten.slice.Tensor, value("x"), anything("dim0"), anything("start0"), anything("end0"))
_second = op(aten.slice.Tensor, value("x"), anything("dim1"), anything("start1"), anything("end1"))
_across = op(aten.cat.default, several(op(aten.neg.default, _second), _first), anything("dim"))


@fusion
class Rotary(Fusion):
    """x cos + [-x₂, x₁] sin as one operation that keeps cos and sin alone; of a block's queries and keys together."""

    name = "rotary"
    pattern = add(mul(value("x"), value("cosine")), mul(_across, value("sine")))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        x, cosine, sine = match["x"], match["cosine"], match["sine"]
        given = fake(x)
        width, last = given.shape[-1], (-1, given.dim() - 1)
        if any(match[name] not in last for name in ("dim", "dim0", "dim1")):
            return Miss(match.root, f"{x.name} is not turned along its last dimension", (x,))
        half = width // 2
        ends = isinstance(match["end1"], int) and match["end1"] >= width
        if width % 2 or (match["start0"], match["end0"], match["start1"]) != (0, half, half) or not ends:
            return Miss(match.root, f"what is turned of {x.name} is not its two halves", (x,))
        for angle in (cosine, sine):
            if editor.learns(angle):
                return Miss(match.root, f"{angle.name} learns", (angle,))
            if fake(angle).dtype != given.dtype or fake(angle).shape[-1] != width:
                return Miss(match.root, f"{angle.name} is no {given.dtype} for each number of a head", (angle,))
        if str(fake(match.root).shape) != str(given.shape):
            return Miss(match.root, f"{cosine.name} makes more of {x.name} than it is", (cosine,))
        return read_elsewhere(match)

    def group(self, match: Match, editor: Editor) -> Hashable:
        return match["cosine"], match["sine"], editor.block(match.root), fake(match["x"]).dtype

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        made: list[fx.Node] = []
        for some in _apart(matches):
            first = some[0]
            for match in some:
                editor.hoist(match["x"], first.root)
            xs = [match["x"] for match in some]
            both = editor.emit(first, first.root, torch.ops.peftc.rotary.default, xs, first["cosine"], first["sine"])
            made += [editor.emit(m, first.root, operator.getitem, both, place) for place, m in enumerate(some)]
        return made


def _apart(matches: Sequence[Match]) -> Iterator[list[Match]]:
    """In runs of which none is computed from another."""
    run: list[Match] = []
    for match in matches:
        if run and _reads(match["x"], run):
            yield run
            run = []
        run.append(match)
    yield run


def _reads(node: fx.Node, before: Sequence[Match]) -> bool:
    """Whether `node` is computed from one of the roots `before`."""
    roots, first = {match.root for match in before}, before[0].root
    seen, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        if here in roots:
            return True
        fresh = {source for source in here.all_input_nodes if not source < first} - seen
        seen |= fresh
        waiting += fresh
    return False
