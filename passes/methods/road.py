"""Rotary adaptation of outputs."""

from __future__ import annotations

from typing import ClassVar

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import OutputMethod

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # angles and lengths for each output


@method
class RoAd(OutputMethod):
    """Pairs of outputs are turned and scaled, each pair by its own angle and length.

    Of a group of outputs the first half is paired with the second. An angle and a length are those of a pair (road_1),
    of each of its two rows (road_2), or of each of the four numbers of its matrix (road_4).
    """

    name = "road"
    formula = "y = R (W x + b), [y1, y2] = [a1 cos t1, -a1 sin t1; a2 sin t2, a2 cos t2] [h1, h2]"
    paper = "Liao et al. 2024 (3-in-1), arXiv:2409.00119"
    peft_type = "ROAD"
    peft_tensors: ClassVar = {"road_theta": "theta", "road_alpha": "alpha"}
    peft_values: ClassVar = {"variant": "variant", "group_size": "group_size"}
    peft_transposed = False

    variant: str = param("road_1", "how many angles and lengths a pair has: 1, 2 or 4", choices=tuple(SIZES))
    group_size: int = param(64, "outputs of a group, an even number that divides them", min=2)

    def refuses(self, site: Linear) -> str | None:
        if self.group_size % 2:
            return f"group_size={self.group_size} is odd, and outputs are paired within a group"
        if site.n_out % 2:
            return f"its {site.n_out} outputs cannot be paired"
        if site.n_out % self.group_size:
            near = divisors_near(site.n_out, self.group_size, of=2)
            return f"group_size={self.group_size} does not divide its {site.n_out} outputs: {near} do"
        return None

    def state(self, site: Linear) -> dict[str, State]:
        size = (int(site.n_out * SIZES[self.variant]),)
        return {"theta": State(size), "alpha": State(size, torch.nn.init.ones_)}

    def _columns(self, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """What each output is multiplied by, and what its partner is, [n_out]."""
        if self.variant == "road_1":
            halves = (part.unflatten(0, (-1, 1, self.group_size // 2)).expand(-1, 2, -1) for part in (theta, alpha))
            theta, alpha = (half.flatten() for half in halves)
        if self.variant == "road_4":
            theta, alpha = (part.unflatten(0, (-1, 2, self.group_size)) for part in (theta, alpha))
            own, other = ((theta[:, row], alpha[:, row]) for row in (0, 1))
            return (own[1] * own[0].cos()).flatten(), (other[1] * other[0].sin()).flatten()
        return alpha * theta.cos(), alpha * theta.sin()

    def _turned(self, y: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
        own, other = self._columns(theta, alpha)
        first, second = y.to(own.dtype).unflatten(-1, (-1, 2, self.group_size // 2)).unbind(-2)
        partner = torch.stack([-second, first], -2).flatten(-3)
        return (y * own + partner * other).to(y.dtype)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
        return self._turned(y, theta, alpha)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return self._turned(weight.t(), **state).t(), None if bias is None else self._turned(bias, **state)
