"""Fourier-transformed weight changes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import EntriesMethod

if TYPE_CHECKING:
    from peftc.kernels.common import draws
else:
    draws = Lazy("peftc.kernels.common.draws")


@method
class FourierFT(EntriesMethod):
    """Some entries of a weight change's spectrum are learned, the others are zero; it is transformed back in each step.

    Which entries these are follows from `seed` and the weight's shape.
    """

    name = "fourierft"
    formula = "y = (W + scaling Re F^-1(S)) x, S [n_out, n_in] zero but for n_frequency entries"
    paper = "Gao et al. 2024, arXiv:2405.03003"
    peft_type = "FOURIERFT"
    peft_bias = "fourier_only"
    peft_tensors: ClassVar = {"fourierft_spectrum": "values"}
    peft_values: ClassVar = {"n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "seed"}
    peft_settings = ("n_frequency_pattern",)  # of which HF PEFT matches other ends of names than of all others

    n_frequency: int = param(1000, "entries that are learned at each weight", min=1)
    scaling: float = param(150.0, "the factor of the change", above=0)
    seed: int = param(777, "seed of their places", min=0, alias="random_loc_seed")

    def refuses(self, site: Linear) -> str | None:
        size = site.n_out * site.n_in
        many = self.n_frequency > size
        return f"n_frequency={self.n_frequency} is more than its {size} weights" if many else None

    def state(self, site: Linear) -> dict[str, State]:
        size = site.n_out * site.n_in
        drawn = partial(draws.permutation, seed=self.seed, below=size)
        places = State((self.n_frequency,), drawn, trainable=False, dtype=torch.int64, below=size)
        return {"values": State((self.n_frequency,)), "indices": places}

    def change(self, entries: Tensor) -> Tensor:
        changed: Tensor = self.scaling * torch.fft.ifft2(entries).real
        return changed

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = super().from_peft(config, module, tensors)
        return found and (found[0] | {"n_frequency": next(iter(tensors.values())).numel()}, found[1])
