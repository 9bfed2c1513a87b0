"""Bottleneck adapters, behind a sublayer or beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.parameterisation import Parameterisation
from peftc.protocol.site import Sublayer
from peftc.protocol.stages import SublayerMethod

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x),
    "gelu": lambda x: F.gelu(x),
    "silu": lambda x: F.silu(x),
    "tanh": lambda x: torch.tanh(x),
    "identity": lambda x: x,
}


@method
class Adapter(SublayerMethod):
    """A small two-layer network with a residual, before the sublayer's own residual add."""

    name = "adapter"
    formula = "h + s U f(D h), or h + s U f(D x) in parallel; x enters the sublayer, h leaves it"
    paper = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021; He et al. 2022, arXiv:2110.04366"
    unmergeable = "its activation stands between two layers, so no single weight does the same"

    size: int | None = param(None, "width of the bottleneck", min=1, alias="bottleneck")
    reduction: int | None = param(None, "width as the model's divided by this; 16 if neither is given", min=1)
    at: str = param("sequential", "on the sublayer's output, or beside it", choices=("sequential", "parallel"))
    activation: str = param("relu", "f", choices=tuple(ACTIVATIONS))
    scale: float = param(1.0, "s", above=0)
    dropout: float = param(0.0, "dropout on the bottleneck, in training", min=0, max=0.99)
    bias: bool = param(True, "whether D and U have biases")
    weight: Parameterisation = param("dense", "how D and U are made: dense, lowrank(…), kron(…), phm(…)")
    residual: str = param(
        "none",
        "learned: a trained multiple of h as well, h + t h + s U f(D h) (KronA^B_res)",
        choices=("none", "learned"),
    )

    def conflict(self) -> str | None:
        if self.size is not None and self.reduction is not None:
            return "size and reduction say the same thing: give one of them"
        return None

    def refuses(self, site: Sublayer) -> str | None:
        if self.size is None and site.width < (self.reduction or 16):
            return f"a width of {site.width} leaves nothing at reduction={self.reduction or 16}: give size="
        down, up = self._shapes(site)
        return self.weight.refuses(*down) or self.weight.refuses(*up)

    def _shapes(self, site: Sublayer) -> tuple[tuple[int, int], tuple[int, int]]:
        """[n_out, n_in] of D and of U."""
        width = self.size or site.width // (self.reduction or 16)
        entering = site.width if self.at == "sequential" else site.entry_width
        return (width, entering), (site.width, width)

    def state(self, site: Sublayer) -> dict[str, State]:
        down, up = self._shapes(site)
        state = _named("down", self.weight.state(*down, zero=False)) | _named("up", self.weight.state(*up, zero=True))
        if self.bias:
            state |= {"down_bias": State((down[0],)), "up_bias": State((up[0],))}
        if self.residual == "learned":
            state |= {"t": State((1,))}
        return state

    def shared(self, sites: Sequence[Sublayer]) -> dict[str, State]:
        shapes = [shape for site in sites for shape in self._shapes(site)]
        return _named("weight", self.weight.common(shapes))

    def rewrite(self, site: Sublayer, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        entering = y if self.at == "sequential" else x
        narrow = self._times("down", entering.to(next(iter(state.values())).dtype), state)
        inner = ACTIVATIONS[self.activation](narrow)
        if self.dropout:
            inner = F.dropout(inner, self.dropout)
        branch = (self._times("up", inner, state) * self.scale).reshape(y.shape)
        if self.residual == "learned":
            branch = branch + state["t"] * y
        return y + branch.to(y.dtype)

    def _times(self, matrix: str, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return self.weight.apply(x, state.get(f"{matrix}_bias"), _part("weight", state) | _part(matrix, state))


def _named(prefix: str, state: dict[str, State]) -> dict[str, State]:
    return {f"{prefix}.{name}" if name else prefix: spec for name, spec in state.items()}


def _part(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one matrix by the names its parameterisation knows."""
    names = {name: name.removeprefix(prefix).removeprefix(".") for name in state}
    return {names[name]: tensor for name, tensor in state.items() if name == prefix or name.startswith(f"{prefix}.")}
