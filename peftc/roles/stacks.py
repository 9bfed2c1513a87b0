"""The repeated blocks of a model: the children of an outermost container that are all of one kind; chains of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from peftc.protocol.site import Block, Site

S = TypeVar("S", bound=Site)


@dataclass(frozen=True, slots=True)
class BlockPath:
    """One block: `path` of its module, `stack` of the container, `layer` its place there."""

    path: str
    stack: str
    layer: int
    role: str | None = None

    def named(self, role: str | None) -> BlockPath:
        """The same block, of an encoder or a decoder."""
        return replace(self, role=role)


def find_blocks(model: nn.Module) -> list[BlockPath]:
    """Blocks in module order. A container of leaves (`Sequential(Linear, Linear)`) is not a stack of blocks."""
    found: list[BlockPath] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _inside(path, found):
            continue
        children = list(module.named_children())
        classes = {type(child) for _, child in children}
        alike = len(classes) == 1 or (
            isinstance(module, nn.ModuleList)
            and _of_one_kind(classes)
            and all(any(isinstance(part, nn.Linear) for part in child.modules()) for child in module)
        )
        if alike and all(any(True for _ in child.children()) for _, child in children):
            prefix = f"{path}." if path else ""
            found += [BlockPath(prefix + name, path, index) for index, (name, _) in enumerate(children)]
    return found


def _of_one_kind(classes: set[type[nn.Module]]) -> bool:
    """Whether classes come of one that is a layer's, as those of hybrids do: attention in this one, a state in that."""
    common = set.intersection(*(set(each.__mro__) for each in classes)) if classes else set()
    return any(issubclass(one, nn.Module) and not issubclass(PreTrainedModel, one) for one in common) and not any(
        issubclass(each, PreTrainedModel) for each in classes
    )


def _inside(path: str, blocks: list[BlockPath]) -> bool:
    return any(path == block.path or path.startswith(f"{block.path}.") for block in blocks)


def linked(sites: list[S]) -> list[S]:
    """The sites of one statement, with each block told its neighbours in its chain; other sites as they are.

    A chain is what one statement names in one stack.
    """
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


def name_stacks(blocks: list[BlockPath], decoders: set[str]) -> list[BlockPath]:
    """With two stacks, the one with cross attention is the decoder; with one, there is nothing to name."""
    stacks = {block.stack for block in blocks}
    if len(stacks) != 2 or not decoders:
        return [block.named(None) for block in blocks]
    return [block.named("decoder" if block.stack in decoders else "encoder") for block in blocks]


def placed(site: Site, blocks: list[BlockPath]) -> Site:
    """The site with its layer, stack and block filled in, from where its parameters live."""
    owner = site.parameters[0] if site.parameters else site.name
    for block in blocks:
        if owner.startswith(f"{block.path}.") or owner == block.path:
            return replace(site, layer=block.layer, stack=block.role, block=block.path)
    return site
