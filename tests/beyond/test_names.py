"""Names that are no paths, labels that say another place than a module has, buffers and layers with several owners."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftc
from dense import differ, shaken


class Labelled(nn.Module):
    """A feed-forward layer that calls itself something else, and reads a mask that others have, too."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.mask = nn.Buffer(mask)

    def __repr__(self) -> str:
        return "stack.9.other"

    def _get_name(self) -> str:
        return "stack.9.other"

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.down(torch.relu(self.up(x * self.mask))))


class Elsewhere(nn.Sequential):
    """A container with a label."""

    def __repr__(self) -> str:
        return "elsewhere"

    def _get_name(self) -> str:
        return "elsewhere"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mask = torch.rand(6)
        self.stack = Elsewhere(Labelled(mask), Labelled(mask))
        self.head = nn.Linear(6, 3)
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.stack(x) * self.mask))


class Odd(nn.Module):
    """Keys with other letters than Python's names have, a layer with two names, a buffer with three."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({key: nn.Linear(6, 6) for key in ("in-proj", "a b", "weight", "0")})
        self.register_parameter("w-1", nn.Parameter(torch.rand(6, 6)))
        self.shared = self.again = nn.Linear(6, 6)
        self.scale = self.shared.scale = self.parts["0"].scale = nn.Buffer(torch.rand(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = torch.tanh(part(x))
        x = x * self.scale + x @ getattr(self, "w-1").T
        scaled: Tensor = self.shared(x) * self.parts["0"].scale
        return torch.as_tensor(self.head(self.again(scaled) + self.shared.scale))


NAMES = {
    Stack: ["head", "stack.0.down", "stack.0.up", "stack.1.down", "stack.1.up"],
    Odd: ["head", "parts.0", "parts.a b", "parts.in-proj", "parts.weight", "shared", "w-1"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_site_is_called_as_its_weight_lies(kind: type[nn.Module], tmp_path: Path) -> None:
    base, x = kind(), torch.randn(2, 6)
    compiled = peftc.compile(base, "apply lora(r=2) to linear", example=x)
    assert sorted(binding.site.name for binding in compiled.plan.bindings) == NAMES[kind]
    assert torch.equal(compiled(x), base(x))
    shaken(compiled)
    moved = compiled(x)
    assert differ([compiled.merge()(x)], [moved]) < 1e-5
    compiled.save(tmp_path / "saved")
    assert torch.equal(peftc.load(tmp_path / "saved", base)(x), moved)


def test_a_buffer_of_several_modules_stays_one() -> None:
    base, x = Stack(), torch.randn(2, 6)
    compiled = peftc.compile(base, "apply lora(r=2) to linear", example=x)
    base.mask.mul_(3)
    assert torch.equal(compiled(x), base(x))
