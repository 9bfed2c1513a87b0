"""Matrix shard sharing."""

from __future__ import annotations

from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class MiSS(WeightMethod):
    """One shard D [r, n_out] that all blocks of r inputs share: x is summed over the blocks, and one product is left.

    kind=mini: D's columns repeat, too. kind=bat (Bone): each block of the weight is changed by D + W D, D [r, r] one
    for each block of r outputs, so that what blocks learn differs by what they were.
    """

    name = "miss"
    formula = "y = W x + D' sum_i x_i, x_i the blocks of r inputs"
    paper = "Kang and Yin 2024 (MiSS, Bone), arXiv:2409.15371"
    peft_type = "MISS"
    peft_bias = "MiSS_only"
    peft_tensors: ClassVar = {"miss_block": "D"}
    peft_values: ClassVar = {"r": "r", "mini_r": "mini_r", "miss_dropout": "dropout"}
    peft_settings = ("init_weights",)
    peft_transposed = False

    r: int = param(64, "inputs of a block", min=1, alias="rank")
    kind: str = param("balance", "what the blocks share", choices=("balance", "mini", "bat"))
    mini_r: int = param(1, "columns that repeat, of kind=mini", min=1)
    dropout: float = param(0.0, "dropout on the branch's x, in training; none of kind=bat", min=0, max=0.99)

    def conflict(self) -> str | None:
        if self.kind != "mini" and self.changed("mini_r"):
            return f"mini_r={self.mini_r} is of kind=mini, and this is kind={self.kind}"
        return f"kind=bat has no dropout, and dropout={self.dropout}" if self.kind == "bat" and self.dropout else None

    def refuses(self, site: Linear) -> str | None:
        if self.r > site.n_in:
            return f"r={self.r} is more than its {site.n_in} inputs"
        if self.kind == "mini" and site.n_out % self.mini_r:
            near = divisors_near(site.n_out, self.mini_r)
            return f"mini_r={self.mini_r} does not divide its {site.n_out} outputs: {near} do"
        if self.kind == "bat" and (site.n_in % self.r or site.n_out % self.r):
            return f"kind=bat needs an r that divides {site.n_in} and {site.n_out}"
        return None

    def claims_weight(self) -> str | None:
        return "kind=bat multiplies all of the weight" if self.kind == "bat" else None

    def state(self, site: Linear) -> dict[str, State]:
        shapes = {"balance": (self.r, site.n_out), "mini": (self.r, self.mini_r),
                  "bat": (site.n_out // self.r, self.r, self.r)}  # fmt: skip
        return {"D": State(shapes[self.kind])}

    def _shard(self, site: Linear, D: Tensor) -> Tensor:
        return D.repeat(1, site.n_out // self.mini_r) if self.kind == "mini" else D

    def _change(self, site: Linear, weight: Tensor, D: Tensor) -> Tensor:
        """D + W D, block by block, [n_out, n_in]."""
        blocks = weight.to(D.dtype).reshape(site.n_out // self.r, self.r, site.n_in // self.r, self.r)
        changed = torch.einsum("okir,ors->okis", blocks, D) + D[:, :, None]
        return changed.reshape(site.n_out, site.n_in)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, D: Tensor) -> Tensor:
        if self.kind == "bat":
            branch = F.linear(x.to(D.dtype), self._change(site, weight, D))
        else:
            x = F.dropout(x.to(D.dtype), self.dropout) if self.dropout else x.to(D.dtype)
            branch = F.pad(x, (0, -site.n_in % self.r)).unflatten(-1, (-1, self.r)).sum(-2) @ self._shard(site, D)
        return y + branch.to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.kind == "bat":
            change = self._change(site, weight, state["D"])
        else:
            change = self._shard(site, state["D"]).t().repeat(1, -(-site.n_in // self.r))[:, : site.n_in]
        return (weight.to(change.dtype) + change).to(weight.dtype), bias

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"init_weights": True if self.kind == "balance" else self.kind}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = super().from_peft(config, module, tensors)
        given = config.get("init_weights")
        kind = given if isinstance(given, str) else "balance"
        unread = {"balance": {"mini_r"}, "bat": {"mini_r", "dropout"}}.get(kind, set())
        return found and ({k: v for k, v in found[0].items() if k not in unread} | {"kind": kind}, found[1])
