"""Sounds, in the shapes in which models take them: waves, or frames of features."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftc.capture.examples.draft import BATCH, Draft, Subject
from peftc.capture.examples.settings import numbers

WAVES = (16000, 48000)  # a second, and what takes longer strides
BANDS = (
    "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_projection_input_dim", "input_dim",
    "mel_bins", "num_mels", "input_feat_size", "n_mel_bins",
)  # fmt: skip
USUAL_BANDS, USUAL_FRAMES = (80, 128), (128, 100, 3000)
MASKS = ("input_features_mask", "padding_mask", "feature_attention_mask", "attention_mask")


def sounds(subject: Subject, name: str) -> Iterator[Draft]:
    """A sound for each row, as `name`, the likeliest shape first."""
    config = subject.config
    first = [module.in_features for module in subject.model.modules() if isinstance(module, nn.Linear)][:1]
    bands = list(dict.fromkeys((*numbers(config, *BANDS), *first, *USUAL_BANDS)))  # Granite stacks four frames in one
    halved = [2 * length for length in numbers(config, "max_source_positions")]  # two frames make a position
    frames = list(dict.fromkeys((*halved, *numbers(config, "max_length", "max_source_positions"), *USUAL_FRAMES)))
    waves = [(shape, length) for length in WAVES for shape in ((length,), (1, length))]
    tables = [(shape, length) for count in bands for length in frames for shape in ((length, count), (count, length))]
    heard = MASKS if "input_ids" not in subject.accepts else MASKS[:-1]  # else that is the text's
    masks = [mask for mask in heard if mask in subject.accepts]
    for shape, length in (*waves, *tables) if name == "input_values" else tables:
        yield (draft := Draft({name: subject.numbers(BATCH, *shape)}))
        for mask in masks:
            yield draft.plus({mask: subject.counts(BATCH, length)})
