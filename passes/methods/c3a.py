"""Circular convolution adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class C3A(WeightMethod):
    """Beside the weight a matrix of circulant blocks, each made of one vector: its rank may be full.

    A block's row k is its vector moved on by k places, so the product is a circular correlation, done by Fourier
    transforms of the blocks of x: no block is ever made.
    """

    name = "c3a"
    formula = "y = W x + C x / n_in, C_mn[k, j] = w_mn[(j - k) mod block_size]"
    paper = "Chen et al. 2024, arXiv:2407.19342"
    peft_type = "C3A"
    peft_bias = "c3a_only"
    peft_tensors: ClassVar = {"c3a_kernel": "w"}
    peft_values: ClassVar = {"block_size": "block_size"}
    peft_settings = ("block_size_pattern",)  # of which HF PEFT matches other ends of names than of all others
    peft_transposed = False

    block_size: int = param(256, "rows and columns of a block; it divides inputs and outputs", min=1)
    init: str = param(
        "zeros", "start of the vectors; but for zeros the model starts changed", choices=("zeros", "xavier", "gaussian")
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.identity = self.init == "zeros"

    def refuses(self, site: Linear) -> str | None:
        common = math.gcd(site.n_in, site.n_out)
        if common % self.block_size == 0:
            return None
        near = divisors_near(common, self.block_size)
        return f"block_size={self.block_size} does not divide both {site.n_in} and {site.n_out}: {near} do"

    def state(self, site: Linear) -> dict[str, State]:
        start = torch.nn.init.normal_ if self.init == "gaussian" else torch.nn.init.zeros_
        if self.init == "xavier":
            bound = math.sqrt(6 / (site.n_in + site.n_out))
            start = partial(torch.nn.init.uniform_, a=-bound, b=bound)
        return {"w": State((site.n_out // self.block_size, site.n_in // self.block_size, self.block_size), start)}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        blocks: Tensor = x.to(w.dtype).unflatten(-1, (-1, self.block_size))
        # Per frequency f a small product: conj(w_mn[f]) x_n[f].
        product = torch.einsum("...nf,mnf->...mf", torch.fft.rfft(blocks), torch.conj_physical(torch.fft.rfft(w)))
        branch: Tensor = torch.fft.irfft(product, n=self.block_size).flatten(-2) / site.n_in
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        place = torch.arange(self.block_size, device=state["w"].device)
        blocks: Tensor = state["w"][..., (place - place[:, None]) % self.block_size]  # [m, n, k, j]
        change: Tensor = blocks.transpose(1, 2).reshape(site.n_out, site.n_in) / site.n_in
        return change

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = super().from_peft(config, module, tensors)
        return found and (found[0] | {"block_size": tensors["c3a_kernel"].shape[-1]}, found[1])
