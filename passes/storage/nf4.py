"""Four-bit numbers for normally distributed weights."""

from __future__ import annotations

from peftc.protocol.fourbit import FourBit
from peftc.protocol.storage import param, storage


@storage
class NF4(FourBit):
    """Sixteen levels at the quantiles of a normal distribution, and a scale for each block."""

    name = "nf4"
    formula = "W = level[code] * absmax of each block; double: absmax = code8 * absmax8 + mean"
    paper = "Dettmers et al. 2023, arXiv:2305.14314"

    double: bool = param(False, "whether the scales are quantised, too, to eight bits")
    block: int = param(64, "how many numbers have a scale in common: 32, 64, 128, … 4096", min=32, max=4096)
