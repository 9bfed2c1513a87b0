"""Blocks that one statement names in one stack: a chain, each of whose blocks knows its neighbours."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TypeVar, cast

from peftc.protocol.site import Block, Site

S = TypeVar("S", bound=Site)


def linked(sites: list[S]) -> list[S]:
    """The sites of one statement, with each block told its neighbours in its chain; other sites as they are."""
    chains: dict[str, list[Block]] = defaultdict(list)
    for site in sites:
        if isinstance(site, Block):
            chains[site.container].append(site)
    known: dict[str, Block] = {}
    # A chain stands behind the one it reads, which so is linked when its turn comes.
    for container in sorted(chains, key=lambda name: chains[name][0].source is not None):
        before: Block | None = None
        for block, after in zip(chains[container], [*chains[container][1:], None], strict=True):
            memory = chains[block.source][-1] if block.reading and block.source in chains else None
            feeds = any(other.reading and other.source == container for chain in chains.values() for other in chain)
            before = known[block.name] = replace(block, before=before, after=after, memory=memory, feeds=feeds)
    return [cast(S, known.get(site.name, site)) for site in sites]
