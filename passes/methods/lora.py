"""Low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.fourbit import rounded
from peftc.protocol.method import PLAIN, Data, Here, Init, LowRank, State, method, param
from peftc.protocol.site import Experts, Linear, Projection
from peftc.protocol.stages import WeightMethod
from peftc.protocol.storage import Storage

from ..sites.conv import Conv, undilated
from ..sites.embed import TENSORS, Embedding


def _each_row_uniform(tensor: Tensor) -> Tensor:
    """As `nn.Linear` starts: uniform within 1/sqrt(n_in), whatever number of matrices is stacked."""
    torch.nn.init.kaiming_uniform_(tensor.flatten(0, -2), a=math.sqrt(5))
    return tensor


@method
class LoRA(WeightMethod):
    """A frozen weight and a trained product of two thin matrices beside it.

    Stacked experts have A and B each, and the two thin products act on the tokens after routing: W_e + s B_e A_e is
    never formed. At a convolution A is one into r channels that moves as the layer does, with a kernel of its size, and
    B one whose kernel is a single number. Of a grouped layer B has the groups, while A reads all channels. At an
    embedding A is a table, too, of r numbers a row, and starts with zeros, so that B starts with random numbers.
    """

    name = "lora"
    formula = "y = W x + (alpha/r) B A x"
    site = Linear | Experts | Conv | Embedding
    paper = "Hu et al. 2021, arXiv:2106.09685"
    peft_type = "LORA"
    peft_bias = "lora_only"
    peft_settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
    peft_patterns: ClassVar = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}

    r: int = param(8, "rank of the product", min=1, alias="rank")
    alpha: float = param(16.0, "the branch is scaled by alpha/r", above=0)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)
    rslora: bool = param(False, "scale by alpha/sqrt(r) (Kalajdzievski 2023)")
    init: str = param(
        "kaiming",
        "kaiming, gaussian: random A, B = 0; eva: A from the inputs of calibration batches, B = 0; "
        "pissa: leading singular vectors; olora: leading QR columns; loftq: what rounding the weight to NF4 loses; "
        "mica: B is the singular vectors of the least and stays, A = 0 (2026, arXiv:2604.01694)",
        choices=("kaiming", "gaussian", "eva", "pissa", "olora", "loftq", "mica"),
    )
    loftq_iterations: int = param(5, "times that init=loftq rounds and decomposes in turn", min=1)
    bias: bool = param(False, "a trained vector b beside B: y = W x + (alpha/r) (B A x + b)", alias="lora_bias")
    lr_ratio: float = param(1.0, "learning rate of B over that of A (LoRA+, Hayou 2024)", above=0)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.data = Data.INPUTS if self.init == "eva" else None
        self.identity = self.init != "loftq"

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def takes_from_weight(self) -> bool:
        """Whether the start is a part of W, and the frozen weight what is left."""
        return self.init in ("pissa", "olora", "loftq")

    @property
    def prepares(self) -> bool:
        return self.takes_from_weight

    def refuses(self, site: Projection) -> str | None:
        if isinstance(site, Conv):
            return self._refuses_kernel(site)
        if isinstance(site, Embedding):
            return self._refuses_table(site)
        if self.init == "mica" and isinstance(site, Experts):
            return "init=mica is of one matrix, and these are stacked"
        if self.bias and isinstance(site, Experts):
            return "bias=true is for linear layers, and stacked experts add none"
        if self.init == "eva" and isinstance(site, Experts):
            return "init=eva needs each expert's own inputs, which calibration does not tell apart"
        if self.init == "eva" and self.r > site.n_in:
            return f"init=eva needs r <= {site.n_in}, the number of inputs"
        if (self.takes_from_weight or self.init == "mica") and self.r > min(site.n_in, site.n_out):
            return f"init={self.init} needs r <= {min(site.n_in, site.n_out)}, the smaller side of the weight"
        if self.takes_from_weight and site.tied:
            return f"init={self.init} changes the frozen weight, and this one is tied to another layer's"
        return None

    def _refuses_kernel(self, site: Conv) -> str | None:
        if self.init not in ("kaiming", "gaussian"):
            return f"init={self.init} is of a matrix, and a convolution has a kernel"
        return f"r has to be a multiple of {site.groups}, the layer's groups" if self.r % site.groups else None

    def _refuses_table(self, site: Embedding) -> str | None:
        if self.init == "mica" and self.r > min(site.n_in, site.n_out):
            return f"init=mica needs r <= {min(site.n_in, site.n_out)}, the smaller side of the table"
        if self.init not in ("kaiming", "gaussian", "mica"):
            return f"init={self.init} is of a matrix that multiplies, and here rows of a table are looked up"
        return "bias=true is for linear layers and convolutions" if self.bias else Embedding.undropped(self.dropout)

    def unmergeable_at(self, site: Projection) -> str | None:
        if isinstance(site, Embedding):
            return site.unmergeable
        if isinstance(site, Conv) and site.groups > 1:
            return f"A reads all channels, and each of {site.name}'s {site.groups} groups its own alone"
        return None

    def claims_weight(self) -> str | None:
        return f"init={self.init} takes a part out of the weight" if self.takes_from_weight else None

    def state(self, site: Projection) -> dict[str, State]:
        start: Init = _each_row_uniform
        if self.init == "gaussian":
            start = partial(torch.nn.init.normal_, std=1 / self.r)
        shapes: dict[str, tuple[int, ...]]
        shapes = {"A": (*site.batch, self.r, site.n_in), "B": (*site.batch, site.n_out, self.r)}
        if isinstance(site, Conv):
            start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5)) if self.init == "kaiming" else start
            ones = (1,) * len(site.kernel)
            shapes = {"A": (self.r, site.n_in, *site.kernel), "B": (site.n_out, self.r // site.groups, *ones)}
        state = {"A": State(shapes["A"], start), "B": State(shapes["B"])}
        if isinstance(site, Embedding):
            state = {"A": State(shapes["A"]), "B": State(shapes["B"], torch.nn.init.normal_)}
        if self.init == "mica":
            state = {"A": State(shapes["A"]), "B": State(shapes["B"], trainable=False)}
        if self.takes_from_weight:
            state |= {f"{name}0": State(shape, trainable=False) for name, shape in shapes.items()}
        return state | ({"b": State((site.n_out,))} if self.bias else {})

    def initialise(self, site: Projection, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        if self.init == "mica":
            state["B"].copy_(torch.linalg.svd(weight.float(), full_matrices=False).U[:, -self.r :])
        if not self.takes_from_weight:
            return
        if self.init == "loftq":
            self._start_from_rounding(weight, state, here.storage)
            return
        if self.init == "pissa":
            b, a = self._leading(weight)
        else:
            q, triangle = torch.linalg.qr(weight.float())
            b, a = q[..., : self.r], triangle[..., : self.r, :]
        for name, tensor in {"A": a, "B": b, "A0": a, "B0": b}.items():
            state[name].copy_(tensor)

    def _leading(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """B and A of which alpha/r B A is the matrix's best approximation of rank r."""
        left, singular, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        root = singular[..., : self.r].sqrt() / math.sqrt(self.scale)  # the quotient itself may pass float32's range
        return left[..., : self.r] * root[..., None, :], root[..., None] * right[..., : self.r, :]

    def _start_from_rounding(self, weight: Tensor, state: dict[str, Tensor], storage: Storage | None) -> None:
        """Q = NF4(W - B A) and B A = svd_r(W - Q) in turn (LoftQ, Li 2023, arXiv:2310.08659, algorithm 1).

        A0 and B0 are those that the last Q was made with. Where a storage packs the weight, it rounds, not NF4.
        """
        state["A"].zero_()
        state["B"].zero_()
        for _ in range(self.loftq_iterations):
            state["A0"].copy_(state["A"])
            state["B0"].copy_(state["B"])
            rest = self._rest(weight.float(), state)
            kept = rounded(rest, "nf4") if storage is None else storage.rounded(rest)
            b, a = self._leading(weight.float() - kept)
            state["A"].copy_(a)
            state["B"].copy_(b)

    def _rest(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        taken = self.scale * state["B0"] @ state["A0"]
        return (weight.to(taken.dtype) - taken).to(weight.dtype)  # alpha/r of them may be more than half precision has

    def calibrate(self, site: Projection, weight: Tensor, data: Tensor, state: dict[str, Tensor]) -> None:
        """A's rows are the leading right singular vectors of the inputs (EVA, Paischer 2024, arXiv:2410.07170)."""
        ascending = torch.linalg.eigh(data).eigenvectors
        state["A"].copy_(ascending.flip(1)[:, : self.r].t())

    def prepare(self, site: Projection, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> Tensor:
        if not self.takes_from_weight:
            return weight
        rest = self._rest(weight, state)
        return rounded(rest, "nf4") if self.init == "loftq" and here.storage is None else rest

    def rewrite(
        self, site: Projection, x: Tensor, y: Tensor, A: Tensor, B: Tensor, b: Tensor | None = None, here: Here = PLAIN
    ) -> Tensor:
        if isinstance(site, Embedding):
            return y + (self.scale * F.linear(site.look_up(x, A), B)).to(y.dtype)
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        if isinstance(site, Conv):
            branch, b = site.mix(site.convolve(x, A, groups=1), B), None if b is None else site.beside(b)
        else:
            branch = here.product(here.product(x, A), B)
        branch = self.scale * (branch if b is None else branch + b)
        return y + branch.to(y.dtype)

    def low_rank(self, site: Projection, state: Mapping[str, Tensor]) -> LowRank | None:
        plain = not self.bias and not isinstance(site, Conv | Embedding)
        return LowRank(state["A"], state["B"], self.scale, self.dropout) if plain else None

    def keeps(self, site: Projection) -> int | None:
        return self.r if isinstance(site, Conv) else None

    def delta(self, site: Projection, **state: Tensor) -> Tensor:
        a, b = state["A"], state["B"]
        if isinstance(site, Conv):
            return self.scale * (b.flatten(1) @ a.flatten(1)).reshape(site.shape)
        return self.scale * (b @ a)

    def adds_bias(self, site: Projection) -> bool:
        return self.bias

    def fold(
        self, site: Projection, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        folded, _ = super().fold(site, weight, bias, {name: state[name] for name in ("A", "B")})
        if not self.bias:
            return folded, bias
        moved = self.scale * state["b"]
        return folded, (moved if bias is None else bias.to(moved.dtype) + moved).to(weight.dtype)

    def unexportable(self, site: Projection) -> str | None:
        if self.init == "loftq":
            return "it holds no frozen weight, and init=loftq has rounded this one"
        if isinstance(site, Experts) and self.dropout:
            return "it has no dropout on stacked experts"
        return undilated(site)

    def to_peft(self, site: Projection, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        a, b, r = state["A"], state["B"], self.r
        if self.takes_from_weight:  # beside the whole weight again: W + s (B A - B0 A0), of twice the rank
            a, b, r = torch.cat([a, state["A0"]], -2), torch.cat([b, -state["B0"]], -1), 2 * r
        alpha = self.scale * (math.sqrt(r) if self.rslora else r)
        settings = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": self.rslora, "bias": "none",
                    "lora_dropout": self.dropout, "use_dora": False, "lora_bias": self.bias}  # fmt: skip
        if self.init == "mica":
            settings["init_lora_weights"] = "mica"
        if isinstance(site, Embedding):  # which their dropout passes by
            del settings["lora_dropout"]
            return settings, {theirs: state[ours] for theirs, ours in TENSORS.items()}
        moved = {"lora_B.bias": state["b"]} if self.bias else {}
        return settings, {"lora_A.weight": a, "lora_B.weight": b, **moved}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {"lora_A.weight": "A", "lora_B.weight": "B"} | ({"lora_B.bias": "b"} if config.get("lora_bias") else {})
        is_table = tensors.keys() == TENSORS.keys()
        names = TENSORS if is_table else names
        if config.get("use_dora") or config.get("kasa_config") is not None or set(tensors) != set(names):
            return None
        values = {
            "r": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": 0.0 if is_table else config.get("lora_dropout", 0.0),
            "rslora": config.get("use_rslora", False),
            "bias": config.get("lora_bias", False),
        }
        if config.get("init_lora_weights") in ("pissa", "olora", "mica"):  # what is frozen is theirs
            values["init"] = config["init_lora_weights"]
        return values, {ours: tensors[theirs] for theirs, ours in names.items()}

    def rate(self, state: str) -> float:
        return self.lr_ratio if state in ("B", "b") else 1.0
