"""What came of a sweep over transformers' types: `docs/architectures.json`, and the tables that a page has of it.

python docs/sweeping.py SWEEP.jsonl …    (files that examples/architectures.py wrote, of one version of transformers)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "architectures.json"
RIGHT, NOT_BUILT = "right", "not-built"

Types = list[dict[str, Any]]


def kept(files: list[Path]) -> Types:
    """The last line of each type under LoRA, in order, without what differs from machine to machine."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        if result["spec"] == "lora":
            own = {name: result[name] for name in ("head", "kind", "verdict")}
            reason = result["reasons"][0].splitlines()[0] if result["reasons"] and own["verdict"] != RIGHT else ""
            found[result["head"], result["kind"]] = own | {"reason": reason, "islands": len(result["islands"])}
    return [found[case] for case in sorted(found)]


def tables() -> str:
    """How many types of each head are right, what came of the others, and the names of all."""
    swept = json.loads(KEPT.read_text())
    heads: dict[str, Types] = {}
    for found in swept["types"]:
        heads.setdefault(found["head"], []).append(found)
    others = [
        f"| {head} | `{one['kind']}` | {one['verdict']} | {one['reason'].replace('|', '/')} |"
        for head, types in heads.items()
        for one in types
        if one["verdict"] not in (RIGHT, NOT_BUILT)
    ]
    return "\n".join([
        f"transformers {swept['transformers']}, under `apply lora(r=4) to attn.q, attn.v, attn.o, mlp.*`:", "",
        "| head | types that are built | right | of them with islands |", "|---|---:|---:|---:|",
        *(_counted(head, types) for head, types in heads.items()), "",
        "| head | not right | verdict | why |", "|---|---|---|---|", *others, "",
        *(f"**{head}**, right: {_names(types, RIGHT)}.\n" for head, types in heads.items()),
        "transformers itself makes no tiny model that runs of:", "",
        *(f"- {head}: {names}" for head, types in heads.items() if (names := _names(types, NOT_BUILT))),
    ])  # fmt: skip


def _counted(head: str, types: Types) -> str:
    right = [one for one in types if one["verdict"] == RIGHT]
    built = sum(one["verdict"] != NOT_BUILT for one in types)
    return f"| {head} | {built} | {len(right)} | {sum(bool(one['islands']) for one in right)} |"


def _names(types: Types, verdict: str) -> str:
    return ", ".join(one["kind"] for one in types if one["verdict"] == verdict)


if __name__ == "__main__":
    import transformers

    types = kept([Path(name) for name in sys.argv[1:]])
    KEPT.write_text(json.dumps({"transformers": transformers.__version__, "types": types}, indent=1) + "\n")
