"""Wavelet-transformed weight changes."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import EntriesMethod

if TYPE_CHECKING:
    import numpy

    from peftc.kernels.common import draws
else:
    draws = Lazy("peftc.kernels.common.draws")
    numpy = Lazy("numpy")

WAVELETS = tuple(f"db{order}" for order in range(1, 11))


@method
class WaveFT(EntriesMethod):
    """Some wavelet coefficients of a weight change are learned, the others are zero; it is put together in each step.

    The four quarters of the coefficients are those of one level, the coarse ones first. Which are learned follows from
    `seed` and the weight's shape.
    """

    name = "waveft"
    formula = "y = (W + scaling IDWT(S)) x, S zero but for n_frequency entries"
    paper = "Bilican et al. 2025, arXiv:2505.12532"
    peft_type = "WAVEFT"
    peft_bias = "waveft_only"
    peft_tensors: ClassVar = {"waveft_spectrum": "values"}
    peft_values: ClassVar = {
        "n_frequency": "n_frequency", "scaling": "scaling", "wavelet_family": "wavelet", "use_idwt": "transform",
        "random_loc_seed": "seed",
    }  # fmt: skip
    peft_settings = ("n_frequency_pattern", "proportional_parameters")  # as many as there are
    peft_patterns: ClassVar = {"n_frequency": "n_frequency_pattern"}

    n_frequency: int = param(2592, "coefficients that are learned at each weight", min=1)
    scaling: float = param(25.0, "the factor of the change", above=0)
    wavelet: str = param("db1", "whose coefficients, by Daubechies", choices=WAVELETS, alias="wavelet_family")
    transform: bool = param(True, "whether they are coefficients, and not entries of the change", alias="use_idwt")
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
        return self.scaling * (self._transformed(entries) if self.transform else entries)

    def _transformed(self, learned: Tensor) -> Tensor:
        """The change [n_out, n_in] from its coefficients, in the middle of as many more as the filter reaches over."""
        low = torch.stack([learned.new_full((), number) for number in filter_of(self.wavelet)])
        high = low.flip(0) * (1 - 2 * (torch.arange(len(low), device=low.device) % 2))
        more = len(low) - 2
        wide = [size + more + (size + more) % 2 for size in learned.shape]
        before = [(size - own) // 2 for size, own in zip(wide, learned.shape, strict=True)]
        after = [size - own - left for size, own, left in zip(wide, learned.shape, before, strict=True)]
        padded = F.pad(learned, (before[1], after[1], before[0], after[0]))
        quarters = padded.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        filters = torch.stack([torch.outer(low, low), torch.outer(high, low), torch.outer(low, high),
                               torch.outer(high, high)])  # fmt: skip
        found = F.conv_transpose2d(quarters[None], filters[:, None], stride=2)[0, 0]
        cut = [(size - own) // 2 for size, own in zip(found.shape, learned.shape, strict=True)]
        return found[cut[0] :, cut[1] :][: learned.shape[0], : learned.shape[1]]

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = super().from_peft(config, module, tensors)
        return found and (found[0] | {"n_frequency": tensors["waveft_spectrum"].numel()}, found[1])


@cache
def filter_of(wavelet: str) -> tuple[float, ...]:
    """Daubechies' low-pass filter with that many vanishing moments, twice as long (Daubechies 1988).

    (1 + z)^N times the roots inside the unit circle of sum_k C(N - 1 + k, k) y^k, y = (2 - z - 1/z) / 4.
    """
    order = int(wavelet.removeprefix("db"))
    found = numpy.poly1d([1.0])
    for root in numpy.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))]):
        inside = min(numpy.roots([1, 4 * root - 2, 1]), key=abs)
        found *= numpy.poly1d([1, -inside])
    coefficients = numpy.real((found * numpy.poly1d([1, 1]) ** order).coeffs)
    return tuple(math.sqrt(2) * coefficients / coefficients.sum())
