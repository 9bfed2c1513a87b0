"""Where a method acts: a base class for each place in the model, with what its rewrite is given and what it returns.

A rewrite is plain PyTorch. Behind what it is given it names what else it wants, and gets that by name: any state of
the method (parameters called as `state` calls them, `**state` for all of it), and the operands that its base class
lists. A name that is neither is refused when the method registers. Tensors are traced fakes: no value can be looked
at, sizes may be symbols. One trace serves all places whose `facts` and tensors are alike, so that a rewrite looks at
nothing else of a site. State learns in fp32 beside half precision: what comes out is cast to y's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import Method, Stage
from peftc.protocol.site import Attention, Block, Linear, Sequence, Site, Sublayer

__all__ = [
    "AttentionMethod", "BlockMethod", "EntriesMethod", "OutputMethod", "SequenceMethod", "SublayerMethod",
    "TurningMethod", "WeightMethod",
]  # fmt: skip

Rewrites = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]

# Operands that are no state. weight [*batch, n_out, n_in], bias [n_out] or None; training is 1.0 in `train()`, else
# 0.0, a tensor []; here is `peftc.protocol.method.Here`.
OPERANDS = ("weight", "bias", "training", "here")
PROJECTIONS = ("key_weight", "key_bias", "value_weight", "value_bias", "training")


class WeightMethod(Method):
    """Acts as a change of a linear layer's weight: LoRA and its kin. They come first, and may stand beside each other.

    rewrite(site, x, y, …) -> y'    x [..., n_in] enters the layer, y [..., n_out] leaves it, bias and all that other
                                    methods have done included; y' has y's shape and dtype
        operands: weight, bias, training, here

    delta(site, **state) -> D       the definition: the change of the weight, [*batch, n_out, n_in]. Merging and the
                                    tests come from it. A method that is no sum defines `fold` instead:
    fold(site, weight, bias, state) -> weight, bias of a plain layer that does the same (bias: None where there is none)
    prepare(site, weight, state, here) -> the frozen weight as the compiled model keeps it, where the method takes a
                                    part out or adds one to it; the weight itself, where it does not
    claims_weight() -> why no other method may change the weight that this one stands on
    """

    stage = Stage.WEIGHT
    site: type[Site] | UnionType = Linear
    rewrites: ClassVar[Rewrites] = {
        "rewrite": (("site", "x", "y"), OPERANDS),
        "rewrite_input": (("site", "x"), OPERANDS),
    }


class TurningMethod(WeightMethod):
    """Acts as a matrix that the whole weight is multiplied by, W R: OFT, HRA. It is done to x, which is smaller than W.

    turn(site, x, **state) -> x Rᵀ     x [..., n_in], in the precision of the state; the definition, and all of it

    Where other rows of the weight read x, too, the site's own part of the product is corrected.
    """

    def turn(self, site: Linear, x: Tensor, **state: Tensor) -> Tensor:
        """x Rᵀ, linear in x."""
        raise NotImplementedError

    def claims_weight(self) -> str | None:
        return "it multiplies all of the weight"

    def rewrites_input(self, site: Linear) -> bool:
        return not site.is_part

    def rewrite_input(self, site: Linear, x: Tensor, **state: Tensor) -> Tensor:
        return self.turn(site, x.to(_precision(state)), **state).to(x.dtype)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, **state: Tensor) -> Tensor:
        wide = x.to(_precision(state))
        moved = (self.turn(site, wide, **state) - wide).to(x.dtype)
        return y + F.linear(moved, weight.to(x.dtype)).to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        dtype = _precision(state)
        turned = self.turn(site, torch.eye(site.n_in, dtype=dtype, device=weight.device), **state)
        return (weight.to(dtype) @ turned.t()).to(weight.dtype), bias


def _precision(state: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())


class EntriesMethod(WeightMethod):
    """Acts as `values` at a few entries of a matrix like the weight, numbered row by row: SHiRA, FourierFT.

    change(entries) -> D    what the matrix [n_out, n_in] adds to the weight; itself, where nothing else is said
    """

    def numbers(self, site: Linear, state: dict[str, Tensor]) -> Tensor:
        """Which entries these are, [many]."""
        return state["indices"]

    def change(self, entries: Tensor) -> Tensor:
        """The change of the weight, out of a matrix that is zero elsewhere; linear in it."""
        return entries

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        branch: Tensor = F.linear(x.to(state["values"].dtype), self.delta(site, **state))
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        flat = state["values"].new_zeros(site.n_out * site.n_in)
        flat = flat.index_copy(0, self.numbers(site, state), state["values"])
        return self.change(flat.unflatten(0, (site.n_out, site.n_in)))


class OutputMethod(WeightMethod):
    """Acts on what leaves a linear layer, or on what enters it, after all changes of weights: IA3.

    rewrites_input(site) -> whether it acts on the input at this site; then

    rewrite_input(site, x, …) -> x' [..., n_in], which the layer and all that stands beside it read
    rewrite(site, x, y, …) -> y'    as of a `WeightMethod`, elsewhere
        operands of both: weight, bias, training, here

    fold(site, weight, bias, state), where it merges; `adds_bias(site)` says that it needs a bias to put something in: a
    model with a layer that has none is then not merged, and `fold` returns there what the bias would have to be.
    """

    stage = Stage.OUTPUT


class SublayerMethod(Method):
    """Acts on a whole attention or feed-forward, before its residual add: adapters. Also on any other kind of site.

    rewrite(site, x, y, …) -> y'    x [..., entry_width] enters the sublayer, y [..., width] leaves it; at another kind
                                    they are the first value that the site `reads` and the first that it `changes`
        operands: training

    site = the kind, where it is another than sublayers.
    """

    stage = Stage.MODULE
    site: type[Site] | UnionType = Sublayer
    rewrites: ClassVar[Rewrites] = {"rewrite": (("site", "x", "y"), ("training",))}


class BlockMethod(Method):
    """Acts on the repeated blocks of a stack, which what one statement names makes a chain of: ladders.

    rewrite(site, x, y, …) -> y'    x [..., width] enters the block, y leaves it
        operands: training, and
        carry   what the rewrite at the block before returned beside its output, None at the first. Who asks for it
                returns the pair of output and carry
        memory  the carry at the end of the chain that this block's cross attention reads, or None
        attend  values [B, S, n] -> [B, T, n]: what that attention makes of values of the rewrite's own, or None

    changes(site) -> False where the rewrite only reads the block; `claims_upstream()` says why nothing below it may
    learn; `keeps(site)` how many features a token it keeps for the backward pass.
    """

    stage = Stage.MODULE
    site: type[Site] | UnionType = Block
    rewrites: ClassVar[Rewrites] = {"rewrite": (("site", "x", "y"), ("training", "carry", "memory", "attend"))}


class AttentionMethod(Method):
    """Acts inside an attention, beside its keys and values: prefixes.

    extend(site, …) -> keys [length, kv_heads * key_width], values [length, kv_heads * value_width]
        They stand in front of the attention's own, under one softmax.
        operands: key_weight, key_bias, value_weight, value_bias of the layers that project the attention's own
        (a bias is None where there is none), training

    rewrite(site, x, y, …) -> y'    where it is defined the keys and values are attended to apart, under a softmax of
                                    their own: x is what the queries find there, y the attention's own result, both
                                    [batch, heads, tokens, width], or with heads in the batch
        operands: training

    takes_positions(site) -> how many of the sequence's first positions they take: the text counts on from there.
    `windowed`: whether a sliding window may hide them.
    """

    stage = Stage.ATTENTION
    site: type[Site] | UnionType = Attention
    rewrites: ClassVar[Rewrites] = {
        "extend": (("site",), PROJECTIONS),
        "rewrite": (("site", "x", "y"), ("training",)),
    }


class SequenceMethod(Method):
    """Acts on the embedded input as a whole: prompts.

    rewrite(site, x, …) -> x'       x [B, S, width]; x' [B, lengthens(site) + S, width], see `site.join`
        operands: mask, the attention mask [B, S], or None where the model was captured without

    lengthens(site) -> how many positions it adds; every length, mask and position of the graph follows.
    """

    stage = Stage.SEQUENCE
    site: type[Site] | UnionType = Sequence
    rewrites: ClassVar[Rewrites] = {"rewrite": (("site", "x"), ("mask",))}
