"""Rows of the vocabulary that learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.stages import SublayerMethod

from ..sites.vocabulary import Vocabulary


@method
class Tokens(SublayerMethod):
    """The embeddings of a few tokens learn, such as of those that were added for a task; the others stay.

    Where the head is the same table, its rows are these, too.
    """

    name = "tokens"
    formula = "y_t = E_t for t of ids, where the input has token t; of a tied head y_t = E_t h"
    paper = "HF PEFT, TrainableTokens, 2025"
    site = Vocabulary
    unmergeable = "what merges is put into linear layers, and these are rows of a table"
    peft_type = "TRAINABLE_TOKENS"
    peft_settings = ("token_indices",)
    peft_tensors: ClassVar = {"trainable_tokens_delta": "learned"}

    ids: str = param("0", 'the tokens, by their ids: "5, 17"')

    @property
    def numbers(self) -> list[int]:
        """The ids, ascending, as the rows lie."""
        return sorted(int(part) for part in self.ids.split(","))

    def conflict(self) -> str | None:
        parts = [part.strip() for part in self.ids.split(",")]
        if odd := [part for part in parts if not (part.isascii() and part.isdecimal())]:
            return f'ids="{self.ids}" has {odd[0]!r}, which is no id'
        return f'ids="{self.ids}" has an id twice' if len({*map(int, parts)}) < len(parts) else None

    def refuses(self, site: Vocabulary) -> str | None:
        last = self.numbers[-1]
        return f"ids has {last}, and the table has {site.tokens} rows" if last >= site.tokens else None

    def state(self, site: Vocabulary) -> dict[str, State]:
        return {}

    def shares(self, sites: Sequence[Vocabulary]) -> list[dict[str, State]]:
        """What reads one table has one set of rows."""
        tables: dict[tuple[str, ...], dict[str, State]] = {}
        for site in sites:
            shape = (len(self.numbers), site.width)
            tables.setdefault(site.parameters, {
                "learned": State(shape),
                "before": State(shape, trainable=False),
                "ids": State(shape[:1], self._ids, False, torch.int64, site.tokens),
            })  # fmt: skip
        return [tables[site.parameters] for site in sites]

    def _ids(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.tensor(self.numbers))

    def initialise(self, site: Vocabulary, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        for name in ("learned", "before"):
            state[name].copy_(weight[state["ids"].to(weight.device)])

    def rewrite(self, site: Vocabulary, x: Tensor, y: Tensor, learned: Tensor, before: Tensor, ids: Tensor) -> Tensor:
        if site.is_head:
            return y.index_add(-1, ids, F.linear(x.to(learned.dtype), learned - before).to(y.dtype))
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        return torch.where((ids[place] == x)[..., None], learned[place].to(y.dtype), y)

    def to_peft(self, site: Vocabulary, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"token_indices": self.numbers}, tensors
