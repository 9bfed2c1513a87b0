"""Blocks of a hybrid are of several classes in one list: they are blocks all the same."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peftc.roles.stacks import find_blocks


class Attending(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


class Remembering(Attending):
    pass


class Filtering(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


def paths(*layers: nn.Module) -> list[str]:
    return [block.path for block in find_blocks(nn.ModuleDict({"layers": nn.ModuleList(layers)}))]


def test_layers_of_one_kind_are_blocks() -> None:
    assert paths(Attending(), Attending()) == ["layers.0", "layers.1"]
    assert paths(Remembering(), Attending(), Remembering()) == ["layers.0", "layers.1", "layers.2"]


def test_modules_of_no_kind_and_filters_are_none() -> None:
    assert paths(Attending(), Other()) == []
    assert paths(Filtering(), Attending()) == []
