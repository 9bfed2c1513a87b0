"""Low-rank adaptation out of one short vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    import numpy
else:
    numpy = Lazy("numpy")

PARTS = ("A", "B")


@method
class UniLoRA(WeightMethod):
    """A LoRA whose A and B of all layers are read out of one vector: each entry is one of its numbers, scaled.

    Which number stands where is drawn once from `seed`, each as often as the others, and frozen. One that stands at n
    places is divided by sqrt(n) there: the projection of the vector to all A and B keeps lengths.
    """

    name = "unilora"
    formula = "y = W x + B A x, [A, B of all layers] = P theta, theta [length], P a 1/sqrt(n) in each row"
    paper = "Li et al. 2025, arXiv:2506.00799"
    identity = False
    indivisible = "its vector belongs to all its weights together"
    peft_type = "UNILORA"
    peft_bias = "unilora_only"
    peft_shared: ClassVar = {"unilora_theta_d": "theta"}
    peft_values: ClassVar = {
        "r": "r", "theta_d_length": "length", "proj_seed": "seed", "unilora_dropout": "dropout",
    }  # fmt: skip
    peft_settings = ("save_indices", "init_theta_d_bound")  # of the start

    r: int = param(4, "rank of the product", min=1, alias="rank")
    length: int = param(256, "numbers that learn, in all", min=1, alias="theta_d_length")
    seed: int = param(42, "seed of which number stands where", min=0, alias="proj_seed")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def state(self, site: Linear) -> dict[str, State]:
        return {}

    def shares(self, sites: Sequence[Linear]) -> list[dict[str, State]]:
        theta = State((self.length,), partial(torch.nn.init.uniform_, a=-0.02, b=0.02))
        shapes = [shape for site in sites for shape in ((self.r, site.n_in), (site.n_out, self.r))]
        drawn = _Drawn(sum(rows * columns for rows, columns in shapes), self.length, self.seed)
        found: list[dict[str, State]] = []
        start = 0
        for place, shape in enumerate(shapes):
            if place % 2 == 0:
                found.append({"theta": theta})
            part, own = PARTS[place % 2], slice(start, start := start + shape[0] * shape[1])
            found[-1] |= {
                f"indices_{part}": State(shape, partial(drawn.indices, own), False, torch.int64, self.length),
                f"scales_{part}": State(shape, partial(drawn.scales, own), False),
            }
        return found

    def _factors(self, **state: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, n_in], B [n_out, r]."""
        a, b = (state["theta"][state[f"indices_{part}"]] * state[f"scales_{part}"] for part in PARTS)
        return a, b

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        a, b = self._factors(**state)
        x = F.dropout(x.to(a.dtype), self.dropout) if self.dropout else x.to(a.dtype)
        branch: Tensor = F.linear(F.linear(x, a), b)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        a, b = self._factors(**state)
        return b @ a

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        own = {f"unilora_{name}": tensor for name, tensor in state.items() if name != "theta"}
        return settings | {"save_indices": True}, own

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {f"unilora_{kind}_{part}" for kind in ("indices", "scales") for part in PARTS}
        if set(tensors) != (names if config.get("save_indices") else set()):
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        return values, {name.removeprefix("unilora_"): tensor for name, tensor in tensors.items()}


class _Drawn:
    """Which of the numbers stands at each of `many` places, as HF PEFT draws it, and by what it is scaled there."""

    def __init__(self, many: int, length: int, seed: int) -> None:
        self._given = many, length, seed

    @cached_property
    def _which(self) -> Tensor:
        many, length, seed = self._given
        generator = numpy.random.default_rng(seed)
        found = numpy.repeat(numpy.arange(length), many // length)
        if many % length:
            found = numpy.concatenate([found, generator.choice(length, size=many % length, replace=False)])
        generator.shuffle(found)
        return torch.as_tensor(found)

    def indices(self, own: slice, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._which[own].view_as(tensor))

    def scales(self, own: slice, tensor: Tensor) -> Tensor:
        often = torch.bincount(self._which, minlength=self._given[1]).float().rsqrt()
        return tensor.copy_(often[self._which[own]].view_as(tensor))
