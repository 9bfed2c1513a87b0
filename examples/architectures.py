"""Every architecture that the installed transformers knows, tiny, under one spec by role: what is right, and what not?

    python examples/architectures.py [HEAD …] [--types GLOB …] [--specs lora prefix …] [-o sweep.jsonl] [--tenth]
    python examples/architectures.py [HEAD …] --specs rotate    (each type under one of the specs besides lora)
    python examples/architectures.py --table sweep.jsonl

Each type and spec has a time limit, and is a line of JSON as soon as it is done; what is in the file already is not run
again. A process that takes too long or dies is replaced, and the next case goes on. Everything is held against eager
PyTorch: see sweep/judge.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sweep.judge import Verdict, judge
from sweep.specs import SPECS
from sweep.tiny import HEADS, types_of

LIMIT = 240
SHARE = 20  # cases of a worker
Case = tuple[str, str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="*", metavar="HEAD", help=", ".join(HEADS), default=list(HEADS))
    parser.add_argument(
        "--types", nargs="+", default=["*"], metavar="GLOB", help="model types, as transformers has them"
    )
    parser.add_argument(
        "--specs",
        nargs="+",
        default=["lora"],
        choices=[*SPECS, "all", "rotate"],
        help="%(choices)s; rotate: one of those besides lora for each type, by its name alone; default: lora",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep.jsonl"), help="where the lines go")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one type under one spec")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--tenth", action="store_true", help="a fixed tenth of the types")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="VERDICT", help="what had such a verdict is run again"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what a file has, and run nothing")
    given = parser.parse_args()
    if given.table:
        print(table(read(given.table)))
        return 0
    known = read(given.output)
    done = {(r["head"], r["kind"], r["spec"]) for r in known if r["verdict"] not in given.again}
    wanted = [
        (head, kind, spec)
        for head in given.heads
        for kind in types_of(head)
        if any(fnmatch.fnmatch(kind, glob) for glob in given.types) and (not given.tenth or in_tenth(kind))
        for spec in specs_of(kind, given.specs)
    ]
    left = [case for case in wanted if case not in done]
    print(f"{len(wanted)} cases, {len(wanted) - len(left)} of them done", flush=True)
    with given.output.open("a") as lines:
        for place, result in enumerate(run(left, given.limit, given.jobs), 1):
            print(json.dumps(result), file=lines, flush=True)
            reason = f": {result['reasons'][0]}" if result["reasons"] else ""
            case = f"{result['head']} {result['kind']} {result['spec']}"
            print(f"[{place}/{len(left)}] {case}: {result['verdict']}{reason}"[:300], flush=True)
    print(table([r for r in read(given.output) if (r["head"], r["kind"], r["spec"]) in set(wanted)]))
    return 0


def in_tenth(kind: str) -> bool:
    """The same types each time, whatever others there are."""
    return zlib.crc32(kind.encode()) % 10 == 0


def specs_of(kind: str, asked: Sequence[str]) -> list[str]:
    """The specs of a type; by `rotate` the same one each time, whatever other types there are."""
    if "all" in asked:
        return list(SPECS)
    others = [name for name in SPECS if name != "lora"]
    turn = others[zlib.crc32(f"{kind} rotates".encode()) % len(others)]
    return list(dict.fromkeys(turn if name == "rotate" else name for name in asked))


def read(file: Path) -> list[dict[str, Any]]:
    """The last line of each case."""
    found: dict[Case, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        result = json.loads(line)
        found[result["head"], result["kind"], result["spec"]] = result
    return list(found.values())


def run(cases: Sequence[Case], limit: float, jobs: int) -> Iterator[dict[str, Any]]:
    """The results as they come, of workers that are replaced when they take too long, end, or have done their share."""
    waiting = list(cases)
    workers: list[Worker] = []
    while waiting or workers:
        while waiting and len(workers) < jobs:
            workers.append(Worker(waiting))
        for worker in list(workers):
            if (result := worker.result(limit)) is not None:
                yield result
                if not worker.goes_on(waiting):
                    workers.remove(worker)


class Worker:
    """A process that judges one case after another."""

    def __init__(self, waiting: list[Case]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has imported everything
        self.done = 0
        self._begin(waiting.pop(0))

    def _begin(self, case: Case) -> None:
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case)

    def result(self, limit: float) -> dict[str, Any] | None:
        """Of the present case, or None as long as it runs."""
        took = time.monotonic() - self.since
        if self.pipe.poll(0.1):
            with suppress(EOFError, ConnectionError):
                found: dict[str, Any] = self.pipe.recv()
                return found
            self.process.join()
            verdict, reason = "crash", f"its process ended with status {self.process.exitcode}"
        elif took < limit:
            return None
        else:
            verdict, reason = "timeout", f"no answer in {took:.0f} s"
        self.done = SHARE
        return asdict(Verdict(*self.case, verdict=verdict, reasons=[reason]))

    def goes_on(self, waiting: list[Case]) -> bool:
        """Whether it takes the next case; else it is gone."""
        self.done += 1
        if waiting and self.done < SHARE:
            self._begin(waiting.pop(0))
            return True
        self.process.kill()
        self.process.join()
        return False


def work(pipe: Any) -> None:
    """What a worker does, without a word."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    os.dup2(silent, sys.stderr.fileno())
    pipe.send(None)
    while True:
        pipe.send(asdict(judge(*pipe.recv())))


def table(results: Sequence[dict[str, Any]]) -> str:
    """How many types of each head and spec have which verdict."""
    lines = []
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for result in results:
        verdict = "island" if result["verdict"] == "right" and result["islands"] else result["verdict"]
        counts[result["head"], result["spec"]][verdict] += 1
    for (head, spec), counter in counts.items():
        built = sum(counter.values()) - counter["not-built"] - counter["absent"]
        right = counter["right"] + counter["island"]
        share = f"{100 * right / built:.0f} %" if built else "-"
        others = ", ".join(f"{n} {verdict}" for verdict, n in counter.most_common() if verdict != "right")
        lines.append(f"{head:<11} {spec:<8} {right:>3} of {built:>3} right, {share:>5}   {others}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
