"""Prompt tuning: learned embeddings in front of the input, or added to it."""

from __future__ import annotations

from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Sequence
from peftc.protocol.stages import SequenceMethod

STARTS = ("random", "vocab", "zeros")


@method
class Prompt(SequenceMethod):
    """Learned embeddings before the first token, or added to the first tokens' own.

    mode=prepend: [p; x], with p of [length, d]; the attention mask is 1 there, labels are left out of the loss, and
    what comes back has the caller's length again. On images p stands behind the patches, whose positions are added
    already. mode=add: row i of p is added to the i-th token, padding not counted; tokens from `length` on stay as they
    are. Where there is no attention mask, every position counts.
    """

    name = "prompt"
    formula = "[p; x], or x + p"
    paper = "Lester et al. 2021, arXiv:2104.08691; Jia et al. 2022, arXiv:2203.12119 on images"
    identity = False
    unmergeable = "a prompt lengthens the input, which no weight does"
    peft_type = "PROMPT_TUNING"
    peft_settings = (
        "num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads",
        "modules_to_save",
    )  # fmt: skip

    length: int = param(20, "rows of p", min=1)
    mode: str = param("prepend", "in front of the input, or added to it", choices=("prepend", "add"))
    init: str | None = param(
        None,
        "random: normal; vocab: embeddings of random tokens; zeros; any other text: the embeddings of its tokens, "
        "repeated or cut to the length; by default random, and zeros where mode=add",
    )

    @property
    def start(self) -> str:
        """`init`, with its default."""
        return self.init if self.init is not None else "zeros" if self.mode == "add" else "random"

    def lengthens(self, site: Sequence) -> int:
        return self.length if self.mode == "prepend" else 0

    def refuses(self, site: Sequence) -> str | None:
        if self.start != "random" and self.start != "zeros" and site.vocabulary is None:
            return f'init="{self.start}" takes embeddings of tokens, and it has no tokens: use init=random'
        return None

    def state(self, site: Sequence) -> dict[str, State]:
        start = torch.nn.init.zeros_ if self.start == "zeros" else torch.nn.init.normal_
        return {"embedding": State((self.length, site.width), start)}

    def missing(self, site: Sequence) -> str | None:
        if self.start not in STARTS and not site.tokenize(self.start):
            return (
                f'init="{self.start}" needs the model\'s tokenizer, and there is none where the model came from: '
                "load it from a folder that has one, or use init=vocab"
            )
        return None

    def initialise(self, site: Sequence, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        if self.start in ("random", "zeros"):
            return
        tokens = torch.randint(0, weight.shape[0], (self.length,))
        if self.start != "vocab":
            found = site.tokenize(self.start)
            assert found
            tokens = torch.tensor([found[place % len(found)] for place in range(self.length)])
        state["embedding"].copy_(weight[tokens.to(weight.device)])

    def rewrite(self, site: Sequence, x: Tensor, embedding: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.mode == "prepend":
            return site.join(embedding, x)
        if mask is None:
            padded = F.pad(embedding, (0, 0, 0, x.shape[1]))
            return x + padded[: x.shape[1]].to(x.dtype)
        there = mask.long()
        place = torch.where(there > 0, there.cumsum(1) - 1, self.length).clamp(max=self.length)
        return x + F.embedding(place, F.pad(embedding, (0, 0, 0, 1))).to(x.dtype)

    def unexportable(self, site: Sequence) -> str | None:
        if self.mode == "add":
            return "its prompts stand in front of the input"
        return "its prompts stand before tokens" if site.vocabulary is None else None

    def to_peft(self, site: Sequence, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": self.length, "token_dim": site.width}
        return settings, {"prompt_embeddings": state["embedding"]}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != {"prompt_embeddings"}:
            return None
        # For encoder-decoder models HF PEFT keeps rows for the decoder too, and uses those of the encoder alone.
        length = config["num_virtual_tokens"]
        return {"length": length}, {"embedding": tensors["prompt_embeddings"][:length]}
