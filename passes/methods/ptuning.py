"""P-tuning: a prompt that comes out of a small network."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Sequence
from peftc.protocol.stages import SequenceMethod

GATES = 4  # of an LSTM: input, forget, cell, output
SIDES = ("", "_reverse")


@method
class PTuning(SequenceMethod):
    """A prompt encoded by an LSTM (both ways) with a head of two layers, or by three layers; trained together.

    P = U relu(V lstm(E)) or P = W₃ relu(W₂ relu(W₁ E)), with E of [length, d] learned as well. Saved for HF PEFT it is
    P alone. Tensors are called as in HF PEFT's encoder.
    """

    name = "ptuning"
    formula = "[f(E); x], f an LSTM or an MLP"
    paper = "Liu et al. 2021, arXiv:2103.10385"
    identity = False
    unmergeable = "a prompt lengthens the input, which no weight does"
    peft_type = "P_TUNING"
    peft_settings = (  # of the encoder the folder holds what came out
        "num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads",
        "modules_to_save", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
        "encoder_dropout",
    )  # fmt: skip

    length: int = param(20, "rows of the prompt", min=1)
    encoder: str = param("lstm", "what the prompt comes out of", choices=("lstm", "mlp"))
    hidden: int | None = param(None, "width of the encoder; the model's if it is not given", min=1)
    layers: int = param(2, "of the LSTM", min=1)
    dropout: float = param(0.0, "between the layers of the LSTM, in training", min=0, max=0.99)

    def conflict(self) -> str | None:
        if self.encoder == "mlp" and (self.layers != 2 or self.dropout):
            return "layers and dropout are the LSTM's: encoder=mlp has three layers and no dropout"
        if self.dropout and self.layers == 1:
            return "dropout stands between layers, and there is one"
        return None

    def lengthens(self, site: Sequence) -> int:
        return self.length

    def state(self, site: Sequence) -> dict[str, State]:
        hidden = self.hidden or site.width
        state = {"embedding.weight": State((self.length, site.width), torch.nn.init.normal_)}
        if self.encoder == "mlp":
            return state | _linears([site.width, hidden, hidden, site.width])
        start = partial(torch.nn.init.uniform_, a=-1 / math.sqrt(hidden), b=1 / math.sqrt(hidden))
        for name, n_in in self._recurrent(site.width, hidden):
            state[f"lstm_head.weight_ih_{name}"] = State((GATES * hidden, n_in), start)
            state[f"lstm_head.weight_hh_{name}"] = State((GATES * hidden, hidden), start)
            state[f"lstm_head.bias_ih_{name}"] = State((GATES * hidden,), start)
            state[f"lstm_head.bias_hh_{name}"] = State((GATES * hidden,), start)
        return state | _linears([2 * hidden, 2 * hidden, site.width])

    def _recurrent(self, width: int, hidden: int) -> list[tuple[str, int]]:
        """Each layer and direction of the LSTM, with the size of its input."""
        return [(f"l{layer}{side}", 2 * hidden if layer else width) for layer in range(self.layers) for side in SIDES]

    def prompt(self, state: dict[str, Tensor]) -> Tensor:
        """The encoder's output, [length, d]."""
        encoded = state["embedding.weight"]
        if self.encoder == "lstm":
            weights = [tensor for name, tensor in state.items() if name.startswith("lstm_head.")]
            hidden = state["lstm_head.weight_hh_l0"].shape[1]
            start = encoded.new_zeros(2 * self.layers, 1, hidden)
            encoded = torch.lstm(
                encoded[None], (start, start), weights, True, self.layers, self.dropout, self.dropout > 0, True, True
            )[0][0]
        places = range(0, 6 if self.encoder == "mlp" else 4, 2)
        for place in places:
            encoded = F.relu(encoded) if place else encoded
            encoded = F.linear(encoded, state[f"mlp_head.{place}.weight"], state[f"mlp_head.{place}.bias"])
        return encoded

    def rewrite(self, site: Sequence, x: Tensor, **state: Tensor) -> Tensor:
        return site.join(self.prompt(state), x)

    def unexportable(self, site: Sequence) -> str | None:
        return "its prompts stand before tokens" if site.vocabulary is None else None

    def to_peft(self, site: Sequence, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "peft_type": "P_TUNING", "num_virtual_tokens": self.length, "token_dim": site.width,
            "encoder_reparameterization_type": self.encoder.upper(), "encoder_hidden_size": self.hidden or site.width,
            "encoder_num_layers": self.layers, "encoder_dropout": self.dropout,
        }  # fmt: skip
        return settings, {"prompt_embeddings": self.prompt(state)}


def _linears(widths: list[int]) -> dict[str, State]:
    """The layers of a perceptron, started as `torch.nn.Linear` does; activations stand between them."""
    state: dict[str, State] = {}
    for place, (n_in, n_out) in enumerate(pairwise(widths)):
        bound = 1 / math.sqrt(n_in)
        start = partial(torch.nn.init.uniform_, a=-bound, b=bound)
        state[f"mlp_head.{2 * place}.weight"] = State((n_out, n_in), start)
        state[f"mlp_head.{2 * place}.bias"] = State((n_out,), start)
    return state
