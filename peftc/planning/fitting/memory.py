"""`fit memory(batch=4, seq=4096) <= 24 GiB`: which blocks are computed again, and then which weights are packed.

Computing a block again costs time alone, and packing a weight also precision: so weights are packed only where all
blocks computed again are not enough, as few numbers as that takes; and then as little is computed again as that allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.planning.cost import Piece, Step
from peftc.planning.errors import CannotFit
from peftc.planning.fitting import written
from peftc.planning.fitting.knapsack import Thing, cheapest
from peftc.planning.fitting.work import forward_operations, step_operations
from peftc.planning.memory import Kept, Memory, formatted_bytes
from peftc.planning.packed_weight import PackedWeight
from peftc.planning.packing import packed_weights
from peftc.planning.plan import Fitted, Plan
from peftc.protocol.site import Block, Projection
from peftc.protocol.storage import Storage
from peftc.spec.budgets import Fit
from peftc.spec.calls import Calls
from peftc.spec.resolve import Packing

PlanWith = Callable[[tuple[str, ...]], Plan]
ROUNDS = 8  # of choosing, where what blocks keep is shared


@dataclass(frozen=True)
class Choice:
    """What is chosen, and the plan with it; `storage` as the spec writes it, where `packed` has something."""

    blocks: tuple[Block, ...]
    packed: tuple[PackedWeight, ...]
    lines: tuple[str, ...]
    plan: Plan
    memory: Memory


class MemoryFit:
    """Solves one `fit memory`.

    Args:
        plan: of the spec without limits.
        fit: the statement.
        plan_with: the plan with further statements, without limits.
    """

    def __init__(self, plan: Plan, fit: Fit, plan_with: PlanWith) -> None:
        self.plan, self.fit, self.plan_with = plan, fit, plan_with
        self.batch, self.seq = fit.budget.arguments.get("batch", 1), fit.budget.arguments.get("seq", 512)
        self.before = plan.memory(self.batch, self.seq)
        limit = fit.budget.limit.scaled
        self.allowed = math.floor(limit) if fit.budget.op == "<=" else math.ceil(limit) - 1
        self.blocks = [site for site in plan.sites if isinstance(site, Block)]
        graph = plan.captured.module.graph
        self.known = plan.sizes(self.batch, self.seq)
        self.step = Step(graph, plan.sites.blocks, plan.bindings, plan.trained, plan.recomputed)
        self.free = [block for block in self.blocks if block.path not in plan.recomputed] if fit.checkpoint else []

    def solve(self) -> Fitted:
        """What is chosen.

        Raises:
            PeftcError: `cannot-fit`.
        """
        statement = " ".join(self.fit.span.text.split())
        if self.before.total <= self.allowed:
            comes_to = f"{formatted_bytes(self.before.total)} of {formatted_bytes(self.allowed)}"
            return Fitted(statement, self.fit.span, (), comes_to, "nothing: it fits as it is")
        choice = self._chosen()
        comes_to = (
            f"{formatted_bytes(choice.memory.total)} of {formatted_bytes(self.allowed)}, "
            f"{formatted_bytes(self.before.total)} without"
        )
        return Fitted(statement, self.fit.span, choice.lines, comes_to, self._costs(choice))

    def _chosen(self) -> Choice:
        if (found := self._fewest_blocks(())) is not None:
            return found
        tried = [self._all_blocks(())]
        for storage in self.fit.storages:
            if (found := self._fewest_weights(storage, tried[0])) is not None:
                return found
            tried.append(self._all_blocks(tuple(self._packable(storage)), storage))
        raise PeftcError(self._impossible(min(tried, key=lambda choice: choice.memory.total)))

    # Blocks

    def _fewest_blocks(self, packed: tuple[PackedWeight, ...], storage: ast.Call | None = None) -> Choice | None:
        """The blocks that cost least beside these packed weights; None where all are not enough."""
        savings, work = self._savings, self._work
        useful = [block for block in self.free if savings[block.path] > 0]
        things = [Thing(savings[block.path], work[block.path]) for block in useful]
        needed = self.before.total - _saved(packed) - self.allowed
        for _ in range(ROUNDS):
            places = cheapest(things, needed) if needed > 0 else []
            if places is None:
                break
            choice = self._choice([useful[place] for place in places], packed, storage)
            if choice.memory.total <= self.allowed:
                return choice
            needed += choice.memory.total - self.allowed  # what two blocks keep is freed by both alone
        everything = self._all_blocks(packed, storage)
        return everything if everything.memory.total <= self.allowed else None

    def _all_blocks(self, packed: tuple[PackedWeight, ...], storage: ast.Call | None = None) -> Choice:
        return self._choice([block for block in self.free if self._savings[block.path] > 0], packed, storage)

    @property
    def _savings(self) -> dict[str, int]:
        """Bytes that each block frees where it alone is computed again."""
        return self._known_of_blocks()[0]

    @property
    def _work(self) -> dict[str, int]:
        """Operations that computing each block again takes."""
        return self._known_of_blocks()[1]

    def _known_of_blocks(self) -> tuple[dict[str, int], dict[str, int]]:
        if "_blocks" not in vars(self):
            size = _Sizes(self.known)
            pieces = {
                path: self.step.piece(path, again=path in self.plan.recomputed)
                for path in {**self.step.members, **self.step.by_block}
            }
            every = Counter(where for piece in pieces.values() for where in _shared(piece))
            factor = 2 if self.plan.consistency else 1
            savings, work = {}, {}
            for block in self.free:
                again, whole = self.step.piece(block.path, again=True), pieces[block.path]
                freed = {where: kept for where, kept in _shared(whole).items() if every[where] == 1}
                taken = {
                    where: kept
                    for where, kept in _shared(again).items()
                    if every[where] - (where in _shared(whole)) == 0
                }
                difference = size(freed.values()) + size(whole.beside) - size(taken.values()) - size(again.beside)
                savings[block.path] = factor * difference
                work[block.path] = factor * forward_operations(again.again, self.known)
            self.__dict__["_blocks"] = savings, work
        found: tuple[dict[str, int], dict[str, int]] = self.__dict__["_blocks"]
        return found

    # Weights

    def _fewest_weights(self, storage: ast.Call, least: Choice) -> Choice | None:
        """The fewest numbers packed with which all blocks are enough, and then the blocks that cost least."""
        packable = self._packable(storage)
        things = [Thing(_saved([one]), math.prod(one.held)) for one in packable]
        places = cheapest(things, least.memory.total - self.allowed)
        if places is None:
            return None
        return self._fewest_blocks(tuple(packable[place] for place in places), storage)

    def _packable(self, storage: ast.Call) -> list[PackedWeight]:
        """The frozen weights that a storage takes and makes smaller, without heads and embeddings."""
        built = Calls([], {}, {}).build(storage, Storage)
        assert built is not None  # it was when the spec was resolved
        taken = {*self.plan.packed, *self.plan.trained}
        sites = [
            site
            for site in self.plan.sites
            if isinstance(site, Projection) and site.weight not in taken and site.roles.isdisjoint({"head", "embed"})
        ]
        packing = Packing(built, ast.Role(("linear",), span=storage.span), storage.span)
        packed, _refused = packed_weights(self.plan.captured, [(packing, list(sites))], {})
        return [one for one in packed.values() if _saved([one]) > 0]

    # What was chosen

    def _choice(self, blocks: list[Block], packed: tuple[PackedWeight, ...], storage: ast.Call | None) -> Choice:
        lines = []
        if blocks:
            lines.append(f"checkpoint {written.blocks(blocks, self.blocks)}")
        if packed and storage is not None:
            named = {site.weight: site.path if site.is_part else site.name for site in self._projections()}
            chosen = written.names([named[one.weight] for one in packed], named.values())
            lines.append(f"quantize {chosen} with {ast.unparse(storage) if storage.args else storage.name.text}")
        plan = self.plan_with(tuple(lines)) if lines else self.plan
        return Choice(tuple(blocks), packed, tuple(lines), plan, plan.memory(self.batch, self.seq))

    def _projections(self) -> list[Projection]:
        return [site for site in reversed(self.plan.sites.items) if isinstance(site, Projection)]

    def _costs(self, choice: Choice) -> str:
        told = []
        if choice.blocks:
            again = sum(self._work[block.path] for block in choice.blocks)
            every = step_operations(self.plan.captured.module.graph.nodes, self.step.needs, self.known)
            share = again / every if every else 0.0
            told.append(f"{len(choice.blocks)} of {len(self.blocks)} blocks computed again, {share:.1%} more products")
        if choice.packed:
            dense = sum(one.dense_bytes for one in choice.packed)
            packed = formatted_bytes(dense - _saved(choice.packed))
            told.append(f"{len(choice.packed)} weights rounded and unpacked twice a step, {packed} instead of "
                        f"{formatted_bytes(dense)}")  # fmt: skip
        return "; ".join(told)

    def _impossible(self, least: Choice) -> Diagnostic:
        tried = []
        if least.blocks:
            tried.append(f"all {len(least.blocks)} blocks computed again")
        if least.packed:
            tried.append(f"{len(least.packed)} weights packed")
        limit = self.fit.budget.limit
        unit = limit.unit or "B"
        scale = ast.UNITS[limit.unit] if limit.unit else 1
        smallest = math.ceil(least.memory.total / scale * 100) / 100
        advice = []
        if not self.fit.checkpoint and self.blocks:
            advice.append("blocks may be computed again, too: using checkpoint, …")
        if not self.fit.storages:
            advice.append("frozen weights may be packed, too: using checkpoint, nf4")
        quantity = self.fit.budget
        call = f"memory(batch={self.batch}, seq={self.seq})" if quantity.arguments else "memory"
        return CannotFit(
            quantity="memory", least=formatted_bytes(least.memory.total),
            tried=f"with {' and '.join(tried) or 'nothing left to choose'}", op=quantity.op,
            limit=ast.unparse(limit), smallest=f"fit {call} <= {smallest:g} {unit}", advice=tuple(advice),
            breakdown=least.memory.lines(), span=self.fit.span,
        )  # fmt: skip


class _Sizes:
    """Bytes of what is kept; equal shapes are looked at once, since putting sizes in takes long."""

    def __init__(self, known: Mapping[Any, int]) -> None:
        self.known = known
        self.found: dict[Hashable, int] = {}

    def __call__(self, every: Iterable[Kept]) -> int:
        return sum(map(self._one, every))

    def _one(self, kept: Kept) -> int:
        key = kept.size, *(size if isinstance(size, int) else size.node.expr for size in kept.shape)
        if key not in self.found:
            self.found[key] = kept.bytes(self.known)
        return self.found[key]


def _shared(piece: Piece) -> dict[Hashable, Kept]:
    """What other blocks may keep as well, by a name that it has there, too."""
    values: dict[Hashable, Kept] = {(True, *where): kept for where, kept in piece.values.items()}
    return values | {(False, *where): kept for where, kept in piece.replaced.items()}


def _saved(packed: Iterable[PackedWeight]) -> int:
    return sum(one.dense_bytes - one.bytes for one in packed)
