"""What models of other libraries do in `train()`: dropout, paths that are dropped, batch norms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from dense import LORA, call, differ, loss, outputs, shaken
from foreign import FACTORIES, PACKAGES

KEPT = 0.75


def by_bernoulli(x: Tensor, training: bool) -> Tensor:
    mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(KEPT).div_(KEPT)
    return x * mask if training else x


def by_floor(x: Tensor, training: bool) -> Tensor:
    if not training:
        return x
    return x.div(KEPT) * torch.floor(torch.rand(x.shape[0], 1, 1) + KEPT)


def blocks_of(x: Tensor, training: bool) -> Tensor:
    """A mask that is turned round is no dropped path."""
    return x * (1 - torch.empty_like(x).bernoulli_(KEPT)) if training else x


class Path(nn.Module):
    """A residual connection over a path that is dropped for some rows."""

    def __init__(self, drop: Any) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(6, 6), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.drop(self.inner(x), self.training))


def of_path(drop: Any) -> tuple[nn.Module, peftc.CompiledModule, Tensor]:
    base, x = Path(drop), torch.randn(64, 3, 6)
    compiled = peftc.compile(base, f"apply {LORA} to linear", example=x)
    return base, compiled, x


@pytest.mark.parametrize("drop", [by_bernoulli, by_floor])
def test_a_dropped_path_follows_eval(drop: Any) -> None:
    base, compiled, x = of_path(drop)
    assert torch.equal(compiled.eval()(x), base.eval()(x))


def test_a_path_is_dropped_by_the_same_numbers_as_in_eager_mode() -> None:
    base, compiled, x = of_path(by_bernoulli)
    torch.manual_seed(1)
    expected = base.train()(x)
    torch.manual_seed(1)
    assert torch.equal(compiled.train()(x), expected)


def test_a_path_is_dropped_for_whole_rows_and_scaled_for_others() -> None:
    _, compiled, x = of_path(by_floor)
    shaken(compiled)
    whole = compiled.eval()(x) - x
    ratio = ((compiled.train()(x) - x) / whole).flatten(1)
    kept = ratio[:, 0] > 0.5
    assert 0.5 < float(kept.float().mean()) < 0.95
    torch.testing.assert_close(ratio, (kept / KEPT)[:, None].expand(-1, 18), rtol=1e-3, atol=1e-3)


def test_another_use_of_random_numbers_is_refused() -> None:
    with pytest.raises(peftc.PeftcError, match="stays-random"):
        of_path(blocks_of)


DRAWN = ("encoder", "timm_convnext", "torchvision_convnext", "timm_swin")


@pytest.mark.parametrize("name", DRAWN)
def test_a_step_in_training_draws_what_eager_mode_draws(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    base, given = FACTORIES[name]()
    compiled = peftc.compile(base, f"apply {LORA} to linear", example=given)
    drawn = []
    for seed in range(12):
        torch.manual_seed(seed)
        expected = outputs(call(base.train(), given))
        torch.manual_seed(seed)
        drawn.append(outputs(call(compiled.train(), given)))
        assert differ(drawn[-1], expected) < 1e-6
    assert any(differ(one, drawn[0]) > 1e-6 for one in drawn)


class Normed(nn.Module):
    """A convolution, a batch norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.mark.parametrize("spec", [f"apply {LORA} to head", f"apply {LORA} to head\ntrain norm, conv"])
def test_a_batch_norm_keeps_its_statistics_in_training(spec: str) -> None:
    """Also where its weight and bias learn: it computes as eager mode does with this layer in eval()."""
    base, x = Normed(), torch.randn(4, 3, 9, 9)
    assert base.norm.running_mean is not None
    base.norm.running_mean.uniform_()
    statistics = {name: buffer.clone() for name, buffer in base.named_buffers()}
    compiled = peftc.compile(base, spec, example=x)
    assert "batch norms: these use their running statistics in training" in compiled.report()
    compiled.train()
    base.train()
    base.norm.eval()
    mine, wanted = compiled(x), base(x)
    torch.testing.assert_close(mine, wanted)
    loss([mine]).backward()
    loss([wanted]).backward()
    for name in compiled.plan.trained:
        own = base.get_parameter(name).grad
        torch.testing.assert_close(compiled.get_parameter(name).grad, own, rtol=1e-4, atol=1e-6)
    for model in (base, compiled):
        now = dict(model.named_buffers())
        assert all(torch.equal(now[name], buffer) for name, buffer in statistics.items() if name in now)
