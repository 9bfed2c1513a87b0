"""What a training step takes on each of several processes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod

from peftc.planning.memory import Memory, formatted_bytes, step_memory
from peftc.planning.plan import Held, Plan


@dataclass(frozen=True)
class Ranks:
    """Bytes of one training step on each process, and of what is whole there for a time, of a model in parts.

    `gathered`: of the outermost part, whole through a step, and of the two largest blocks: one runs, one is on its way.
    """

    each: tuple[Memory, ...]
    gathered: int

    def lines(self) -> list[str]:
        """A table: one line a process, those that take the same together."""
        head = ("weights", "gradients", "optimizer", "activations", "gathered", "all")
        found = [f"{'rank':<8}" + "".join(f"{word:>13}" for word in head)]
        first = 0
        for memory, group in groupby(self.each):
            last = first + len(list(group)) - 1
            name = str(first) if first == last else f"{first}-{last}"
            sizes = (*memory.to_json().values(), self.gathered, memory.total + self.gathered)
            found.append(f"{name:<8}" + "".join(f"{formatted_bytes(size):>13}" for size in sizes))
            first = last + 1
        return found

    def to_json(self) -> list[dict[str, int]]:
        """One object a process."""
        return [memory.to_json() | {"gathered": self.gathered} for memory in self.each]


def by_rank(plan: Plan, ranks: int, batch: int, seq: int, optimizer: str, *, shard: bool) -> Ranks:
    """The memory of each of `ranks` processes, each with a batch of its own.

    Args:
        plan: of the model.
        ranks: how many processes there are.
        batch: examples in a step of one process.
        seq: tokens in an example.
        optimizer: as of `Plan.memory`.
        shard: in parts, as `peftc.shard` makes them; else each process has the whole.
    """
    whole = plan.memory(batch, seq, optimizer)
    if not shard:
        return Ranks((whole,) * ranks, 0)
    every = list(plan.held())
    each = []
    for rank in range(ranks):
        parts = [(tensor, _part(tensor, rank, ranks)) for tensor in every]
        weights = sum(tensor.size * count for tensor, count in parts)
        learning = [(count, tensor.size) for tensor, count in parts if tensor.learns]
        each.append(step_memory(weights, learning, whole.activations, optimizer))
    within = dict.fromkeys(plan.sites.blocks, 0)
    outermost = 0
    for tensor in every:
        block = next((path for path in plan.sites.blocks if tensor.name.startswith(f"{path}.")), None)
        if tensor.is_buffer:
            continue
        if block is None:
            outermost += tensor.bytes
        else:
            within[block] += tensor.bytes
    return Ranks(tuple(each), outermost + sum(sorted(within.values())[-2:]))


def _part(tensor: Held, rank: int, ranks: int) -> int:
    """How many of its numbers a process has: `torch.chunk` by rows; of a buffer or a single number all."""
    if tensor.is_buffer or not tensor.shape:
        return prod(tensor.shape)
    rows, *rest = tensor.shape
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk)) * prod(rest)
