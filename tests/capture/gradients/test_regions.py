"""Regions of a forward without gradients: a compiled model has none there, either."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.capture.gradients.regions import regions_marked


class Cycled(nn.Module):
    """A layer that runs three times; only the last run has gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(2):
                x = torch.tanh(self.layer(x))
        return torch.tanh(self.layer(x))


class Nested(Cycled):
    """On inside off, and off inside that; what is on there comes out with its gradient cut."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            with torch.enable_grad():
                x = self.layer(x)
                with torch.no_grad():
                    scale = x.abs().amax(-1, keepdim=True)
                x = x / scale
            y = x * 2
        return torch.tanh(self.layer(x)) + y


class Decorated(Cycled):
    """A function without gradients of which two parts of a tensor come back."""

    @torch.no_grad()
    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.layer(x).chunk(2, -1)
        return first, second

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.halves(x)
        return cast(Tensor, self.layer(torch.cat([second, first], -1)) * first.mean())


class Written(Cycled):
    """Writes on what has a gradient: that stays what it was before, and no graph says so."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) * 1
        with torch.no_grad():
            x.clamp_(-0.5, 0.5)
        return cast(Tensor, self.layer(x))


class Unchanged(Cycled):
    """What `.to` and `.contiguous` return in a region is the tensor itself, which has its gradient outside."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        with torch.no_grad():
            scale = x.to(x.dtype).contiguous().abs().amax()
            kept = torch.tanh(self.layer(x)).float().contiguous()
        return torch.tanh(self.layer(x)) * scale + cast(Tensor, self.layer(kept))


class Frozen(nn.Module):
    """A part whose forward is decorated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class HasFrozen(Cycled):
    def __init__(self) -> None:
        super().__init__()
        self.part = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + cast(Tensor, self.part(x))


class Switched(Cycled):
    """A decorator that says whether."""

    @torch.set_grad_enabled(False)
    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x) * self.layer(x))


class Inferring(Cycled):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = self.layer(x).abs().amax()
        return cast(Tensor, self.layer(x) / scale.clone())


class Part(Cycled):
    """Writes into a part of what was there before."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 6)
        with torch.no_grad():
            out[:, :3] = self.layer(x)[:, :3]
        return cast(Tensor, out * self.layer(x))


class Blocks(nn.Module):
    """Equal ones, which are traced once."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return cast(Tensor, self.head(x))


@pytest.mark.parametrize("kind", [Cycled, Nested, Decorated, Unchanged, HasFrozen, Switched, Inferring, Written, Part])
def test_gradients_are_those_of_eager_mode(kind: type[Cycled]) -> None:
    torch.manual_seed(0)
    model, x = Blocks(kind), torch.randn(3, 6)
    compiled = peftc.compile(model, "train linear, bias", example=torch.randn(2, 6))
    assert [type(island.skeleton) for island in compiled.plan.captured.islands] == [kind] * 3 * (
        kind in (Written, Part)
    )
    expected, actual = (
        dict(
            zip(
                made.state_dict(),
                torch.autograd.grad(made(x).square().sum(), [*made.parameters()], materialize_grads=True),
                strict=True,
            )
        )
        for made in (model, compiled)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)  # two orders of fp32 sums


def test_what_needs_no_gradient_is_not_detached() -> None:
    class Positions(Cycled):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                turned = torch.arange(x.shape[0], device=x.device)[:, None].float().cos()
            return cast(Tensor, self.layer(x * turned))

    compiled = peftc.compile(Positions(), "train linear", example=torch.randn(2, 6))
    assert not compiled.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default)
    assert compiled(torch.randn(5, 6)).shape == (5, 6)


class Clamped(Cycled):
    """Keeps a weight in its bounds while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.layer.weight.data.clamp_(-1, 1)
        return cast(Tensor, self.layer(x))


def test_a_weight_that_is_written_on_is_refused() -> None:
    with pytest.raises(peftc.PeftcError, match=r"it writes on layer.weight whenever it runs") as caught:
        peftc.compile(Clamped(), "apply lora(r=2) to linear", example=torch.randn(2, 6))
    assert "self.layer.weight.data.clamp_(-1, 1)" in str(caught.value)
    assert "turn that off in the config" in str(caught.value)


class Reading(Cycled):
    """Has no gradient in a weight that it reads besides."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x) / self.layer.weight.data.square().sum())


def test_what_is_read_of_a_weight_without_gradient_has_none() -> None:
    torch.manual_seed(0)
    model, x = Reading(), torch.randn(3, 6)
    compiled = peftc.compile(model, "train linear", example=torch.randn(2, 6))
    (expected,), (actual,) = (
        torch.autograd.grad(made(x).square().sum(), [made.get_parameter("layer.weight")]) for made in (model, compiled)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)  # one product's rounding


def test_a_capture_changes_no_region_of_another_thread() -> None:
    seen: list[bool] = []

    def other() -> None:
        with torch.no_grad():
            seen.append(torch.is_grad_enabled())
        seen.append(torch.is_grad_enabled())

    with regions_marked():
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False, True]
