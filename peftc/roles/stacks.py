"""The repeated blocks of a model: the children of an outermost container that are all of one class."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn


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
        if len(classes) == 1 and all(any(True for _ in child.children()) for _, child in children):
            prefix = f"{path}." if path else ""
            found += [BlockPath(prefix + name, path, index) for index, (name, _) in enumerate(children)]
    return found


def _inside(path: str, blocks: list[BlockPath]) -> bool:
    return any(path == block.path or path.startswith(f"{block.path}.") for block in blocks)
