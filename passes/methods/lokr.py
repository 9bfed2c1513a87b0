"""Low-rank adaptation with a Kronecker product."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

from ..sites.conv import Conv, core, core_keeps, planar


@method
class LoKr(WeightMethod):
    """A Kronecker product W1 (x) W2 beside a frozen weight; W2, and W1 if asked, as a product of rank r.

    W1 is [out1, in1] and W2 [out2, in2], out1 out2 = n_out, in1 in2 = n_in. With x read as a matrix X [in1, in2] in
    row-major order, (W1 (x) W2) x is W1 X W2^T: no matrix of the weight's size is made. Of a convolution W2 is a kernel
    [out2, in2, *kernel]; its product of rank r takes the numbers of the kernel for inputs or, with `tucker`, has a core
    `t2` [r, r, *kernel].
    """

    name = "lokr"
    formula = "y = W x + (alpha/r) (W1 (x) W2) x, W2 = w2_a w2_b"
    paper = "Yeh et al. 2023 (LyCORIS), arXiv:2309.14859"
    peft_type = "LOKR"
    site = Linear | Conv
    peft_settings = (
        "r", "alpha", "decompose_both", "decompose_factor", "rank_dropout", "rank_dropout_scale", "module_dropout",
        "use_effective_conv2d",
    )  # fmt: skip
    peft_patterns: ClassVar = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    r: int = param(8, "rank of W2; a side not above 2 r has it dense", min=1, alias="rank")
    alpha: float = param(8.0, "the branch is scaled by alpha/r", above=0)
    factor: int | None = param(
        None, "sides of W1, or the largest divisors below it; the nearest to a square if not given", min=1,
        alias="decompose_factor",
    )  # fmt: skip
    decompose_both: bool = param(False, "W1 as a product of rank r, too")
    init: str = param(
        "w1", "which of W1 and W2 is zero at first: w1 as in HF PEFT, w2 as in LyCORIS", choices=("w1", "w2")
    )
    rank_dropout: float = param(0.0, "share of the branch's outputs left out of a step, in training", min=0, max=0.99)
    rank_dropout_scale: bool = param(False, "whether the outputs that stay are scaled up")
    module_dropout: float = param(0.0, "how often a step leaves out the whole branch, in training", min=0, max=0.99)
    tucker: bool = param(False, "a core for the kernel, of convolutions larger than 1", alias="use_effective_conv2d")

    @property
    def scale(self) -> float:
        """The factor of the Kronecker product."""
        return self.alpha / self.r

    def state(self, site: Linear | Conv) -> dict[str, State]:
        entering = site.each if isinstance(site, Conv) else site.n_in
        (out1, out2), (in1, in2) = (factors(size, self.factor) for size in (site.n_out, entering))
        thin1 = self.decompose_both and self.r < max(out1, in1) / 2
        thin2 = self.r < max(out2, in2) / 2
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        start1, start2 = (torch.nn.init.zeros_ if self.init == one else start for one in ("w1", "w2"))
        state = {"w1_a": State((out1, self.r), start1), "w1_b": State((self.r, in1), start)} if thin1 else {}
        state |= {} if thin1 else {"w1": State((out1, in1), start1)}
        if isinstance(site, Conv) and self.tucker and site.taps > 1 and thin2:
            shapes = {"t2": (self.r, self.r, *planar(site)), "w2_a": (self.r, out2), "w2_b": (self.r, in2)}
            return state | {name: State(shape, start2 if name == "w2_b" else start) for name, shape in shapes.items()}
        kernel, taps = (site.kernel, site.taps) if isinstance(site, Conv) else ((), 1)
        state |= {"w2_a": State((out2, self.r), start), "w2_b": State((self.r, in2 * taps), start2)} if thin2 else {}
        return state | ({} if thin2 else {"w2": State((out2, in2, *kernel), start2)})

    def rewrite(
        self, site: Linear | Conv, x: Tensor, y: Tensor,
        w1: Tensor | None, w1_a: Tensor | None, w1_b: Tensor | None,
        w2: Tensor | None, w2_a: Tensor | None, w2_b: Tensor | None, t2: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if isinstance(site, Conv):
            sides = {"w1": w1, "w1_a": w1_a, "w1_b": w1_b, "w2": w2, "w2_a": w2_a, "w2_b": w2_b, "t2": t2}
            kernel = self.delta(site, **{name: side for name, side in sides.items() if side is not None})
            return y + self._thinned(site, site.convolve(x.to(kernel.dtype), kernel)).to(y.dtype)
        left = self.scale * _product(w1, w1_a, w1_b)  # W1 is small: sides near the square roots of the weight's
        right = [part for part in (w2, w2_b, w2_a) if part is not None]  # in the order in which X meets them
        value = x.to(left.dtype).unflatten(-1, (left.shape[1], right[0].shape[1]))
        widths = [right[0].shape[1], *(part.shape[0] for part in right)]
        narrowest = widths.index(min(widths))  # W1 comes in where the other side has the fewest columns
        for part in right[:narrowest]:
            value = F.linear(value, part)
        value = F.linear(value.mT, left).mT
        for part in right[narrowest:]:
            value = F.linear(value, part)
        return y + self._thinned(site, value.flatten(-2)).to(y.dtype)

    def _thinned(self, site: Linear | Conv, branch: Tensor) -> Tensor:
        """Rows of the change left out; or all of it."""
        if self.rank_dropout:
            kept = (F.dropout(branch.new_ones(site.n_out), self.rank_dropout) > 0).to(branch.dtype)
            kept = kept / kept.mean().clamp_min(1e-6) if self.rank_dropout_scale else kept
            branch = branch * (site.beside(kept) if isinstance(site, Conv) else kept)
        if self.module_dropout:
            branch = branch * (F.dropout(branch.new_ones(1), self.module_dropout) > 0)
        return branch

    def delta(self, site: Linear | Conv, **state: Tensor) -> Tensor:
        left, right = (
            _product(*(state.get(name) for name in (f"w{n}", f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2)
        )
        if not isinstance(site, Conv):
            return self.scale * torch.kron(left, right.contiguous())
        right = right.reshape(len(right), -1, site.taps)
        change = left[:, None, :, None, None] * right[None, :, None]  # [out1, out2, in1, in2, taps]
        return (self.scale * change).reshape(site.shape)

    def keeps(self, site: Linear | Conv) -> int | None:
        return 0 if isinstance(site, Conv) else None

    def keeps_dense(self, site: Linear | Conv) -> int:
        """The kernel, and each side that is a product."""
        if not isinstance(site, Conv):
            return 0
        state = {name: spec.shape for name, spec in self.state(site).items()}
        (out1, out2), (in1, in2) = (factors(size, self.factor) for size in (site.n_out, site.each))
        sides = (out1 * in1 if "w1_a" in state else 0) + (out2 * in2 * site.taps if "w2_a" in state else 0)
        cores = core_keeps(out2, self.r, site.taps) if "t2" in state else 0
        return math.prod(site.shape) + sides + cores

    def unexportable(self, site: Linear | Conv) -> str | None:
        if isinstance(site, Conv) and len(site.kernel) == 1 and "w2" in self.state(site):
            return f"its product of a matrix and the dense kernel of {site.name} has other numbers in other places"
        if isinstance(site, Conv):
            return "it has LoKr on no convolution in three dimensions" if len(site.kernel) > 2 else None
        return "it has LoKr on no transposed weight" if site.transposed else None

    def to_peft(self, site: Linear | Conv, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "peft_type": "LOKR", "r": self.r, "alpha": self.alpha, "decompose_both": self.decompose_both,
            "decompose_factor": self.factor or -1, "init_weights": True if self.init == "w1" else "lycoris",
            "rank_dropout": self.rank_dropout, "rank_dropout_scale": self.rank_dropout_scale,
            "module_dropout": self.module_dropout, "use_effective_conv2d": self.tucker,
        }  # fmt: skip
        return settings, {f"lokr_{name}": tensor for name, tensor in state.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not all(name.startswith("lokr_") for name in tensors):
            return None
        same = ("r", "alpha", "decompose_both", "rank_dropout", "rank_dropout_scale", "module_dropout")
        values: dict[str, Any] = {name: config[name] for name in same if name in config}
        if config.get("decompose_factor", -1) != -1:
            values["factor"] = config["decompose_factor"]
        values |= {"tucker": config["use_effective_conv2d"]} if "use_effective_conv2d" in config else {}
        if config.get("init_weights") == "lycoris":
            values["init"] = "w2"
        return values, {name.removeprefix("lokr_"): tensor for name, tensor in tensors.items()}


def _product(whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None = None) -> Tensor:
    """One side of the Kronecker product, kept whole or as two thin matrices, and perhaps the core between them."""
    if whole is not None:
        return whole
    assert a is not None
    assert b is not None
    return core(a, b, t)


def factors(size: int, wanted: int | None) -> tuple[int, int]:
    """`size` as a product of two, the smaller first: `wanted` and the rest where that divides, else the most nearly
    equal ones whose smaller is not above `wanted`. As in LyCORIS, so that the shapes are those of its checkpoints."""
    if wanted is not None and size % wanted == 0:
        return wanted, size // wanted
    most = math.isqrt(size) if wanted is None else min(wanted, math.isqrt(size))
    small = max(n for n in range(1, most + 1) if size % n == 0)
    return small, size // small
