"""Intrinsic prompt tuning: a prompt out of a handful of numbers."""

from __future__ import annotations

import math
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Sequence
from peftc.protocol.stages import SequenceMethod


@method
class IPT(SequenceMethod):
    """A prompt that a network decodes from a vector of `dim` numbers, which alone learn once the decoder is found.

    P = W₂ tanh(W₁ z + b₁) + b₂, reshaped to [length, d]. First `learn=decoder, tasks=n` trains one decoder with a z of
    its own for each of n tasks: the one-hot buffer `task` says whose batch it is. Then `decoder="folder"` takes the
    decoder out of what `save` wrote there and freezes it, and z of a new task learns. Without a file the decoder is
    random and frozen. Where the paper encodes prompts that were trained before, each task's z is learned here directly.
    """

    name = "ipt"
    formula = "[W₂ tanh(W₁ z + b₁) + b₂; x]"
    paper = "Qin et al. 2021, arXiv:2110.07867"
    identity = False
    unmergeable = "a prompt lengthens the input, which no weight does"

    length: int = param(20, "rows of the prompt", min=1)
    dim: int = param(5, "numbers of z", min=1)
    hidden: int = param(256, "width between the decoder's layers", min=1)
    learn: str = param("prompt", "z alone, or the decoder with it", choices=("prompt", "decoder"))
    tasks: int = param(1, "that the decoder is learned on, with a z each", min=1)
    decoder: str | None = param(
        None, "a folder that save() wrote with learn=decoder, or its safetensors file; relative to the spec"
    )

    def conflict(self) -> str | None:
        if self.learn == "decoder" and self.decoder is not None:
            return "a decoder that is given is frozen: leave out decoder= or learn=decoder"
        if self.learn == "prompt" and self.tasks > 1:
            return "several tasks learn a decoder together: add learn=decoder, or leave out tasks"
        return None

    def lengthens(self, site: Sequence) -> int:
        return self.length

    def state(self, site: Sequence) -> dict[str, State]:
        learns = self.learn == "decoder"
        state = {"z": State((self.tasks, self.dim), torch.nn.init.normal_)}
        if self.tasks > 1:
            state["task"] = State((self.tasks,), _first, trainable=False)
        for place, (n_in, n_out) in {
            0: (self.dim, self.hidden), 2: (self.hidden, self.length * site.width),
        }.items():  # fmt: skip
            # A random decoder must tell nearby z apart, and its prompts start as large as those of `prompt`.
            start = partial(torch.nn.init.normal_, std=1.0 if place == 0 else 1 / math.sqrt(n_in))
            state[f"decoder.{place}.weight"] = State((n_out, n_in), start, trainable=learns)
            state[f"decoder.{place}.bias"] = State((n_out,), trainable=learns)
        return state

    def reads(self) -> tuple[str, str] | None:
        return None if self.decoder is None else (self.decoder, "decoder.")

    def rewrite(self, site: Sequence, x: Tensor, **state: Tensor) -> Tensor:
        z = state["z"]
        chosen = state["task"] @ z if self.tasks > 1 else z[0]
        inner = torch.tanh(F.linear(chosen, state["decoder.0.weight"], state["decoder.0.bias"]))
        prompt = F.linear(inner, state["decoder.2.weight"], state["decoder.2.bias"])
        return site.join(prompt.reshape(self.length, site.width), x)


def _first(choice: Tensor) -> Tensor:
    return torch.nn.init.zeros_(choice).index_fill_(0, torch.zeros(1, dtype=torch.long, device=choice.device), 1.0)
