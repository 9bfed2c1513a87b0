"""Labels in the shape of what a model answers; never told by the class's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peftc.capture.examples.asking import answer
from peftc.capture.examples.draft import BATCH, LENGTH, Draft, Subject
from peftc.capture.examples.settings import plain_token

SPOKEN = 3  # letters in a sound, far fewer than its frames


def with_labels(subject: Subject, draft: Draft) -> Iterator[Draft]:
    """The draft with labels that may fit, the likeliest first; as it is where the model takes none."""
    plain, accepts = plain_token(subject.config), subject.accepts
    decoded = subject.counts(BATCH, LENGTH + 1, value=plain)
    if "labels" not in accepts:
        yield draft.plus({"decoder_input_ids": decoded} if "decoder_input_ids" in accepts else {})
    elif subject.config.is_encoder_decoder and subject.model.can_generate():
        yield draft.plus({"labels": decoded})
        if "decoder_input_ids" in accepts:  # where the configuration does not say what a text begins with
            yield draft.plus({"decoder_input_ids": decoded.clone(), "labels": decoded})
    elif subject.model.can_generate() and "input_ids" in draft.given:
        yield draft.plus({"labels": torch.full_like(draft.given["input_ids"], plain)})
    else:
        yield from (draft.plus({"labels": labels}) for labels in _like_logits(subject, draft, plain))


def traceable(draft: Draft) -> Draft:
    """The draft without the letters of a sound: a CTC loss goes by their numbers, and is no part of a graph."""
    labels = draft.given.get("labels")
    heard = labels is not None and not draft.given.keys() & {"input_ids", "decoder_input_ids"}
    if labels is None or not heard or labels.shape != (BATCH, SPOKEN):
        return draft
    return replace(draft, given={name: value for name, value in draft.given.items() if name != "labels"})


def _like_logits(subject: Subject, draft: Draft, plain: int) -> Iterator[Tensor]:
    """One label a token, or one an example (a class, or a number to regress)."""
    given = {name: value for name, value in draft.given.items() if name != "attention_mask"}
    answered = answer(subject.model, given, draft.fixed, likely=draft.likely)  # no mask: its values would be looked at
    if answered is None:
        return
    logits: Tensor = answered.logits
    kind = getattr(subject.config, "problem_type", None)
    if logits.dim() == 3:
        if "input_ids" not in given:  # what is said, without when it is
            yield subject.counts(BATCH, SPOKEN, value=plain)
        yield subject.counts(*logits.shape[:2])
    elif logits.shape[-1] == 1 or kind in ("regression", "multi_label_classification"):
        yield subject.numbers(*(logits.shape if logits.shape[-1] > 1 else logits.shape[:1]))
    else:
        yield subject.counts(logits.shape[0], value=0)
