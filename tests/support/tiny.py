"""Models of about ten operations, whose whole graphs can be read; no layer is square."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.proj(x))


class Classifier(Layer):
    """One linear layer and a loss."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.proj(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FeedForward(nn.Module):
    """A feed-forward with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.down(F.gelu(self.up(x))))


class Stack(nn.Module):
    """Blocks, called in some order, and a head."""

    def __init__(self, order: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward() for _ in range(max(order) + 1))
        self.head = nn.Linear(6, 3)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return torch.as_tensor(self.head(x))


class Gated(nn.Module):
    """A feed-forward whose gate is spelt out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(6, 8, bias=False) for _ in range(2))
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(F.silu(self.gate(x)) * self.up(x)))


class Attending(nn.Module):
    """Tokens at their places, and one head that attends to them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.q, self.k, self.v = (nn.Linear(8, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 8, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return torch.as_tensor(self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))


class Tagger(nn.Module):
    """A class for each token, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tokens(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def example(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of a batch of two for any of these."""
    match model:
        case Attending():
            return {"input_ids": torch.ones(2, 5, dtype=torch.long)}
        case Tagger():
            return {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "labels")}
        case Classifier():
            return {"x": torch.ones(2, 6), "labels": torch.zeros(2, dtype=torch.long)}
        case _:
            return {"x": torch.ones(2, 6)}
