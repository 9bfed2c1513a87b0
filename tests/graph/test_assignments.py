"""Writes into parts of a tensor: a compiled model computes what the model does, whoever reads the tensor afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftc

Body = Callable[["Writer", Tensor], Tensor]


class Writer(nn.Module):
    """Three linear layers, of which `body` makes something."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def end(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.c(t)).sum(1)


def into_a_fresh_tensor(m: Writer, x: Tensor) -> Tensor:
    t = x.new_empty(x.shape[0], 8)
    t[:, :4] = m.b(x)
    t[:, 4:] = m.b(2 * x)
    return m.end(t)


def a_view_is_read_later(m: Writer, x: Tensor) -> Tensor:
    t = torch.zeros(x.shape[0], 8)
    t[:, :4] = m.b(x)
    v = t[:, 2:6]
    t[:, 4:] = m.b(x)
    return torch.as_tensor(m.end(t) + v.sum(1) + m.a(x).sum(1))


def a_column_is_added_to(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    t[:, 1] += 3
    return m.end(t)


def a_column_is_read_before_all_is_added_to(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    y = t[:, 0]
    t += 1
    return torch.as_tensor(m.end(t) + y)


def a_part_is_scaled_then_written(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] *= 2
    t[:, :4] = m.b(x)
    return m.end(t)


def a_part_is_written_then_scaled(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    v = t[:, :4]
    v.mul_(2)
    return torch.as_tensor(m.end(t) + v.sum(1))


def another_part_is_zeroed(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    t[:, 4:].zero_()
    return m.end(t)


def the_part_is_clamped(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    t[:, :4].clamp_(min=0)
    return m.end(t)


def a_number_and_a_mask(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t[:, :4] = m.b(x)
    t[:, 4] = 7.0
    t[:, 5:].masked_fill_(x[:, 5:] > 0, 0.0)
    return m.end(t)


def all_is_added_to_before_a_part_is_zeroed(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t += 1
    t[:, :4].zero_()
    return m.end(t)


def a_view_outlives_two_writes(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t.neg_()
    v = t[:, 0]
    t.mul_(3)
    return torch.as_tensor(m.end(t) + v)


def a_part_is_read_after_it_was_written(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 2
    t.neg_()
    v = t[:, :2]
    t[:, :4] = m.b(x)
    return torch.as_tensor(m.end(t) + v.sum(1))


def a_mask_is_built(m: Writer, x: Tensor) -> Tensor:
    t = torch.zeros_like(x)
    t[:, 4:] = -1e4
    t[:, 5:].zero_()
    t.masked_fill_(x > 0, 3.0)
    t[:, 0] = 2.0
    return m.end(m.a(x) + t)


def through_another_shape(m: Writer, x: Tensor) -> Tensor:
    t = m.a(x) * 1.0
    t[:, :4] = m.b(x)
    g = t.view(-1, 2, 4)
    g[:, 1] = m.b(x)
    return m.end(t)


BODIES: list[Body] = [
    into_a_fresh_tensor, a_view_is_read_later, a_column_is_added_to, a_column_is_read_before_all_is_added_to,
    a_part_is_scaled_then_written, a_part_is_written_then_scaled, another_part_is_zeroed, the_part_is_clamped,
    a_number_and_a_mask, all_is_added_to_before_a_part_is_zeroed, a_view_outlives_two_writes,
    a_part_is_read_after_it_was_written, a_mask_is_built, through_another_shape,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_is_written_is_what_is_read(body: Body) -> None:
    """Outputs, and the gradient of the inputs."""
    torch.manual_seed(0)
    model = Writer(body)
    x, y = (torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=(torch.randn(3, 8),))
    expected, found = model(x), compiled(y)
    torch.testing.assert_close(found, expected)
    (expected * torch.arange(1.0, 4.0)).sum().backward()
    (found * torch.arange(1.0, 4.0)).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
