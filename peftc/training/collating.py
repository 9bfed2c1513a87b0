"""Examples and how several are one batch: in a row without padding, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

import peftc
from peftc.capture.checkpoints.errors import NoTokenizer
from peftc.capture.checkpoints.tokenizers import read_image_processor, read_tokenizer
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.extras import NeedsExtra
from peftc.planning.plan import extension
from peftc.training.columns import Data
from peftc.training.errors import BadSettings, WrongModel
from peftc.training.records import Record
from peftc.training.tokens import Encoded, Encoder, numbered

FIRST = 8  # tokens of a text on which it is tried whether texts are kept apart


@dataclass(frozen=True)
class Examples:
    """What is learnt and what is held out, as token ids or pixels.

    `cut` examples were too long, and `dropped` ones teach nothing.
    """

    learnt: Sequence[Encoded]
    held: Sequence[Encoded]
    collate: Callable[[list[Encoded]], Encoded]
    cut: int
    dropped: int


def encoded(
    data: Data, held: Data | None, compiled: peftc.CompiledModule, *, source: str, longest: int, packing: bool,
    template: str | None, trusted: bool,
) -> Examples:  # fmt: skip
    """Examples for a model.

    Args:
        data: what is learnt.
        held: what is not.
        compiled: the model, which says whether it has an encoder.
        source: a folder or hub id with the tokenizer or image processor.
        longest: tokens of an example.
        packing: texts stand in a row without padding, told apart by their positions, where the model can.
        template: a file with a chat template in place of the tokenizer's.
        trusted: Python code of `source` may run.

    Raises:
        PeftcError: `no-tokenizer`, `wrong-model`, and what `Encoder.encode` raises.
    """
    if data.shape.learns == "images":
        processor = read_image_processor(source, trusted=trusted)
        parts = [[_pixels(data, record, processor) for record in part.records] for part in (data, held) if part]
        return Examples(parts[0], parts[1] if held else (), default_data_collator, 0, 0)
    tokenizer = tokenizer_of(source, trusted=trusted)
    _fits(tokenizer, compiled, source)
    pairs = bool(getattr(compiled.config, "is_encoder_decoder", False))
    generative = data.shape.learns in ("text", "answers")
    if generative:
        _generates(data, compiled, pairs=pairs)
    encoder = Encoder(
        tokenizer, min([longest, *_rooms(compiled)]), None if template is None else _text_of(template), pairs
    )
    learnt = encoder.encode(data)
    cut, dropped = encoder.cut, encoder.dropped
    kept = encoder.encode(held) if held else []
    if generative and packing and not pairs and _packs(compiled, learnt):
        # The first token of each text follows no other: the collator sees to that its label is none.
        return Examples(learnt, kept, DataCollatorWithFlattening(), cut, dropped)
    collators: dict[str, Any] = {"tags": DataCollatorForTokenClassification, "labels": DataCollatorWithPadding}
    collate = collators.get(data.shape.learns, DataCollatorForSeq2Seq)(tokenizer)
    return Examples(learnt, kept, collate, cut, dropped)


def tokenizer_of(source: str, *, trusted: bool) -> Any:
    """The tokenizer in a folder, of a hub's model or in a file of one; it can pad.

    Raises:
        PeftcError: `no-tokenizer`.
    """
    tokenizer = read_tokenizer(source, trusted=trusted)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _fits(tokenizer: Any, compiled: peftc.CompiledModule, source: str) -> None:
    known = getattr(compiled.config, "vocab_size", None)
    if not tokenizer.is_fast:
        reason = "it is none of transformers' fast ones, which say where in a text a token stands"
        raise PeftcError(NoTokenizer(what="tokenizer", source=source, reason=reason))
    if isinstance(known, int) and len(tokenizer) > known:
        reason = f"the tokenizer of {source} has {len(tokenizer)} tokens, and the model {known}"
        raise PeftcError(WrongModel(model=type(compiled.base).__name__, data="these tokens", reason=reason))


def _generates(data: Data, compiled: peftc.CompiledModule, *, pairs: bool) -> None:
    """A text is continued, and not filled in, classified or copied."""
    model = type(compiled.base).__name__
    if pairs and data.shape.learns == "text":
        reason = "it reads one text and writes another, as prompt and completion are"
    elif (
        model in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        and not pairs
    ):
        reason = "it fills in masked words, and does not continue a text"
    elif model in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        reason = "it classifies texts; try --task text-generation"
    else:
        return
    raise PeftcError(WrongModel(model=model, data=f"{data.source} ({data.shape})", reason=reason))


def _packs(compiled: peftc.CompiledModule, examples: Sequence[Encoded]) -> bool:
    """Whether the model keeps texts in a row apart: some take no positions, and others remember all that they read.

    What is learnt is the same of padded texts, which take longer.
    """
    short = [{name: one[name][:FIRST] for name in ("input_ids", "labels")} for one in (examples[0], examples[-1])]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            compiled(**DataCollatorWithFlattening()(short))
    except TypeError:
        return False
    except PeftcError as error:
        if any(problem.code != "texts-mix" for problem in error.diagnostics):
            raise
        return False
    return True


def _rooms(compiled: peftc.CompiledModule) -> list[int]:
    """The tokens that there are positions for, beside those of prompts that are learnt."""
    return [
        site.positions - extension(b for b in compiled.plan.bindings if b.site is site)
        for site in compiled.plan.sites.sequences
        if site.positions is not None
    ]


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PeftcError(BadSettings(where="--chat-template", reason=str(error))) from None


def _pixels(data: Data, record: Record, processor: Any) -> Encoded:
    """An image as a processor makes it, `pixel_values` [channels, height, width], and its class."""
    try:
        from PIL import Image
    except ImportError:
        raise PeftcError(NeedsExtra(command="reading images", package="pillow", extra="train")) from None
    given = record.fields["image"]
    try:
        image = given if isinstance(given, Image.Image) else Image.open(Path(record.file).parent / given)
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    except Exception as error:  # of whichever library reads it
        raise PeftcError(record.wrong(f"the image cannot be read: {error}", "image")) from error
    return {"pixel_values": pixels, "labels": numbered(data, record.fields["label"])}
