"""What masks say that transformers makes, and others, against the masks themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from transformers import masking_utils

from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from peftc.graph.masks import Seen, seen

CONFIG = hf.LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
CONFIG._attn_implementation = "sdpa"
CONFIG.sliding_window = 3
CONFIG.attention_chunk_size = 4
Mask = Callable[[Tensor], Tensor]


def of_transformers(name: str, with_positions: bool = True, **more: Any) -> Mask:
    def made(positions: Tensor) -> Tensor:
        embeds = positions[:, :, None].float()
        own = {"position_ids": positions} if with_positions else {}
        found: Tensor = getattr(masking_utils, name)(CONFIG, embeds, attention_mask=None, cache=None, **own, **more)
        return found

    return made


def texts(positions: Tensor) -> Tensor:
    number = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    return number[:, None, :, None] == number[:, None, None, :]


def places(positions: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.arange(positions.shape[1])
    return one[:, None], one[None, :]


def by_places(rule: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    return lambda positions: texts(positions) & rule(*places(positions))


# What is read of each, or None where it says something else.
CASES: dict[str, tuple[Mask, tuple[bool, int | None, bool] | None]] = {
    "causal": (of_transformers("create_causal_mask"), (True, None, True)),
    "window": (of_transformers("create_sliding_window_causal_mask"), (True, 3, True)),
    "no positions": (of_transformers("create_causal_mask", False), (True, None, False)),
    "chunks": (of_transformers("create_chunked_causal_mask"), None),
    "one of two rules": (by_places(lambda q, k: (k <= q) | (q == k - 1)), None),
    "texts alone": (texts, (False, None, True)),
    "places": (by_places(lambda q, k: k <= q), (True, None, True)),
    "turned round": (by_places(lambda q, k: q > k - 1), (True, None, True)),
    "a window of places": (by_places(lambda q, k: (k <= q) & (q - 5 < k)), (True, 5, True)),
    "a window that ends with it": (by_places(lambda q, k: (k <= q) & (q - 5 <= k)), (True, 6, True)),
    "a window on both sides": (by_places(lambda q, k: q - 5 < k), None),
    "those behind": (by_places(lambda q, k: k >= q), None),
    "the one before, too": (by_places(lambda q, k: k <= q + 1), None),
    "none of its own": (by_places(lambda q, k: k < q), None),
    "steps of two": (lambda p: (torch.diff(p, prepend=p[:, :1] - 2) != 2).cumsum(-1)[:, None, :, None] <= 0, None),
    "positions across texts": (lambda p: p[:, None, None, :] <= p[:, None, :, None], None),
    "queries and keys of other tokens": (
        lambda p: texts(p) & (p[:, None, None, :] <= p.flip(1)[:, None, :, None]), None,
    ),
}  # fmt: skip


class Masked(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, positions: Tensor) -> Tensor:
        return self.mask(positions)


def captured(mask: Mask) -> fx.GraphModule:
    example = example_inputs(Masked(mask), {"positions": torch.arange(8).expand(2, 8).contiguous()})
    return capture(Masked(mask), example).module


def packed(*lengths: int, start: int = 0) -> Tensor:
    return torch.cat([torch.arange(start, start + length) for length in lengths])


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_exactly(case: str) -> None:
    mask, expected = CASES[case]
    module = captured(mask)
    (result,) = module.graph.output_node().args
    node = result[0] if isinstance(result, tuple) else result
    assert isinstance(node, fx.Node)
    found = seen(node)
    if expected is None:
        assert found is None
        return
    assert found is not None
    causal, window, by_positions = expected
    positions = next(iter(module.graph.find_nodes(op="placeholder")))
    assert found == Seen(causal, window, positions if by_positions else None)
    rows = torch.stack([packed(3, 9, 1, 7), packed(1, 1, 18, start=2)])
    (ours,) = module(rows) if isinstance(result, tuple) else (module(rows),)
    for row, given in enumerate(rows.tolist()):
        text = 0
        owner = [text := text + (i > 0 and given[i] != given[i - 1] + 1) for i in range(20)]
        for q in range(20):
            for k in range(20):
                right = (owner[q] == owner[k] or not by_positions) and (k <= q or not causal)
                right = right and (window is None or q - k < window)
                assert bool(ours[row, 0, q, k] if ours.shape[0] > 1 else ours[0, 0, q, k]) == right
