"""What a run is, written beside it: the same command goes on with it, another is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.whole import write_whole
from peftc.training.errors import BadSettings, OtherRun
from peftc.training.records import data_set

NAME = "run.json"
STATE = "trainer_state.json"  # the last file of a checkpoint
WRITTEN = ("artifact", "peft", "merged")  # what may be written at the end
HISTORY, CURVE = "history.jsonl", "loss.png"
MADE = (*WRITTEN, HISTORY, CURVE)
# What may change between two parts of a run.
FREE = {
    "max_steps", "num_train_epochs", "logging_steps", "logging_strategy", "logging_first_step", "save_steps",
    "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "report_to", "disable_tqdm", "run_name",
    "dataloader_num_workers", "log_level",
}  # fmt: skip


def digest(path: Path) -> str:
    """Of a file; of a folder, of its files' names and sizes; of what is neither, none."""
    if path.is_dir():
        sizes = sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(spec: str, model: str, data: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run: what determines the weights at its end."""
    files = {name: digest(Path(name)) or digest(Path(data_set(name)[0])) for name in data}
    kept = {name: value if _plain(value) else str(value) for name, value in settings.items() if name not in FREE}
    described: dict[str, Any] = json.loads(json.dumps({"spec": spec, "model": model, "data": files, "settings": kept}))
    return described


def _plain(value: Any) -> bool:
    return value is None or (
        isinstance(value, bool | int | float | str | list | dict) and type(value).__module__ == "builtins"
    )


def claim(folder: Path, run: Mapping[str, Any], *, fresh: bool) -> None:
    """Makes `folder` that of a run.

    Checkpoints that were being written when the run was cut off are removed. Of another run that came to nothing, such
    as one with a mistake in its spec, nothing is lost.

    Raises:
        PeftcError: `other-run`, and `bad-settings` where there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PeftcError(BadSettings(where="--output", reason=str(error))) from None
    there = _read(folder / NAME)
    kept = any(path.name != NAME for path in folder.iterdir())
    if there is not None and kept and not fresh and (differences := _differences(there, run)):
        raise PeftcError(OtherRun(folder=str(folder), differences=tuple(differences)))
    if there is None and kept and not fresh:
        raise PeftcError(OtherRun(folder=str(folder), differences=(f"it has files, and no {NAME}",)))
    for checkpoint in folder.glob("checkpoint-*"):
        if fresh or _read(checkpoint / STATE) is None:
            shutil.rmtree(checkpoint)
    if fresh:
        for name in MADE:
            _remove(folder / name)
    write_whole(folder / NAME, json.dumps(run, indent=2))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _differences(there: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    found = [f"another {name}" for name in ("spec", "model", "data") if there.get(name) != run[name]]
    before, now = there.get("settings", {}), run["settings"]
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            found.append(f"{name}: {before.get(name, 'not given')} there, {now.get(name, 'not given')} here")
    return found
