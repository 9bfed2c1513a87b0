"""Layers in groups: how many of a stack's layers each group of `group G1, …, Gn = spindle(layers)` gets.

Chen et al. 2023, "Parameter-Efficient Fine-Tuning Design Spaces" (arXiv:2301.01821), whose S4 assigns methods to four
groups. The paper gives the groupings by their inequalities alone; the numbers here are the weights of each docstring,
shared out in whole layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from peftc import language as ast

Grouping = Callable[[int, int], tuple[int, ...]]


def increasing(layers: int, groups: int) -> tuple[int, ...]:
    """N_i <= N_{i+1}: as 1 : 2 : 3 : …, so that the last groups hold most layers."""
    return _shared_out(layers, range(1, groups + 1))


def uniform(layers: int, groups: int) -> tuple[int, ...]:
    """N_i = N_{i+1}: as 1 : 1 : …; what is left over goes to the first groups."""
    return _shared_out(layers, [1] * groups)


def decreasing(layers: int, groups: int) -> tuple[int, ...]:
    """N_i >= N_{i+1}: as … : 3 : 2 : 1, so that the first groups hold most layers."""
    return increasing(layers, groups)[::-1]


def spindle(layers: int, groups: int) -> tuple[int, ...]:
    """N_1 <= N_2 = N_3 >= N_4: as 1 : 2 : … : 2 : 1, so that the groups in the middle hold most layers."""
    return _shared_out(layers, [1 + min(place, groups - 1 - place) for place in range(groups)])


def bottleneck(layers: int, groups: int) -> tuple[int, ...]:
    """N_1 >= N_2 = N_3 <= N_4: as 2 : 1 : … : 1 : 2, so that the groups at both ends hold most layers."""
    return _shared_out(layers, [1 + max(place, groups - 1 - place) - groups // 2 for place in range(groups)])


def _shared_out(layers: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`layers` in proportion to `weights`, at least one each; a larger weight never gets fewer.

    By Sainte-Laguë's highest averages: after one each, every layer goes where weight / (layers + 1/2) is largest; of
    equals to the heavier group, then to the earlier one, so that a pair of mirrored groups is served together.
    """
    sizes = [1] * len(weights)
    for _ in range(layers - len(weights)):  # equal quotients are equal floats: division rounds correctly
        sizes[max(range(len(weights)), key=lambda i: (weights[i] / (2 * sizes[i] + 1), weights[i], -i))] += 1
    return tuple(sizes)


GROUPINGS: dict[str, Grouping] = {
    grouping.__name__: grouping for grouping in (increasing, uniform, decreasing, spindle, bottleneck)
}


@dataclass(frozen=True)
class Group:
    """One name of a `group` statement: the `index`-th of `count` groups of every stack's layers."""

    name: ast.Name
    grouping: str
    index: int
    count: int

    def of(self, blocks: Sequence[str]) -> Sequence[str]:
        """The group's share of one stack's blocks, of which there are at least `count`."""
        sizes = GROUPINGS[self.grouping](len(blocks), self.count)
        start, stop = list(pairwise(accumulate(sizes, initial=0)))[self.index]
        return blocks[start:stop]


@dataclass(frozen=True)
class InGroup(ast.Filter):
    """`in G1` with the name looked up."""

    group: Group
