"""Householder reflection adaptation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import TurningMethod


@method
class HRA(TurningMethod):
    """The inputs are reflected r times, each time at the plane that a trained vector stands on.

    A product of reflections is H = I - U T U' with T^-1 = I/2 + what is above the diagonal of U'U, for columns of U of
    length one (Joffrain et al. 2006): two thin products, whatever r is. Pairs of equal vectors make H = I at the start.
    """

    name = "hra"
    formula = "y = W H_1 ... H_r x, H_i = I - 2 u_i u_i' / |u_i|^2"
    paper = "Yuan et al. 2024, arXiv:2405.17484"
    peft_type = "HRA"
    peft_bias = "hra_only"
    peft_tensors: ClassVar = {"hra_u": "u"}
    peft_values: ClassVar = {"r": "r", "apply_GS": "orthogonal"}
    peft_transposed = False

    r: int = param(8, "reflections; of an odd number the model starts changed", min=1, alias="rank")
    orthogonal: bool = param(
        False, "vectors made orthogonal first (Gram and Schmidt); starts changed", alias="apply_GS"
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.identity = self.r % 2 == 0 and not self.orthogonal

    def refuses(self, site: Linear) -> str | None:
        many = self.orthogonal and self.r > site.n_in
        return f"orthogonal=true needs r <= {site.n_in}, the number of inputs" if many else None

    def state(self, site: Linear) -> dict[str, State]:
        return {"u": State((site.n_in, self.r), self._start)}

    def _start(self, u: Tensor) -> Tensor:
        if not self.identity:
            return torch.nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        half = torch.nn.init.kaiming_uniform_(torch.empty_like(u[:, ::2]), a=math.sqrt(5))
        return u.copy_(half.repeat_interleave(2, 1))

    def turn(self, site: Linear, x: Tensor, **state: Tensor) -> Tensor:
        u = state["u"] / state["u"].norm(dim=0)
        gram = u.t() @ u
        one = torch.eye(self.r, dtype=u.dtype, device=u.device)
        # Of vectors that span the same as the orthogonal ones: H = I - 2 U (U'U)^-1 U'
        inverse = gram / 2 if self.orthogonal else gram.tril(-1) + one / 2
        reflected: Tensor = x - (x @ u) @ torch.linalg.solve(inverse, u.t())
        return reflected
