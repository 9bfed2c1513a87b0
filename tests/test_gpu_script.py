"""What is ready for a GPU runs without one; and no part of it takes another along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gpu import not_installed, results
from paths import EXAMPLES, ROOT

WORKER = """
import json, os, sys, time
skip = int(sys.argv[sys.argv.index("--skip") + 1])
parts = [("right", 60), ("crashes", 60), ("hangs", 0.5), ("fails", 60), ("right again", 60)]
print(json.dumps(parts), flush=True)
for name, _ in parts[skip:]:
    if name == "crashes":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    print(json.dumps({"error": "known"} if name == "fails" else {"by": os.getpid()}), flush=True)
    if name == "fails":
        break
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script), "a stream"]


def test_each_part_loses_itself_alone(worker: list[str]) -> None:
    found = list(results(worker, time.monotonic() + 120, os.environ))
    assert [(result["part"], result.get("error", "")) for result in found] == [
        ("right", ""), ("crashes", "ended with 3"), ("hangs", "took longer than 0 s"), ("fails", "known"),
        ("right again", ""),
    ]  # fmt: skip
    assert found[0]["by"] != found[-1]["by"]


@pytest.mark.slow
def test_at_the_end_of_the_time_the_rest_is_named(worker: list[str]) -> None:
    Path(worker[1]).write_text(WORKER.replace("0.5", "60").replace("os._exit(3)", "pass"))
    began = time.monotonic()
    errors = {result["part"]: result.get("error", "") for result in results(worker, began + 8, os.environ)}
    assert time.monotonic() - began < 30
    assert (errors["right"], errors["crashes"]) == ("", "")
    assert errors["hangs"].startswith("took longer")
    assert errors["fails"] == errors["right again"] == "no time was left"


def test_a_process_that_does_not_start_ends_its_stream() -> None:
    (found,) = results([sys.executable, "-c", "raise SystemExit(7)", "a stream"], time.monotonic() + 60, os.environ)
    assert found["part"] == "start of a stream"
    assert found["error"] == "ended with 7"


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not_installed([]) == []
    monkeypatch.setattr(sys, "path", [])
    assert {"lark", "torch", "triton"} <= set(not_installed([]))
    wheel = tmp_path / "lark-1.3.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lark-1.3.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: lark\nVersion: 1.3.1\n")
    assert "lark" not in not_installed([wheel])


@pytest.mark.slow
def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    """But `torch.compile`'s, which takes as long as all others."""
    words = ["kernel", "tests", "machine", "step", "nf4", "text"]
    command = [sys.executable, str(EXAMPLES / "gpu.py"), "--dry", "--limit", "1200", "--only", *words]
    ran = subprocess.run([*command, "--output", str(tmp_path / "gpu.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    found: list[Any] = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    by_name = {result["part"]: result for result in found}
    assert {"kernel lora float32", "tests", "machine", "step experts", "nf4 unpack", "text qlora"} <= set(by_name)
    assert all(row["seconds"] for row in by_name["step dora"]["rows"])
