"""Steps of six specs against the frozen model's own and HF PEFT's, in one table; texts in a row against padded ones.

    python examples/benchmark.py [--only lora packing] [--repeats 8] [--output examples/benchmarks/results.json]

SmolLM2-135M in fp32, and a small Mixtral for the experts; batch 2 × 128, one thread. Each line is one run of
`peftc bench examples/benchmarks/NAME.peft examples/models.py:MODEL`. The README's table is made from the file that
`--output` writes; tests/test_readme.py holds the two together. What `packing` measures is said in `packing.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

import packing
from models import mixtral, smollm2
from peftc.bench.bench import bench
from peftc.bench.variants import FLOOR, FUSED, HF_PEFT, ONE_LIBRARY, PLAIN

FOLDER = Path(__file__).parent / "benchmarks"
RESULTS = FOLDER / "results.json"


@dataclass(frozen=True)
class Case:
    """One line of the table: the name is its spec's; targets are in units of the frozen model's step and bytes."""

    name: str
    title: str
    time: float
    saved: float | None
    model: Callable[[], PreTrainedModel] = smollm2
    against: str = FLOOR  # what `time` is a multiple of


CASES = (
    Case("lora", "lora r=16, seven projections", 1.08, 0.75),
    Case("lora_dropout", "the same, dropout 0.05", 1.12, 0.80),
    Case("dora", "dora r=16", 1.15, 0.80),
    Case("loha", "loha r=8", 1.40, 0.90),
    Case("lokr", "lokr r=8", 1.20, 0.90),
    Case("experts", "lora r=8 on Mixtral's experts", 0.50, None, mixtral, HF_PEFT),
)
HEADINGS = ("spec", "step time", "one library", "target", "saved bytes", "target", "unfused", "HF PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*(case.name for case in CASES), packing.NAME], help="some of them"
    )
    parser.add_argument("--repeats", type=int, default=8, help="rounds, of which the fastest counts")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--texts", type=int, default=packing.TEXTS, help="how many texts packing has")
    parser.add_argument("--torch-compile", action="store_true", help="each also under torch.compile")
    parser.add_argument("--output", type=Path, help="keep all figures in this .json file; others' lines in it stay")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kept = json.loads(given.output.read_text()) if given.output and given.output.exists() else {"runs": {}}
    runs: dict[str, Any] = {}
    for case in CASES:
        if given.only is None or case.name in given.only:
            print(f"{case.name} …", file=sys.stderr, flush=True)
            runs[case.name] = measured(case, given)
            if given.output:
                _keep(given.output, kept | {"runs": kept["runs"] | runs})
    if runs:
        print(markdown(runs))
    if given.only is None or packing.NAME in given.only:
        spec = FOLDER / "lora.peft"
        found = _stamped(packing.NAME, given.repeats) | packing.measured(spec, given.repeats, given.texts)
        if given.output:
            _keep(given.output, kept | {"runs": kept["runs"] | runs, packing.NAME: found})
        print(packing.markdown(found))


def _keep(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=2) + "\n")


def _stamped(name: str, repeats: int) -> dict[str, Any]:
    """When, where and by what a run was made."""
    when = datetime.now(UTC).isoformat(timespec="minutes")
    command = f"python examples/benchmark.py --only {name} --repeats {repeats}"
    return {"command": command, "date": when, "cpu": cpu(), "cores": os.cpu_count()}


def measured(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """One run, with where and when it was."""
    found = bench(
        case.model(),
        FOLDER / f"{case.name}.peft",
        batch=given.batch,
        seq=given.seq,
        repeats=given.repeats,
        with_torch_compile=given.torch_compile,
    )
    return _stamped(case.name, given.repeats) | found.to_json()


def markdown(runs: dict[str, Any]) -> str:
    """The table: ratios to the frozen model's step and saved bytes, time · bytes where two stand together."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for case in CASES:
        if case.name in runs:
            rows = {row["name"]: row for row in runs[case.name]["rows"]}
            lines.append(f"| {' | '.join(_cells(case, rows))} |")
    return "\n".join(lines)


def recorded() -> str:
    """The README's table: the runs that are kept, with where and how they were made."""
    runs = json.loads(RESULTS.read_text())["runs"]
    first = next(iter(runs.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if name != "python")
    dates = sorted({run["date"][:10] for run in runs.values()})
    where = f"In {first['dtype']}, batch {first['batch']} × {first['seq']}, one thread of {first['cpu']}"
    when = f"the fastest of {first['repeats']} rounds, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {versions}."
    return f"{markdown(runs)}\n\n{where}, {when}"


def recorded_packing() -> str:
    """The documentation's figures of texts in a row."""
    found = json.loads(RESULTS.read_text())[packing.NAME]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "python")
    where = f"In {found['dtype']}, one thread of {found['cpu']}, the fastest of {found['repeats']} rounds"
    return f"{packing.markdown(found)}\n\n{where}, {found['date'][:10]}; {versions}."


def _cells(case: Case, rows: dict[str, Any]) -> Iterable[str]:
    own, unit = rows[FUSED], rows[case.against]
    of = "" if case.against == FLOOR else f" × {case.against}"
    yield case.title
    yield f"{own['seconds'] / unit['seconds']:.2f}{of}"
    yield f"{rows[ONE_LIBRARY]['seconds'] / unit['seconds']:.2f}{of}"
    yield f"≤ {case.time:.2f}"
    yield f"{own['ratio']['saved']:.2f}"
    yield "" if case.saved is None else f"≤ {case.saved:.2f}"
    for name in (PLAIN, HF_PEFT):
        ratio = rows[name]["ratio"]
        yield f"{ratio['seconds']:.2f} · {ratio['saved']:.2f}" if ratio["seconds"] else rows[name]["note"]


def cpu() -> str:
    """The processor's own name, where the system tells it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
