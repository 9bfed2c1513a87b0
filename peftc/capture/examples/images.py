"""Images, in the shapes in which models take them: whole, in tiles, or as patches in a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftc.capture.examples.draft import BATCH, Draft, Subject
from peftc.capture.examples.settings import numbers, sides

USUAL_SIDES = ((224, 224), (64, 64), (32, 32))
CHANNELS = ("num_channels", "in_channels", "in_chans")
GRID = 4  # rows and columns of patches, where an image may have any number of them
TILES = (1, 2, 3, 5)


def images(subject: Subject) -> Iterator[Draft]:
    """An image for each row, the likeliest shape first."""
    accepts, config = subject.accepts, subject.config
    channels = (numbers(config, *CHANNELS) or [3])[0]
    given_sides = sides(config, "image_size", "input_size", "img_size", "crop_size")
    every = dict.fromkeys((*given_sides, *USUAL_SIDES))
    if "image_grid_thw" in accepts:
        yield from _in_a_row(subject, channels)
    if "spatial_shapes" in accepts:
        yield from _padded(subject, channels)
    for height, width in every:
        whole = Draft({"pixel_values": subject.numbers(BATCH, channels, height, width)})
        yield whole
        if "image_sizes" in accepts:
            yield whole.plus({}, image_sizes=torch.tensor([[height, width]] * BATCH))
    for height, width in list(every)[:2]:
        for tiles in TILES:
            tiled = Draft({"pixel_values": subject.numbers(BATCH, tiles, channels, height, width)})
            yield tiled
            if "image_sizes" in accepts:
                yield tiled.plus({}, image_sizes=torch.tensor([[height, width]] * BATCH))


def patches(subject: Subject, name: str) -> Iterator[Draft]:
    """The patches of each image, [images, patches, its row and column and the numbers of one]."""
    channels = (numbers(subject.config, *CHANNELS) or [3])[0]
    for side in numbers(subject.config, "patch_size") or [16]:
        yield Draft({name: subject.numbers(BATCH, GRID**2, 2 + channels * side**2)})


def _in_a_row(subject: Subject, channels: int) -> Iterator[Draft]:
    """The patches of all images in one row, [all patches, numbers of one], and how many each image has."""
    config = subject.config
    (side, *_), (frames, *_) = numbers(config, "patch_size") or [14], numbers(config, "temporal_patch_size") or [1]
    merged = (numbers(config, "spatial_merge_size", "merge_size") or [2])[0]
    rows = max(GRID, 2 * merged)
    grid = torch.tensor([[1, rows, rows]] * BATCH)
    for shape in ((channels * frames * side**2,), (channels, side, side), (channels, frames, side, side)):
        yield Draft({"pixel_values": subject.numbers(BATCH * rows**2, *shape)}, {"image_grid_thw": grid})


def _padded(subject: Subject, channels: int) -> Iterator[Draft]:
    """The patches of each image in a row of its own, [images, patches, numbers of one], with a mask."""
    side = (numbers(subject.config, "patch_size") or [16])[0]
    pixels = subject.numbers(BATCH, GRID**2, channels * side**2)
    mask = {"pixel_attention_mask": subject.counts(BATCH, GRID**2)}
    yield Draft({"pixel_values": pixels, **mask}, {"spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH)})
