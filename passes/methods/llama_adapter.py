"""LLaMA-Adapter: adaption prompts with zero-initialised attention."""

from __future__ import annotations

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Attention
from peftc.protocol.stages import AttentionMethod


@method
class LlamaAdapter(AttentionMethod):
    """A learned prompt for each layer that its own frozen projections make keys and values of, attended apart.

    No position turns the prompt's keys, and no mask hides them. The gate starts at zero.
    """

    name = "llama_adapter"
    formula = "y = softmax(q k^T) v + g softmax(q (Wk P)^T) (Wv P)"
    paper = "Zhang et al. 2023, arXiv:2303.16199"
    indivisible = "it is a gated branch inside an attention already"
    unmergeable = "its attention to the prompt depends on every query, and no weight does that"

    length: int = param(10, "virtual tokens of the prompt", min=1)
    gates: str = param(
        "layer", "one gate for the layer, as in HF PEFT, or one for each head", choices=("layer", "head")
    )

    def refuses(self, site: Attention) -> str | None:
        assert site.key is not None
        assert site.value is not None
        made = site.key.n_out, site.value.n_out
        if made != (site.kv_heads * site.key_width, site.kv_heads * site.value_width):
            return "its keys or values are made of more than one layer's output, and one is made of the prompt"
        if site.key.n_in != site.value.n_in:
            return f"keys come from {site.key.n_in} features and values from {site.value.n_in}: no one prompt fits"
        return None

    def state(self, site: Attention) -> dict[str, State]:
        assert site.key is not None
        gates = site.heads if self.gates == "head" else 1
        return {"prompt": State((self.length, site.key.n_in), torch.nn.init.normal_), "gate": State((gates,))}

    def extend(
        self, site: Attention, prompt: Tensor, key_weight: Tensor, key_bias: Tensor | None, value_weight: Tensor,
        value_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weights = ((key_weight, key_bias), (value_weight, value_bias))
        keys, values = (
            F.linear(prompt, weight.to(prompt.dtype), None if bias is None else bias.to(prompt.dtype))
            for weight, bias in weights
        )
        return keys, values

    def rewrite(self, site: Attention, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x: what the queries find in the prompt, [batch, heads, tokens, width] as y, or with heads in the batch."""
        scale = gate[:, None, None].to(y.dtype)
        if self.gates == "head" and y.dim() == 3:
            scale = scale.repeat(y.shape[0] // site.heads, 1, 1)
        return y + scale * x
