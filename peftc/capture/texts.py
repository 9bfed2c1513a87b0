"""Several texts in a row: where they end, in the words of those collators that leave out the padding.

`position_ids` that begin again say it, and so do the bounds for kernels of attention (`cu_seq_lens_q` and the like) and
`seq_idx`, the number of each token's text. They are one piece of information, which is held against itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftc.capture.errors import TextsDisagree
from peftc.diagnostics.diagnostic import PeftcError

POSITIONS, MASK, NUMBERS = "position_ids", "attention_mask", "seq_idx"
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
LENGTHS = ("max_length_q", "max_length_k")
SAYINGS = frozenset({*BOUNDS, *LENGTHS, NUMBERS})


def firsts(positions: Tensor) -> Tensor:
    """Which tokens begin a text, bool [rows, tokens]: those whose position is not one more than the one before."""
    found = torch.ones_like(positions, dtype=torch.bool)
    found[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return found


def with_positions(given: Mapping[str, Any], main: str) -> dict[str, Any]:
    """The inputs of a call with what they say of texts in a row said by positions alone.

    Args:
        given: inputs by name.
        main: the name of the tokens, or of their embeddings.

    Raises:
        PeftcError: `texts-disagree` where they say different things, or where a mask stands beside several texts.
    """
    said = {name: value for name, value in given.items() if name in SAYINGS and value is not None}
    rest = {name: value for name, value in given.items() if name not in SAYINGS}
    tokens = next((rest[name] for name in (main, "input_ids", "inputs_embeds") if rest.get(name) is not None), None)
    if not said or not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return dict(given)
    shape, positions = tokens.shape[:2], rest.get(POSITIONS)
    told = {name: _begun(name, value, shape) for name, value in said.items() if name not in LENGTHS}
    told = {name: begins.to(tokens.device) for name, begins in told.items()}
    if isinstance(positions, Tensor):
        if positions.dim() != 2:
            return dict(given)
        told[POSITIONS] = firsts(positions).expand(shape)
    if not told:
        return dict(given)
    (first, begins), *others = told.items()
    for name, other in others:
        if not torch.equal(begins, other):
            raise PeftcError(TextsDisagree(one=first, other=name, reason="they end texts at different tokens"))
    places = torch.arange(begins.numel(), device=begins.device)
    starts = torch.where(begins.flatten(), places, 0).cummax(0).values
    counted = (places - starts).view(shape)
    for name in LENGTHS:
        if name in said and int(said[name]) <= int(counted.max()):
            reason = f"a text has {int(counted.max()) + 1} tokens, and {name} is {int(said[name])}"
            raise PeftcError(TextsDisagree(one=first, other=name, reason=reason))
    if rest.get(MASK) is not None and bool(begins[:, 1:].any()):
        reason = "beside a mask positions tell no texts apart: leave it out"
        raise PeftcError(TextsDisagree(one=first, other=MASK, reason=reason))
    return rest if positions is not None or MASK in rest else rest | {POSITIONS: counted}


def _begun(name: str, said: Any, shape: torch.Size) -> Tensor:
    """Which tokens of rows of this shape begin a text.

    Raises:
        PeftcError: `texts-disagree` where what is said is not of such rows.
    """
    said = torch.as_tensor(said)
    if name == NUMBERS:
        if said.shape != shape:
            raise PeftcError(_other_tokens(name, f"it has the shape {list(said.shape)}", shape))
        found = torch.ones(shape, dtype=torch.bool, device=said.device)
        found[:, 1:] = said[:, 1:] != said[:, :-1]
        return found
    ends, total = said.flatten().tolist(), shape.numel()
    if said.dim() != 1 or not ends or ends[0] != 0 or ends[-1] != total or sorted(ends) != ends:
        raise PeftcError(_other_tokens(name, "it does not go from 0 up to all tokens", shape))
    flat = torch.zeros(total, dtype=torch.bool, device=said.device)
    flat[[end for end in ends if end < total]] = True
    found = flat.view(shape)
    if total and not bool(found[:, 0].all()):
        raise PeftcError(_other_tokens(name, "a text goes on in the next row", shape))
    return found


def _other_tokens(name: str, reason: str, shape: torch.Size) -> TextsDisagree:
    return TextsDisagree(one=f"{shape[0]} × {shape[1]} tokens", other=name, reason=reason)
