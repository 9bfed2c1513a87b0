"""Prefix tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Attention
from peftc.protocol.stages import AttentionMethod

CARTRIDGE = "CARTRIDGE"  # what HF PEFT calls a prefix of which some tokens are frozen
KEPT = "_kept"


@method
class Prefix(AttentionMethod):
    """Learned keys and values in front of an attention's own, as if of tokens before the text.

    They take the sequence's first `length` positions: the text counts on from there. Given `reparam`, they are made
    by a network over the whole statement, of one embedding a virtual token: keys and values of every layer are linear
    in tanh(W E + b), with W, b and E shared.
    """

    name = "prefix"
    formula = "y = softmax([q P^T, q k^T]) [Q; v]; with reparam: [P, Q] = V tanh(W E + b) + c"
    paper = "Li and Liang 2021, arXiv:2101.00190"
    identity = False
    peft_type = "PREFIX_TUNING"
    peft_settings = (  # of a network that made the prefix the folder holds what came out
        "num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads",
        "encoder_hidden_size", "prefix_projection", "num_frozen_tokens",
    )  # fmt: skip
    unmergeable = "its keys and values depend on no token, and no weight makes such"

    length: int = param(20, "virtual tokens", min=1)
    reparam: int | None = param(None, "hidden width of a network that makes the prefix; none: no such", min=1)
    frozen: int = param(0, "the first of them that do not learn (a cartridge, Eyuboglu 2025)", min=0)
    windowed: bool = param(False, "whether a sliding window of attention may pass the prefix by, as in HF PEFT")

    def conflict(self) -> str | None:
        if self.frozen and self.reparam is not None:
            return "frozen tokens are no network's: leave out reparam"
        return f"frozen={self.frozen} of length={self.length} leaves none" if self.frozen >= self.length else None

    def refuses(self, site: Attention) -> str | None:
        if site.positions is not None and self.length >= site.positions:
            return (
                f"the model counts {site.positions} positions, and a prefix of {self.length} leaves none for the text"
            )
        return None

    def takes_positions(self, site: Attention) -> int:
        return self.length

    def shared(self, sites: Sequence[Attention]) -> dict[str, State]:
        if self.reparam is None:
            return {}
        width = max(site.entry_width for site in sites)
        uniform = partial(torch.nn.init.uniform_, a=-(width**-0.5), b=width**-0.5)
        return {
            "embedding": State((self.length, width), torch.nn.init.normal_),
            "hidden": State((self.reparam, width), uniform),
            "hidden_bias": State((self.reparam,), uniform),
        }

    def state(self, site: Attention) -> dict[str, State]:
        widths = {"keys": site.kv_heads * site.key_width, "values": site.kv_heads * site.value_width}
        if self.reparam is None:
            start = partial(torch.nn.init.normal_, std=0.02)
            state = {name: State((self.length - self.frozen, width), start) for name, width in widths.items()}
            kept = {f"{name}{KEPT}": State((self.frozen, width), start, False) for name, width in widths.items()}
            return state | kept if self.frozen else state
        uniform = partial(torch.nn.init.uniform_, a=-(self.reparam**-0.5), b=self.reparam**-0.5)
        weights = {f"{name}_weight": State((width, self.reparam), uniform) for name, width in widths.items()}
        return weights | {f"{name}_bias": State((width,), uniform) for name, width in widths.items()}

    def extend(self, site: Attention, **state: Tensor) -> tuple[Tensor, Tensor]:
        if self.reparam is None:
            keys, values = (
                torch.cat([state[name + KEPT], state[name]]) if self.frozen else state[name]
                for name in ("keys", "values")
            )
            return keys, values
        inner = torch.tanh(F.linear(state["embedding"], state["hidden"], state["hidden_bias"]))
        keys = F.linear(inner, state["keys_weight"], state["keys_bias"])
        return keys, F.linear(inner, state["values_weight"], state["values_bias"])

    def unexportable(self, site: Attention) -> str | None:
        if site.cross or site.stack == "encoder":
            return "it has prefixes for a decoder's own attention only"
        return "it gives prefixes of one width, keys and values alike" if site.key_width != site.value_width else None

    def to_peft(self, site: Attention, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        width = site.kv_heads * site.key_width
        settings = {
            "peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.length, "token_dim": width,
            "num_attention_heads": site.kv_heads, "encoder_hidden_size": width, "prefix_projection": False,
        }  # fmt: skip
        if self.frozen:
            settings |= {"peft_type": CARTRIDGE, "num_frozen_tokens": self.frozen}
        return settings, dict(zip(("keys", "values"), self.extend(site, **state), strict=True))

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != {"keys", "values"}:
            return None
        frozen = config.get("num_frozen_tokens", 1) if config["peft_type"] == CARTRIDGE else 0
        kept = {f"{name}{KEPT}": tensor[:frozen] for name, tensor in tensors.items() if frozen}
        own = {name: tensor[frozen:] for name, tensor in tensors.items()}
        return {"length": config["num_virtual_tokens"], "frozen": frozen, "windowed": True}, own | kept
