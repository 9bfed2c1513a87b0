"""Low-rank adaptation whose factors are shared across layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class Lily(WeightMethod):
    """An A that neighbouring layers share, and a mixture of a few B's that all layers share, by a router in each layer.

    The mixture is one for all tokens of a batch, by the mean of what each token's A x gives its router. What one
    statement names shares where weights have one shape: write a statement for q and another for v.
    """

    name = "lily"
    formula = "y = W x + scale B^T A x, B = sum_e p_e B_e, p = mean over tokens of softmax(R A x)"
    paper = "Zhong et al. 2024, arXiv:2407.09946"
    unmergeable = "its mixture follows the tokens of a batch, and no weight does"
    indivisible = "its factors belong to several weights together"
    peft_type = "LILY"
    peft_apart = True
    peft_transposed = False
    peft_tensors: ClassVar = {"lily_A.weight": "A", "lily_B.weight": "B", "lily_router.weight": "router"}
    peft_values: ClassVar = {"r": "r", "stride_A": "stride", "num_B": "experts", "scaling": "scale"}

    r: int = param(32, "rank of the product", min=1, alias="rank")
    stride: int = param(1, "neighbouring layers that share an A", min=1, alias="stride_A")
    experts: int = param(2, "B's to mix", min=1, alias="num_B")
    scale: float = param(1.0, "the branch is scaled by it", above=0, alias="scaling")

    def shares(self, sites: Sequence[Linear]) -> list[dict[str, State]]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        seen: dict[tuple[int, int], list[dict[str, State]]] = defaultdict(list)
        for site in sites:
            group = seen[site.n_out, site.n_in]
            own = {"A": State((self.r, site.n_in), start), "B": State((self.experts * self.r, site.n_out))}
            if group:
                own["B"] = group[0]["B"]
            if len(group) % self.stride:
                own["A"] = group[-1]["A"]
            group.append(own)
        left = {shape: iter(group) for shape, group in seen.items()}
        return [next(left[site.n_out, site.n_in]) for site in sites]

    def state(self, site: Linear) -> dict[str, State]:
        return {"router": State((self.experts, self.r), partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5)))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, router: Tensor) -> Tensor:
        inner = F.linear(x.to(A.dtype), A)
        chances = F.softmax(F.linear(inner, router), -1).flatten(0, -2).mean(0)
        mixed = torch.einsum("e,ero->ro", chances, B.unflatten(0, (self.experts, self.r)))
        branch: Tensor = self.scale * (inner @ mixed)
        return y + branch.to(y.dtype)
