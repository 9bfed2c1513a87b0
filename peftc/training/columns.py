"""What the columns of a data set say of it: conversations, prompts and answers, text, labels, images.

A shape of data is a class: which fields a record has, and what is wrong with a record that has others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftc.diagnostics.diagnostic import MOST_MISTAKES, Diagnostic, PeftcError, TooManyMistakes
from peftc.training.errors import BadData, NoData, NothingToLearn, UnknownColumns
from peftc.training.records import Record

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

SYSTEM = "system"  # what a conversation is told first, which some data sets keep in a column of its own
TOOLS = "tools"  # that chat templates tell a model of
MOST_CLASSES = 100_000  # above that a number is a name


@dataclass(frozen=True)
class Shape:
    """What a record says: `fields` that it must have, and the task of a model that learns from it."""

    fields: tuple[str, ...]
    task: str
    optional: tuple[str, ...] = ()
    learns: ClassVar[str] = "text"  # text, answers, labels, tags or images

    def __str__(self) -> str:
        return " + ".join(self.fields)

    def problem(self, record: Record) -> BadData | None:
        """What is wrong with one record; its fields are those that it must have."""
        for name in self.fields:
            value = record.fields.get(name)
            if not isinstance(value, str):
                return record.wrong(f"{name!r} is {_kind(value)}, and has to be a text", name)
        for name in self.optional:
            value = record.fields.get(name)
            if not isinstance(value, str | None) and name != TOOLS:
                return record.wrong(f"{name!r} is {_kind(value)}, and has to be a text", name)
        return None


@dataclass(frozen=True)
class Conversation(Shape):
    """Turns, of which the assistant's are learnt."""

    learns = "answers"

    def problem(self, record: Record) -> BadData | None:
        """Turns of known roles, one of them the assistant's."""
        (name,) = self.fields
        if (problem := _wrong_turns(record, name)) is not None:
            return problem
        if not isinstance(record.fields.get(SYSTEM, ""), str | None):
            return record.wrong(f"{SYSTEM!r} is {_kind(record.fields[SYSTEM])}, and has to be a text", SYSTEM)
        if (problem := _wrong_tools(record)) is not None:
            return problem
        if not any(turn["role"] == "assistant" for turn in messages(record.fields[name])):
            return record.wrong("no turn is the assistant's, so nothing is learnt", name)
        return None


@dataclass(frozen=True)
class Answer(Shape):
    """A prompt and the answer that is learnt; both may be turns."""

    learns = "answers"

    def problem(self, record: Record) -> BadData | None:
        """Texts, or turns."""
        if all(isinstance(record.fields.get(name), list) for name in self.fields):
            wrong = next(filter(None, (_wrong_turns(record, name) for name in self.fields)), _wrong_tools(record))
            if wrong is None and not any(m["role"] == "assistant" for m in messages(record.fields[self.fields[1]])):
                return record.wrong("no turn is the assistant's, so nothing is learnt", self.fields[1])
            return wrong
        return super().problem(record)


@dataclass(frozen=True)
class Labelled(Shape):
    """A text, or an image, of a class or several."""

    learns = "labels"

    def problem(self, record: Record) -> BadData | None:
        """Something, and a label for it."""
        what, name = self.fields
        value, label = record.fields.get(what), record.fields.get(name)
        if what != "image" and not isinstance(value, str):
            return record.wrong(f"{what!r} is {_kind(value)}, and has to be a text", what)
        if what == "image" and value is None:
            return record.wrong("there is no image", what)
        one = label if isinstance(label, list) else [label]
        if not all(isinstance(each, str | int) for each in one):
            return record.wrong(f"{name!r} is {_kind(label)}, and has to be a class or a list of some", name)
        if len({*map(str, one)}) < len(one):  # such as [0, 1, 0]
            return record.wrong(f"{name!r} has a class twice, and has to be a list of the classes that apply", name)
        return None


@dataclass(frozen=True)
class Images(Labelled):
    """Images, each of a class."""

    learns = "images"


@dataclass(frozen=True)
class Tagged(Shape):
    """Words, each with a tag."""

    learns = "tags"

    def problem(self, record: Record) -> BadData | None:
        """As many tags as words."""
        words, tags = (record.fields.get(name) for name in self.fields)
        for name, value in zip(self.fields, (words, tags), strict=True):
            if not isinstance(value, list) or not all(isinstance(each, str | int) for each in value):
                return record.wrong(f"{name!r} is {_kind(value)}, and has to be a list", name)
        assert isinstance(words, list)
        assert isinstance(tags, list)
        if len(words) != len(tags):
            return record.wrong(
                f"there are {len(words)} {self.fields[0]} and {len(tags)} {self.fields[1]}", self.fields[1]
            )
        return None


# The first of which a data set has all fields says what it is.
SHAPES: Sequence[Shape] = (
    Conversation(("messages",), "text-generation", (TOOLS, SYSTEM)),
    Conversation(("conversations",), "text-generation", (TOOLS, SYSTEM)),
    Answer(("prompt", "completion"), "text-generation", (TOOLS,)),
    Answer(("instruction", "output"), "text-generation", ("input",)),
    Images(("image", "label"), "image-classification"),
    Tagged(("tokens", "tags"), "token-classification"),
    Tagged(("tokens", "ner_tags"), "token-classification"),
    Labelled(("text", "label"), "text-classification"),
    Shape(("text",), "text-generation"),
)


@dataclass(frozen=True)
class Data:
    """All records of a training, their shape, and the classes of their labels."""

    source: str
    shape: Shape
    records: tuple[Record, ...]
    classes: tuple[str, ...] = ()
    several: bool = False  # whether one record may have several labels


def gathered(
    sources: Sequence[tuple[str, Iterable[Record | BadData]]], columns: Mapping[str, str], task: str = ""
) -> Data:
    """All records, of one shape.

    Args:
        sources: names, and what `records.read` gives.
        columns: of a shape's field, the column that it is here.
        task: what the model is for, where that is said: a text with a label may be learnt as a text alone.

    Raises:
        PeftcError: `bad-data` for every record that is wrong, once for a column that none has, `unknown-columns`,
            `no-data`.
    """
    problems: list[Diagnostic] = []
    unnamed: list[Diagnostic] = []  # of records before any has the columns that are named
    records: list[Record] = []
    shape: Shape | None = None
    for record in (each for _, source in sources for each in source):
        if shape is None and len(unnamed) >= MOST_MISTAKES:
            break
        if len(problems) >= MOST_MISTAKES:
            problems.append(TooManyMistakes(limit=MOST_MISTAKES))
            break
        if isinstance(record, BadData):
            problems.append(record)
            continue
        if lacking := [own for own in columns.values() if own not in record.fields]:
            known = f"there are {', '.join(map(str, record.fields))}"
            lacks = record.wrong(f"there is no column {lacking[0]!r}, which --columns names", hint=known)
            (unnamed if shape is None else problems).append(lacks)
            continue
        fields = {**record.fields, **{to: record.fields[own] for to, own in columns.items()}}
        named = Record(record.file, record.line, fields, record.text)
        if shape is None:
            shape = _shape_of(named, columns, task)
            problems += unnamed
        if (problem := _missing(shape, named) or shape.problem(named)) is not None:
            problems.append(problem)
        else:
            kept = {name: fields[name] for name in (*shape.fields, *shape.optional) if name in fields}
            records.append(Record(record.file, record.line, kept))
    if shape is None:
        problems += unnamed[:1]
    if problems:
        raise PeftcError(*problems)
    names = ", ".join(name for name, _ in sources)
    if shape is None:
        raise PeftcError(NoData(source=names, reason="there is no record in it"))
    return Data(names, shape, tuple(records), *_classes(shape, records))


def _wrong_turns(record: Record, name: str) -> BadData | None:
    """What is wrong with a field that has to be turns."""
    turns = record.fields.get(name)
    if not isinstance(turns, list) or not turns:
        return record.wrong(f"{name!r} is {_kind(turns)}, and has to be a list of turns", name)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            return record.wrong(f"turn {number} is {_kind(turn)}, and has to be an object", name)
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            hint = "known are system, user, assistant and tool"
            return record.wrong(f"turn {number} has the role {role!r}", str(role or name), hint)
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                return record.wrong(f"turn {number} has parts that are no text, and text alone is learnt", name)
        elif not isinstance(content, str) and not (ROLES[role] == "assistant" and turn.get("tool_calls")):
            return record.wrong(f"the content of turn {number} is {_kind(content)}, and has to be a text", name)
    return None


def _wrong_tools(record: Record) -> BadData | None:
    """What is wrong with the tools that a model is told of: schemas, or functions' descriptions by JSON."""
    if all(isinstance(each, dict) for each in tools(record.fields) or ()):
        return None
    return record.wrong(f"{TOOLS!r} has to be a list of objects", TOOLS)


def tools(fields: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a record, which some data sets keep as a text of JSON; None where there are none."""
    given = fields.get(TOOLS)
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except ValueError:
            return [given]
    return given if isinstance(given, list) or not given else [given]


def _shape_of(record: Record, columns: Mapping[str, str], task: str) -> Shape:
    known = [
        shape
        for shape in SHAPES
        if record.fields.keys() >= {*shape.fields} and {*columns} <= {*shape.fields, *shape.optional}
    ]
    shape = next((shape for shape in known if shape.task == task), next(iter(known), None))
    if shape is None:
        raise PeftcError(
            UnknownColumns(where=record.where, columns=tuple(map(str, record.fields)), known=tuple(map(str, SHAPES)))
        )
    return shape


def _missing(shape: Shape, record: Record) -> BadData | None:
    if lacking := [name for name in shape.fields if name not in record.fields]:
        return record.wrong(f"there is no {lacking[0]!r}, which the first record has")
    return None


def _classes(shape: Shape, records: Sequence[Record]) -> tuple[tuple[str, ...], bool]:
    """The classes, in the order of their names or numbers, and whether a record may have several."""
    if shape.learns not in ("labels", "tags", "images"):
        return (), False
    labels = [record.fields[shape.fields[1]] for record in records]
    found = {str(each) for label in labels for each in (label if isinstance(label, list) else [label])}
    if not found:
        raise PeftcError(NothingToLearn(reason=f"no record has a {shape.fields[1].removesuffix('s')}"))
    numbers = [int(each) for each in found if each.isascii() and each.isdecimal() and str(int(each)) == each]
    if len(numbers) == len(found) and max(numbers) < MOST_CLASSES:  # as numbers say, those without a record, too
        return tuple(map(str, range(max(numbers) + 1))), _several(shape, labels)
    return tuple(sorted(found)), _several(shape, labels)


def _several(shape: Shape, labels: Iterable[Any]) -> bool:
    return shape.learns != "tags" and any(isinstance(label, list) for label in labels)


def messages(turns: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns as chat templates know them: `role` and `content`, whichever way a data set spells them."""
    return [*_messages(turns)]


def _messages(turns: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for turn in turns:
        role = ROLES[turn["role"] if "role" in turn else turn["from"]]
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        others = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        yield {"role": role, "content": content, **{k: v for k, v in others.items() if v is not None}}


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    if value == []:
        return "empty"
    return "not there" if value is None else names.get(type(value), type(value).__name__)
