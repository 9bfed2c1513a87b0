"""Tokens in a text that stand for an image or a sound: as many as the model makes of one, which it is asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftc.capture.examples.asking import Method, answer
from peftc.capture.examples.draft import BATCH, LENGTH, Draft, Subject
from peftc.capture.examples.settings import numbers, parts, plain_token
from peftc.capture.examples.settled import MODALITIES, Settled
from peftc.diagnostics import debug

# What of a text belongs to an image, where a forward is told.
KIND, PLACES, SEES = "token_type_ids", "image_embeds_position_mask", "image_attention_mask"
COUNTS = (
    "image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens", "image_token_num",
    "num_query_tokens", "latent_query_num",
)  # fmt: skip


def text(subject: Subject, length: int = LENGTH) -> Draft:
    """Tokens, and what goes with them."""
    tokens = subject.counts(BATCH, length, value=plain_token(subject.config))
    given = {"input_ids": tokens}
    if "attention_mask" in subject.accepts:
        given["attention_mask"] = torch.ones_like(tokens)
    if "token_type_ids" in subject.accepts and getattr(subject.config, "type_vocab_size", None):
        given["token_type_ids"] = torch.zeros_like(tokens)
    return Draft(given, likely=True)


def with_text(subject: Subject, seen: Draft, kind: str) -> Iterator[Draft]:
    """Texts with an image or a sound in each, the likeliest first.

    Args:
        subject: the model.
        seen: the images or sounds.
        kind: image or audio, as transformers names what belongs to them.
    """
    tokens: list[int | None] = list(_tokens(subject, kind))
    try:
        many = _made_of(subject, seen, kind)
    except Exception as error:  # it has such a method, and that does not take them
        debug.tell(2, [f"{type(subject.model).__name__} sees nothing in {seen}: {error}"])
        return
    counts = [0, *numbers(subject.config, *COUNTS)] if many is None else [many] if tokens else [many, 0]
    for count in counts:
        for token in tokens or [None] if count else [None]:
            yield from (replace(draft, likely=bool(many)) for draft in _around(subject, seen, token, count))


def _around(subject: Subject, seen: Draft, token: int | None, count: int) -> Iterator[Draft]:
    """A text with `count` times the token between what may begin and end an image."""
    plain, config = plain_token(subject.config), subject.config
    begin, end = numbers(config, "vision_start_token_id")[:1], numbers(config, "vision_end_token_id")[:1]
    row = [plain, *begin, *[token if token is not None else plain] * count, *end, *[plain] * LENGTH]
    tokens = torch.tensor([row] * BATCH)
    given = {"input_ids": tokens}
    if "attention_mask" in subject.accepts:
        given["attention_mask"] = torch.ones_like(tokens)
    for name in subject.needed:
        if name.endswith("input_ids") and name not in given:  # a text for another part of the model
            given[name] = subject.counts(BATCH, LENGTH, value=plain)
    if token is None and count and PLACES in subject.accepts:
        places = [[1 <= place - len(begin) <= count for place in range(len(row))]] * BATCH
        given[PLACES] = torch.tensor(places)
    if SEES in subject.accepts:  # every token each image
        given[SEES] = subject.counts(*tokens.shape, next(iter(seen.given.values())).shape[1])
    kinds = torch.eq(tokens, token).long() if token is not None else torch.zeros_like(tokens)
    given |= {name: kinds.clone() for name in (KIND, MODALITIES) if name in subject.accepts}
    told = Settled.of(subject.model, seen.fixed).with_positions({**given, **seen.fixed})
    given = {name: value.to(subject.model.device) for name, value in told.items() if name not in seen.fixed}
    yield Draft(given).plus(seen.given, **seen.fixed)


def _tokens(subject: Subject, kind: str) -> Iterator[int]:
    """What may be the token that stands for an image or a sound, as the configuration calls it."""
    exact = re.compile(rf"^{kind}_token_(id|index)$")
    likely = re.compile(rf"({kind}|media|patch).*token|token.*{kind}|^video_token_(id|index)$")  # clips are images, too
    for pattern in (exact, likely):
        for part in parts(subject.config):
            for name, value in vars(part).items():
                if pattern.search(name) and type(value) is int and value >= 0:
                    yield value


def _made_of(subject: Subject, seen: Draft, kind: str) -> int | None:
    """How many tokens the model makes of each image or sound; None where it has no method for that."""
    found = _method(subject, f"get_{kind}_features", next(iter(seen.given)))
    if found is None:
        return None
    accepts = inspect.signature(found).parameters
    given = {name: value for name, value in seen.given.items() if name in accepts}
    fixed = {name: value for name, value in seen.fixed.items() if name in accepts}
    for name in accepts.keys() & set(subject.needed) - given.keys() - fixed.keys():
        given[name] = subject.counts(BATCH, LENGTH)  # a text for the part that sees
    result = answer(Method(subject.model, found), given, fixed)
    return None if result is None else _rows(result) // BATCH


def _method(subject: Subject, name: str, takes: str) -> Callable[..., Any] | None:
    """The model's method of this name, or that of a part of it, which says that it takes such an input."""
    found = [method for module in subject.model.modules() if (method := getattr(module, name, None)) is not None]
    return next((method for method in found if takes in inspect.signature(method).parameters), None)


def _rows(result: Any) -> int:
    """How many vectors the features are, of one image or in a list of them."""
    if isinstance(result, Mapping):
        first = result.get("pooler_output")
        result = first if first is not None else result["last_hidden_state"]
    if isinstance(result, Tensor):
        return result.numel() // result.shape[-1]
    return sum(_rows(one) for one in result if isinstance(one, Tensor | list | tuple))
