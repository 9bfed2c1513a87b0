"""An example for a model of transformers, by what it says of itself and what it takes.

Only names that transformers itself fixes for all models are used (`main_input_name`, `pixel_values`, `labels`, …).
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from peftc.capture.errors import NeedsExample
from peftc.capture.examples.asking import answer
from peftc.capture.examples.draft import Draft, Subject
from peftc.capture.examples.images import images, patches
from peftc.capture.examples.labels import traceable, with_labels
from peftc.capture.examples.placeholders import text, with_text
from peftc.capture.examples.sounds import sounds
from peftc.capture.untouched import untouched
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError

SEEN = {"pixel_values": "image", "flattened_patches": "image", "input_features": "audio", "input_values": "audio"}


def made_for(model: PreTrainedModel, *, reads_alone: bool = False) -> Draft:
    """One valid batch: what is read, heard or seen, masks, decoder tokens, labels, by the names `forward` takes.

    `reads_alone`: of what is read alone.

    Raises:
        PeftcError: `needs-example`, with what the likeliest of the inputs that were tried led to.
    """
    subject = Subject(model)
    failures: list[str] = []
    with untouched(model):
        for draft in [text(subject)] if reads_alone else _drafts(subject):
            wholes = with_labels(subject, draft)
            while True:
                try:  # a forward that does not take them raises anything
                    if (whole := next(wholes, None)) is None:
                        break
                    answer(model, whole.given, {**whole.fixed, **_uncached(subject)}, likely=whole.likely)
                    return traceable(whole)
                except Exception as error:
                    failures.append(f"{draft}: {type(error).__name__}: {error}".splitlines()[0])
                    debug.tell(2, [f"{type(model).__name__} does not take {failures[-1]}"])
    raise PeftcError(NeedsExample(model=type(model).__name__, tried=failures[0] if failures else ""))


def _uncached(subject: Subject) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in subject.accepts else {}


def _seen(subject: Subject, name: str) -> Iterator[Draft]:
    if name == "pixel_values":
        return images(subject)
    return patches(subject, name) if SEEN[name] == "image" else sounds(subject, name)


def _drafts(subject: Subject) -> Iterator[Draft]:
    """Everything that the model may take, with all that it can see or hear before its text alone."""
    names = [name for name in SEEN if name in subject.accepts]
    reads = "input_ids" in subject.accepts
    for name in names:
        for seen in _seen(subject, name):
            if reads:
                yield from with_text(subject, seen, SEEN[name])
            if not reads or subject.main == name:
                yield seen
    if reads:
        yield text(subject)
