"""Data, read record by record, each with its place: JSON lines, JSON, CSV, Parquet, folders, the hub's data sets."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.extras import NeedsExtra
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.source import Source, Span
from peftc.training.errors import BadData, NoData

if TYPE_CHECKING:
    import datasets
else:
    datasets = Lazy("datasets")

_COLON = re.compile(r":(?![^\[]*\])")  # outside of brackets
SHOWN = 160  # characters of a line that a diagnostic shows


@dataclass(frozen=True)
class Record:
    """One record: its fields, and where it stands."""

    file: str
    line: int  # of a file of text, else the number of the row; from 1
    fields: dict[str, Any]
    text: str | None = None  # the line itself, where there is one

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def wrong(self, reason: str, field: str | None = None, hint: str = "") -> BadData:
        """What is wrong with it, or with one field of it."""
        return BadData(where=self.where, reason=reason, hint=hint, span=self._span(field))

    def _span(self, field: str | None) -> Span | None:
        if self.text is None:
            return None
        at = max(self.text.find(f'"{field}"'), 0) if field else 0
        size = len(field) + 2 if field and self.text.startswith(f'"{field}"', at) else 1
        return _place(self.file, self.line, self.text, at, size)


def _place(file: str, line: int, text: str, at: int, size: int) -> Span:
    """A place in a line, of which what is about it is shown."""
    first = 0 if at + size <= SHOWN else at - SHOWN // 2
    shown = text[first : first + SHOWN]
    start = line - 1 + at - first
    return Span(Source(file, "\n" * (line - 1) + shown), start, min(start + size, line - 1 + len(shown)))


def read(source: str) -> Iterator[Record | BadData]:
    """The records of a file, a folder or a hub's data set, as `data_set` takes it apart; what is no record is said.

    Raises:
        PeftcError: `no-data`, `not-installed`.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterator[Record | BadData]]] = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    ending = path.suffix.lower()
    if path.is_file():
        if ending not in readers:
            known = ", ".join(readers)
            raise PeftcError(NoData(source=source, reason=f"of a file named so nothing is known; known are {known}"))
        try:
            path.open("rb").close()
        except OSError as error:
            raise PeftcError(NoData(source=source, reason=str(error))) from None
        return readers[ending](path)
    is_there = Path(data_set(source)[0]).is_dir()
    if not is_there and (ending in readers or source.startswith((".", "/", "~"))):
        raise PeftcError(NoData(source=source, reason="there is no such file"))
    return _data_set(source)


def _json_lines(path: Path) -> Iterator[Record | BadData]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode().rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
            except UnicodeDecodeError as error:
                yield BadData(where=f"{path}:{number}", reason=f"this is not UTF-8 (byte {error.start + 1})")
                continue
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                at = getattr(error, "pos", 0)
                reason = f"this is no JSON: {getattr(error, 'msg', error)}"
                span = _place(str(path), number, text, min(at, len(text) - 1), 1)
                yield BadData(where=f"{path}:{number}", reason=reason, span=span)
                continue
            yield _checked(Record(str(path), number, fields, text), text)


def _json(path: Path) -> Iterator[Record | BadData]:
    """One list of records."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # lines, under a name that does not say so
            yield from _json_lines(path)
            return
        yield BadData(where=f"{path}:{getattr(error, 'lineno', 1)}", reason=f"this is no JSON: {error}")
        return
    if isinstance(records, dict):
        lists = [key for key, value in records.items() if isinstance(value, list)]
        records = records[lists[0]] if len(lists) == 1 else [records]
    for number, fields in enumerate(records if isinstance(records, list) else [records], 1):
        yield _checked(Record(str(path), number, fields), text)


def _checked(record: Record, text: str) -> Record | BadData:
    """An object, whose texts have letters alone; `text` is the JSON that it comes from."""
    if not isinstance(record.fields, dict):
        return record.wrong("a record is an object, {…}")
    if "\\ud" in text.lower():  # one half of a pair of UTF-16, which no tokenizer reads
        try:
            json.dumps(record.fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return record.wrong(f"the escape \\u{ord(error.object[error.start]):04x} stands without its other half")
    return record


def _csv(path: Path) -> Iterator[Record | BadData]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        limit = csv.field_size_limit(sys.maxsize)  # a value is as long as it is: for all readers at once, hence undone
        try:
            for fields in rows:
                record = Record(str(path), rows.line_num, fields)
                if None in fields or None in fields.values():
                    known = len(rows.fieldnames or ())
                    more = "more" if None in fields else "fewer"
                    yield record.wrong(f"this row has {more} values than the first row's {known} names")
                else:
                    yield record
        except (csv.Error, UnicodeDecodeError) as error:
            yield BadData(where=f"{path}:{max(rows.line_num, 1)}", reason=str(error))
        finally:
            csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Record | BadData]:
    return _rows(str(path), lambda: datasets.load_dataset("parquet", data_files=str(path), split="train"))


def data_set(source: str) -> tuple[str, str, str]:
    """Of `ID`, `ID:CONFIG`, `ID:SPLIT` or `ID:CONFIG:SPLIT` its id or folder, its second word, and its last, or "".

    A folder that is called so has no other parts; colons in a split's brackets, `train[:10]`, are the split's.
    """
    if Path(source).is_dir():
        return source, "", ""
    name, second, last = (*_COLON.split(source, 2), "", "")[:3]
    return name, second, last


def _data_set(source: str) -> Iterator[Record | BadData]:
    name, second, last = data_set(source)

    def load() -> Any:
        configs = datasets.get_dataset_config_names(name)
        config, split = (second, last) if last or second in configs else ("", second)
        if not config and len(configs) > 1 and datasets.get_dataset_default_config_name(name) is None:
            such = f"{name}:{configs[0]}:{split}" if split else f"{name}:{configs[0]}"
            raise PeftcError(NoData(source=source, reason=f"it has {', '.join(configs)}; name one, such as {such}"))
        return datasets.load_dataset(name, config or None, split=split or "train")

    return _rows(source, load)


@contextmanager
def _bars_where_somebody_watches() -> Iterator[None]:
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _rows(source: str, load: Callable[[], Any]) -> Iterator[Record | BadData]:
    if find_spec("datasets") is None:
        raise PeftcError(NeedsExtra(command=f"reading {source}", package="datasets", extra="train"))
    try:
        with _bars_where_somebody_watches():
            rows = load()
    except PeftcError:
        raise
    except Exception as error:  # of whichever library reads it
        raise PeftcError(NoData(source=source, reason=f"{type(error).__name__}: {error}".splitlines()[0])) from error
    inner = {name: getattr(feature, "feature", feature) for name, feature in rows.features.items()}  # of a list, one
    names = {name: feature.names for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)}
    for number, fields in enumerate(rows, 1):
        yield Record(source, number, {**fields, **{name: _named(fields[name], known) for name, known in names.items()}})


def _named(number: Any, names: list[str]) -> Any:
    """Classes by their names; None for -1, by which a data set says that it tells none."""
    if isinstance(number, list):
        return [_named(one, names) for one in number]
    return names[number] if number in range(len(names)) else None
