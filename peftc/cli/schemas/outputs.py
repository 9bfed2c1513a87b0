"""What commands print with `--json`, as types; `schemas` makes JSON schemas of them.

Where a command has a mistake of the user to tell it prints `Errors` instead.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from peftc.cli.schemas.benches import Bench, Count, GenerationBench


class Place(TypedDict):
    file: str | None
    line: int | None
    column: int | None
    end_line: int | None
    end_column: int | None


class Remark(Place):
    label: str


class Problem(Place):
    """Lines and columns count from 1, and the end is exclusive."""

    code: str
    title: str
    label: str
    notes: list[str]
    secondary: list[Remark]


class Errors(TypedDict):
    errors: list[Problem]


class Formatted(TypedDict):
    changed: list[str]
    unchanged: list[str]


class Statement(TypedDict):
    statement: str
    sites: int
    parameters: int
    task: NotRequired[str]
    bytes: NotRequired[int]
    dense_bytes: NotRequired[int]


class Binding(TypedDict):
    method: str
    site: str
    path: str


class Stored(TypedDict):
    weight: str
    storage: str
    path: str
    bytes: int


class Fitted(TypedDict):
    """What was chosen for a `fit` statement, as spec text; what it comes to and costs, in words."""

    statement: str
    chosen: list[str]
    comes_to: str
    costs: str


class Island(TypedDict):
    module: str
    where: str
    reason: str


class Plan(TypedDict):
    """`fresh` and `unread`: tensors that a checkpoint lacks, and that it has for nothing."""

    model: str
    trainable: int
    total: int
    share: float
    statements: list[Statement]
    bindings: list[Binding]
    trained: list[str]
    checkpoints: list[str]
    stored: list[Stored]
    fitted: NotRequired[list[Fitted]]
    islands: NotRequired[list[Island]]
    fresh: NotRequired[list[str]]
    unread: NotRequired[list[str]]
    tasks: NotRequired[dict[str, Plan]]


class Memory(TypedDict):
    """Bytes of one training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


class Rank(Memory):
    """On one process; `gathered` is whole there for a time."""

    gathered: int


class Planned(Plan):
    memory: Memory
    ranks: NotRequired[list[Rank]]
    seconds: dict[str, float]


class Miss(TypedDict):
    at: str
    within: str
    reason: str
    nodes: list[str]


class Fused(TypedDict):
    rule: str
    fired: int
    places: int
    nearest_miss: Miss | None
    telling: bool


class Compiled(Plan):
    fusions: list[Fused]
    seconds: dict[str, float]
    artifact: str | None
    notes: list[str]


class Site(TypedDict):
    """And further numbers, by the kind of site."""

    name: str
    kind: str
    roles: list[str]
    layer: int | None
    stack: str | None
    parameters: list[str]


class Absence(TypedDict):
    role: str
    name: str
    operation: str
    module: str
    line: str
    residual: bool
    reason: str


class Sites(TypedDict):
    model: str
    sites: list[Site]
    absent: list[Absence]


class Matched(TypedDict):
    """`note`: what a `fit` comes to, which names no places."""

    statement: str
    file: str
    line: int
    places: list[str]
    left_out: dict[str, list[str]]
    note: str


class Reason(TypedDict):
    name: str
    roles: list[str]
    facts: dict[str, Any]
    evidence: list[str]
    statements: list[str]


class Parameter(TypedDict):
    default: bool | int | float | str | None
    required: bool
    doc: str
    expects: str
    alias: NotRequired[str]


class Method(TypedDict):
    name: str
    noun: str
    summary: str
    formula: str
    paper: str
    parameters: dict[str, Parameter]
    site: NotRequired[str]
    sites: NotRequired[list[str]]
    merges: NotRequired[bool]


class Rounding(TypedDict):
    largest: float
    relative: float


class Merged(TypedDict):
    model: str
    folder: str
    seconds: dict[str, float]
    packed: bool
    lost: dict[str, Rounding]


class Combined(TypedDict):
    """`kind`: "peft", a folder of HF PEFT, or "artifact"; `ranks`: those that the one adapter has."""

    folder: str
    kind: str
    how: str
    weights: list[float]
    modules: int
    ranks: list[int]


class ExportedFile(TypedDict):
    path: str
    tensors: int
    rank: int | None


class Exported(TypedDict):
    to: str
    merged: bool
    written: list[ExportedFile]
    seconds: dict[str, float]


class Generated(TypedDict):
    prompt: str
    text: str
    tokens: int
    seconds: float


class Files(TypedDict):
    """By format, of `--html`, `--dot` and `--mermaid`."""

    written: dict[str, str]


class Origin(TypedDict):
    statement: str
    file: str
    line: int


class Node(TypedDict):
    id: str
    kind: str
    op: str
    name: str
    shape: str
    inserted: bool
    trainable: bool
    origins: list[Origin]
    notes: list[str]
    reads: list[str]
    made: str
    sites: list[str]
    python: list[str]
    source: str
    opens: str
    folded: bool


class Edge(TypedDict):
    source: str
    target: str
    argument: str
    through: list[str]


class Drawn(TypedDict):
    """Nodes and edges, of a block or, where that is null, of the whole model."""

    model: str
    block: str | None
    after: str
    passes: list[str]
    inserted: int
    title: str
    nodes: list[Node]
    edges: list[Edge]


class Trained(TypedDict):
    """`metrics` are the Trainer's, of what is held out; `peak_memory` counts bytes."""

    steps: int
    resumed_at: int
    losses: list[float]
    metrics: dict[str, float]
    examples: int
    held_out: int
    cut: int
    dropped: int
    peak_memory: int
    written: dict[str, str]
    seconds: dict[str, float]


OPEN = (Site,)  # which have more than is said here
OUTPUTS: dict[str, Any] = {
    "compile": Compiled, "plan": Planned, "check": Errors, "explain": list[Matched] | list[Reason], "sites": Sites,
    "methods": list[Method], "show": Drawn | Files, "merge": Merged, "combine": Combined, "export": Exported,
    "generate": Generated, "bench": Bench | GenerationBench | Count, "fmt": Formatted, "train": Trained,
}  # fmt: skip
