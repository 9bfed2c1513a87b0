"""What `peftc bench --json` prints, as types."""

from __future__ import annotations

from typing import TypedDict


class Ratios(TypedDict):
    seconds: float | None
    saved: float | None
    peak: float | None
    flops: float | None


class Measured(TypedDict):
    """None where it could not be measured, or there is no such variant."""

    name: str
    seconds: float | None
    saved: int | None
    peak: int | None
    flops: int | None
    loss: float | None
    gradient: float | None
    trainable: int | None
    note: str
    agrees: bool
    ratio: Ratios


class _Run(TypedDict):
    model: str
    spec: str
    batch: int
    dtype: str
    device: str
    threads: int
    repeats: int
    versions: dict[str, str]
    agrees: bool


class Bench(_Run):
    seq: int
    rows: list[Measured]


class WrittenText(TypedDict):
    name: str
    seconds: float | None
    tokens: float | None
    peak: int | None
    note: str
    agrees: bool
    ratio: float | None


class GenerationBench(_Run):
    prompt: int
    new: int
    rows: list[WrittenText]


class Launches(TypedDict):
    name: str
    launches: int
    bytes: int
    flops: int


class OverHfPeft(TypedDict):
    launches: float | None
    bytes: float | None
    flops: float | None


class Counted(TypedDict):
    name: str
    launches: int | None
    bytes: int | None
    flops: int | None
    waits: int | None
    seconds: float | None
    note: str
    over_hf_peft: OverHfPeft
    kinds: list[Launches]


class Card(TypedDict):
    name: str
    bandwidth: float
    half: float
    full: float


class Count(TypedDict):
    model: str
    spec: str
    batch: int
    seq: int
    dtype: str
    card: Card | None
    rows: list[Counted]
    time: dict[str, float]
