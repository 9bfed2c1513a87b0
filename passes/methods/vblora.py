"""Low-rank adaptation out of a bank of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class VBLoRA(WeightMethod):
    """A LoRA whose A and B are put together from pieces: each is a mixture of a few vectors of one bank for all layers.

    Logits choose the topk vectors of a piece, and their softmax weighs them; those of the others wait.
    """

    name = "vblora"
    formula = "y = W x + B A x, each piece of A and B sum_k softmax(top_k(logits))_k v_k"
    paper = "Li et al. 2024, arXiv:2405.15179"
    identity = False
    indivisible = "its vectors belong to all its weights together"
    peft_type = "VBLORA"
    peft_bias = "vblora_only"
    peft_tensors: ClassVar = {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"}
    peft_shared: ClassVar = {"vblora_vector_bank": "bank"}
    peft_values: ClassVar = {
        "r": "r", "num_vectors": "vectors", "vector_length": "length", "topk": "topk", "vblora_dropout": "dropout",
    }  # fmt: skip

    r: int = param(4, "rank of the product", min=1, alias="rank")
    vectors: int = param(256, "vectors in the bank", min=1, alias="num_vectors")
    length: int = param(256, "of a vector; it divides inputs and outputs", min=1, alias="vector_length")
    topk: int = param(2, "vectors of a piece", min=1)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def conflict(self) -> str | None:
        return f"topk={self.topk} of vectors={self.vectors}" if self.topk > self.vectors else None

    def refuses(self, site: Linear) -> str | None:
        common = math.gcd(site.n_in, site.n_out)
        if common % self.length == 0:
            return None
        near = divisors_near(common, self.length)
        return f"length={self.length} does not divide both {site.n_in} and {site.n_out}: {near} do"

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        return {"bank": State((self.vectors, self.length), partial(torch.nn.init.uniform_, a=-0.02, b=0.02))}

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.normal_, std=0.1)
        return {
            "logits_A": State((self.r, site.n_in // self.length, self.vectors), start),
            "logits_B": State((site.n_out // self.length, self.r, self.vectors), start),
        }

    def _factors(self, logits_A: Tensor, logits_B: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, n_in], B [n_out, r]."""
        return self._mixed(logits_A, bank).flatten(1), self._mixed(logits_B, bank).transpose(1, 2).flatten(0, 1)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        chosen, which = logits.topk(self.topk)
        return (F.softmax(chosen, -1)[..., None] * bank[which]).sum(-2)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, logits_A: Tensor, logits_B: Tensor, bank: Tensor) -> Tensor:
        a, b = self._factors(logits_A, logits_B, bank)
        x = F.dropout(x.to(a.dtype), self.dropout) if self.dropout else x.to(a.dtype)
        branch: Tensor = F.linear(F.linear(x, a), b)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        a, b = self._factors(**state)
        return b @ a
