"""All that needs a GPU, in ten minutes and without a network: are the kernels right, and how fast is a step?

    python examples/gpu.py [--output gpu.jsonl] [--limit 570] [--wheels FOLDER] [--only WORD …] [--dry]

From a checkout, with the torch, triton and transformers that are there; of what else peftc imports and is not
installed, the wheels are taken from FOLDER, as they are. First every kernel is held against its definition, in three
precisions at once, and the tests that are marked for a GPU run; then the six specs of examples/benchmarks are measured
on a Llama of a billion random weights (the experts' on a Mixtral), nf4, and all of it under torch.compile.

The results are lines of JSON, written as they come, the most important first. Each part has a time limit, and a part
that fails, crashes or hangs is a line like any other: the next ones run in a process of their own. `--dry` runs
everything on the CPU, the kernels in Triton's interpreter, as small as it goes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

ROOT = Path(__file__).parent.parent
IMPORTED = (ROOT, ROOT / "examples", ROOT / "tests" / "support" / "operations")
SIDE_BY_SIDE, DRY_SIDE_BY_SIDE = ("bfloat16", "float32", "float16", "tests"), ("float32", "tests")
ALONE = "measured"
START = 120  # seconds until a process has imported all that it needs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="where the lines go")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that hold Python alone")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts with this in their name")
    parser.add_argument("--dry", action="store_true", help="without a GPU, as small as it goes")
    given = parser.parse_args()
    end = time.monotonic() + given.limit
    wheels = sorted(given.wheels.glob("*.whl")) if given.wheels else []
    if missing := not_installed(wheels):
        print(f"not installed: {', '.join(missing)}; --wheels takes a folder with their wheels", file=sys.stderr)
        return 2
    paths = [*map(str, (*IMPORTED, *wheels)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "gpu_parts.py")]
    options = ["--only", *given.only, *(["--dry"] if given.dry else [])]
    failed: list[str] = []
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w") as lines, ThreadPoolExecutor() as pool:
        lock = Lock()

        def keep(stream: str) -> None:
            interpreted = {"TRITON_INTERPRET": "1"} if given.dry and stream != ALONE else {}
            for result in results([*command, stream, *options], end, environment | interpreted):
                with lock:
                    print(json.dumps(result), file=lines, flush=True)
                    print(f"{result['part']}, {result['took']:.0f} s: {told(result)}", flush=True)
                    failed.extend([result["part"]] if is_wrong(result) else [])

        list(pool.map(keep, DRY_SIDE_BY_SIDE if given.dry else SIDE_BY_SIDE))
        keep(ALONE)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


def not_installed(wheels: Sequence[Path]) -> list[str]:
    """What pyproject.toml has peftc depend on, and is neither installed nor among the wheels."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in wanted}
    places = [*sys.path, *map(str, wheels)]
    return sorted(name for name in names if not any(importlib.metadata.distributions(name=name, path=places)))


def results(command: Sequence[str], end: float, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Each part's result, in order, until `end` on the monotonic clock: what it said, or why it said nothing.

    The command's first line has the parts' names and limits, the others are their results, as in gpu_parts.py.
    """
    parts: list[tuple[str, float]] | None = None
    done = 0
    while parts is None or done < len(parts):
        worker = subprocess.Popen(
            [*command, "--skip", str(done)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            said = _lines(worker)
            first = _within(said, min(START, end - time.monotonic()))
            if not first:
                yield {"part": f"start of {command[-1]}", "took": 0.0, "error": _silence(worker, first, START)}
                return
            parts = json.loads(first)
            while done < len(parts):
                name, most = parts[done]
                began = time.monotonic()
                line = _within(said, min(most, end - began))
                done += 1
                result = json.loads(line) if line else {"error": _silence(worker, line, min(most, end - began))}
                yield {"part": name, "took": round(time.monotonic() - began, 2)} | result
                if "error" in result:
                    break
        finally:
            _end(worker)
        if end <= time.monotonic():
            yield from ({"part": name, "took": 0.0, "error": "no time was left"} for name, _ in parts[done:])
            return


def _lines(worker: subprocess.Popen[str]) -> SimpleQueue[str]:
    """Lines as they come; the empty one at the end."""
    lines: SimpleQueue[str] = SimpleQueue()
    assert worker.stdout is not None
    stream = worker.stdout

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put("")

    Thread(target=read, daemon=True).start()
    return lines


def _within(lines: SimpleQueue[str], seconds: float) -> str | None:
    """The next line, None if there is none in time."""
    try:
        return lines.get(timeout=max(seconds, 0))
    except Empty:
        return None


def _silence(worker: subprocess.Popen[str], line: str | None, seconds: float) -> str:
    return f"took longer than {seconds:.0f} s" if line is None else f"ended with {worker.wait()}"


def _end(worker: subprocess.Popen[str]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def is_wrong(result: Mapping[str, Any]) -> bool:
    """Whether a part failed, or a model does not compute what it should."""
    return "error" in result or result.get("agrees") is False


def told(result: Mapping[str, Any]) -> str:
    """A result in a line: of models, each one's ratio to the first row's."""
    if "error" in result:
        return str(result["error"])
    if "rows" not in result:
        left_out = ("part", "took", "allocated", "versions")
        known = {name: value for name, value in result.items() if name not in left_out}
        said = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items()
        ]
        return ", ".join(said) or "right"
    cells = []
    for row in result["rows"]:
        ratio = row["ratio"] if isinstance(row["ratio"], Mapping) else {"tokens": row["ratio"]}
        figures = " · ".join(f"{value:.2f}" for name, value in ratio.items() if value and name != "flops")
        cells.append(f"{row['name']} {figures or row['note']}{'' if row['agrees'] else ' WRONG'}")
    return ", ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
