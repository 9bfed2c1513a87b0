"""What came of a sweep over transformers' types: `docs/architectures.json`, and the tables that a page has of it.

python docs/sweeping.py SWEEP.jsonl …    (files that examples/architectures.py wrote, of one version of transformers)

What is known of the same version, and is in none of the files, stays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "architectures.json"
RIGHT, NOT_BUILT, NO_PLACE = "right", "not-built", "absent"
FIRST = "lora"

Types = list[dict[str, Any]]


def kept(files: list[Path], known: Types) -> Types:
    """The last line of each type and spec, in order, without what differs from machine to machine."""
    found = {(one["head"], one["kind"], one["spec"]): one for one in known}
    for result in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        own = {name: result[name] for name in ("head", "kind", "spec", "verdict")}
        reason = result["reasons"][0].splitlines()[0] if result["reasons"] and own["verdict"] != RIGHT else ""
        case = result["head"], result["kind"], result["spec"]
        found[case] = own | {"reason": reason, "islands": len(result["islands"])}
    return [found[case] for case in sorted(found)]


def tables() -> str:
    """How many types of each head are right, what came of the others, and the names of all."""
    swept = json.loads(KEPT.read_text())
    heads: dict[str, Types] = {}
    specs: dict[str, Types] = {}
    for found in swept["types"]:
        apart, name = (heads, found["head"]) if found["spec"] == FIRST else (specs, found["spec"])
        apart.setdefault(name, []).append(found)
    return "\n".join([
        f"transformers {swept['transformers']}, under `apply lora(r=4) to attn.q, attn.v, attn.o, mlp.*`:", "",
        "| head | types that are built | right | of them with islands |", "|---|---:|---:|---:|",
        *(_counted(head, types) for head, types in heads.items()), "",
        "| head | not right | verdict | why |", "|---|---|---|---|",
        *(f"| {head} | {row}" for head, types in heads.items() for row in _others(types)), "",
        *(f"**{head}**, right: {_names(types, RIGHT)}.\n" for head, types in heads.items()),
        "transformers itself makes no tiny model that runs of:", "",
        *(f"- {head}: {names}" for head, types in heads.items() if (names := _names(types, NOT_BUILT))), "",
        f"The other specs of `examples/sweep/specs.py` take turns (`--specs rotate`), and were run on "
        f"{sum(map(len, specs.values()))} types so far. An adapter, a prefix, packed weights and a prompt on images",
        "have no eager form here: *right* says that they compile, run at other sizes and have finite gradients, of an",
        "adapter that it starts as the model is.", "",
        "| spec | types that are built | right | of them with islands | has no place |", "|---|---:|---:|---:|---:|",
        *(f"{_counted(spec, types)} {len(_where(types, NO_PLACE))} |" for spec, types in specs.items()), "",
        "| spec | head | not right, or without a place | verdict | why |", "|---|---|---|---|---|",
        *(f"| {spec} | {one['head']} | {row}" for spec in specs for one in specs[spec] for row in _others([one])), "",
        *(f"**{spec}**, right: {_names(types, RIGHT)}.\n" for spec, types in specs.items()),
    ])  # fmt: skip


def _counted(head: str, types: Types) -> str:
    right = [one for one in types if one["verdict"] == RIGHT]
    built = sum(one["verdict"] != NOT_BUILT for one in types)
    return f"| {head} | {built} | {len(right)} | {sum(bool(one['islands']) for one in right)} |"


def _others(types: Types) -> list[str]:
    """A row of each that is not right, from its name on."""
    return [
        f"`{one['kind']}` | {one['verdict']} | {one['reason'].replace('|', '/')} |"
        for one in types
        if one["verdict"] not in (RIGHT, NOT_BUILT)
    ]


def _where(types: Types, verdict: str) -> Types:
    return [one for one in types if one["verdict"] == verdict]


def _names(types: Types, verdict: str) -> str:
    return ", ".join(one["kind"] for one in _where(types, verdict))


if __name__ == "__main__":
    import transformers

    before = json.loads(KEPT.read_text())
    known = before["types"] if before["transformers"] == transformers.__version__ else []
    types = kept([Path(name) for name in sys.argv[1:]], known)
    KEPT.write_text(json.dumps({"transformers": transformers.__version__, "types": types}, indent=1) + "\n")
