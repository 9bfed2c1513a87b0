"""Ladder side-tuning: a small network beside the model, which reads its blocks and through which alone it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Block
from peftc.protocol.stages import BlockMethod

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x),
    "gelu": lambda x: F.gelu(x),
    "silu": lambda x: F.silu(x),
    "tanh": lambda x: torch.tanh(x),
}
EPSILON = 1e-6  # of the side network's norms, as T5's


@method
class Ladder(BlockMethod):
    """A small network beside the model with a rung at every block, whose result joins the last block's output.

    With h_i [.., d] what leaves block i of n and x what enters the first, all detached, and μ_i = σ(α_i / T):

        s_0 = D_0 x
        u_i = μ_i D_i h_i + (1 - μ_i) s_(i-1)
        v_i = u_i + A_i (C_i e)                   in blocks that read another chain, which ends in e
        s_i = v_i + W_i f(V_i rms(v_i))
        h_n' = h_n + U rms(s_n)                   U = 0 at the start

    D_i [m, d], V_i [c m, m], W_i [m, c m], U [d, m], m = d / reduction; rms has a trained scale. A_i is block i's own
    cross attention (the mean of its heads' weights): the side decoder reads the side encoder, as in the paper, and the
    encoder's output stays as it was.

    Other than in the paper, a side block is its feed-forward part alone, which sees one token at a time: the
    backbone's hidden states have mixed the tokens already, and no mask can be got wrong. It starts at random, not as a
    pruned copy of the backbone's block, and U's output joins before the final norm, not behind it.
    """

    name = "ladder"
    formula = "s_i = side(μ_i D_i h_i + (1 - μ_i) s_(i-1)), μ_i = σ(α_i / T); at the last block h_n + U s_n, h detached"
    paper = "Sung et al. 2022, arXiv:2206.06522"
    unmergeable = "it is a network of its own beside the model, which no weight of the model stands for"
    indivisible = "its blocks hand a value on to one another"

    reduction: int | None = param(None, "width as the model's divided by this; 8 if neither is given", min=1)
    size: int | None = param(None, "width of the side network", min=1)
    expansion: int = param(4, "hidden width of the side blocks, as a multiple of their own", min=1)
    temperature: float = param(0.1, "T: the smaller, the quicker the gates move", above=0)
    activation: str = param("relu", "f", choices=tuple(ACTIVATIONS))
    dropout: float = param(0.0, "dropout inside the side blocks, in training", min=0, max=0.99)

    def conflict(self) -> str | None:
        if self.size is not None and self.reduction is not None:
            return "size and reduction say the same thing: give one of them"
        return None

    def refuses(self, site: Block) -> str | None:
        if site.x is None or site.h is None:
            return "no hidden state runs through it from end to end"
        if self.size is None and site.width < (self.reduction or 8):
            return f"a width of {site.width} leaves nothing at reduction={self.reduction or 8}: give size="
        if self._width(site) != self._width(site.before or site):
            return "the blocks of its stack differ in width: give size="
        if site.after is None and not site.top and not site.feeds:
            return "the blocks above it would pass the gradient on: a ladder ends at the last block of its stack"
        if site.after is None and site.readers and not site.feeds:
            return f"the gradient would run through the blocks that read it: name those in {site.readers[0]} too"
        return None

    def claims_upstream(self) -> str | None:
        return "the blocks run without a backward pass, which is what it is for"

    def _width(self, site: Block) -> int:
        return self.size or site.width // (self.reduction or 8)

    def changes(self, site: Block) -> bool:
        return site.after is None and not site.feeds

    def keeps(self, site: Block) -> int:
        """Both addends of u, what leaves, and what f is of; norms and f are computed again, a dropout's mask is not."""
        width = self._width(site)
        return 3 * width + self.expansion * width * (2 if self.dropout else 1)

    def state(self, site: Block) -> dict[str, State]:
        width, inner = self._width(site), self.expansion * self._width(site)
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        state = {"first": State((width, site.width), start)} if site.before is None else {}
        state |= {"down": State((width, site.width), start), "gate": State((1,))}
        if site.memory is not None:
            state["cross"] = State((width, self._width(site.memory)), start)
        state |= {
            "norm": State((width,), torch.nn.init.ones_),
            "wide": State((inner, width), start),
            "narrow": State((width, inner), start),
        }
        if self.changes(site):
            state |= {"last_norm": State((width,), torch.nn.init.ones_), "up": State((site.width, width))}
        return state

    def rewrite(
        self, site: Block, x: Tensor, y: Tensor, carry: Tensor | None, memory: Tensor | None,
        attend: Callable[[Tensor], Tensor] | None, first: Tensor | None, down: Tensor, gate: Tensor,
        cross: Tensor | None, norm: Tensor, wide: Tensor, narrow: Tensor, last_norm: Tensor | None, up: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        below = carry
        if below is None:
            assert first is not None
            below = F.linear(x.detach().to(down.dtype), first)
        share = torch.sigmoid(gate / self.temperature)
        side = share * F.linear(y.detach().to(down.dtype), down) + (1 - share) * below
        if memory is not None and attend is not None and cross is not None:
            side = side + attend(F.linear(memory, cross))
        inner = ACTIVATIONS[self.activation](F.linear(_normed(side, norm), wide))
        if self.dropout:
            inner = F.dropout(inner, self.dropout)
        side = side + F.linear(inner, narrow)
        if last_norm is None or up is None:
            return y, side
        return y.detach() + F.linear(_normed(side, last_norm), up).to(y.dtype), side


def _normed(side: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(side, scale.shape, scale, EPSILON)
