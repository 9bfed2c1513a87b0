"""What may be written at a place: verbs and words, methods and their parameters, roles, names of `let`, of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lark import Token

from peftc import language as ast
from peftc.cli.editor.document import Document
from peftc.diagnostics.source import Source
from peftc.language.reader import MOST_WORDS, Reader
from peftc.language.tokens import BRACKETS, CLOSING, NEWLINE, WORDS, tokens
from peftc.protocol.method import Method
from peftc.protocol.params import Configured, Param, registered
from peftc.protocol.sites import site_kinds
from peftc.protocol.storage import Storage
from peftc.spec.budgets import CHECKPOINT, FITTED, QUANTITIES
from peftc.spec.calls import AUTO, KINDS, is_rank
from peftc.spec.groups import GROUPINGS
from peftc.spec.resolve import FIELDS, LAYERS, STACKS, roles

MOST_NAMES = 200  # of a model that are offered at once
BEFORE_SELECTORS = {"TO", "TRAIN", "FREEZE", "CHECKPOINT", "QUANTIZE", "EXCEPT", "AMPERSAND", "COMMA", "LPAR"}
_WORD = re.compile(r"[\w.*]*\Z")


@dataclass(frozen=True)
class Offer:
    """One thing that may be written from the character `start` on; `kind` is the language's word for it."""

    label: str
    kind: str
    start: int
    detail: str = ""
    text: str = ""


def offers(document: Document, offset: int, names: Iterable[str] = ()) -> list[Offer]:
    """What may stand at `offset`, where a word may have begun. `names`: the places of a model."""
    before = document.source.text[:offset]
    word = _WORD.search(before)
    start = word.start() if word else offset
    situation = Situation(before)
    if situation.text is not None:
        return [*_names(before[situation.text :], situation.text, names)] if situation.may_name else []
    situation = Situation(before[:start])
    if situation.silent:
        return []
    found = [Offer(label, kind, start, detail) for label, kind, detail in _expected(document, offset, situation)]
    return found if situation.call else [*found, *_words(situation, start)]


class Situation:
    """What stands in front of a place: the words of its statement, and the brackets that are open there."""

    def __init__(self, before: str) -> None:
        self.before = Source("", before)
        self.words: list[Token] = []
        self.open: list[tuple[str, Token | None]] = []  # each bracket, and the word in front of it
        found = tokens(self.before, MOST_WORDS)[:-2]
        for token in found:
            self._take(token)
        last = found[-1] if found else None
        end = (last.end_pos or 0) if last else 0
        begun = last is not None and end == len(before) and last.type.startswith("BAD_")
        self.silent = "#" in before[end:] or begun
        # Where a string that is not closed begins, behind its quotation mark.
        self.text = (last.start_pos or 0) + 1 if last is not None and begun and last.type == "BAD_STRING" else None

    def _take(self, token: Token) -> None:
        bracket = BRACKETS.get(token.type)
        if bracket in CLOSING:
            self.open.append((bracket, self.words[-1] if self.words else None))
        elif bracket and self.open:
            self.open.pop()
        in_brackets = bool(self.open) and self.open[-1][0] != "{"
        if bracket in ("{", "}") or (token.type == NEWLINE and not in_brackets):
            self.words = []
        elif token.type != NEWLINE:
            self.words.append(token)

    @property
    def last(self) -> str:
        """The kind of the word in front, '' at the start of a statement."""
        return self.words[-1].type if self.words else ""

    @property
    def verb(self) -> str:
        return "FIT" if self.words and self.words[0] == "fit" else self.words[0].type if self.words else ""

    @property
    def fits_by(self) -> bool:
        """Whether what a `fit` may use stands there."""
        used = [place for place, word in enumerate(self.words) if word == "using"]
        return self.verb == "FIT" and bool(used) and (self.last == "COMMA" or used[-1] == len(self.words) - 1)

    @property
    def call(self) -> Token | None:
        """The name of the call whose brackets are open."""
        bracket, name = self.open[-1] if self.open else ("", None)
        return name if bracket == "(" and name is not None and name.type == "NAME" else None

    @property
    def may_name(self) -> bool:
        """Whether a string there is a selector."""
        return self.call is None and self.verb != "USE" and "COMPARE" not in {word.type for word in self.words[-2:-1]}

    def given(self) -> set[str]:
        """The parameters that the open call has already."""
        depth, found = 0, set[str]()
        for word, following in zip(self.words[::-1], [None, *self.words[:0:-1]], strict=False):
            depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(BRACKETS.get(word.type, ""), 0)
            if depth < 0:
                break
            if not depth and following is not None and following.type == "_EQUAL":
                found.add(str(word))
        return found


def _expected(document: Document, offset: int, at: Situation) -> Iterator[tuple[str, str, str]]:
    """Label, kind and detail of the names that may stand at a place."""
    known = document.definitions(offset)
    selectors = {
        name for name, one in known.items() if isinstance(one, ast.Let) and not isinstance(one.value, ast.Call)
    }
    methods = {name for name, one in known.items() if isinstance(one, ast.Let)} - selectors
    if at.call is not None:
        yield from _in_call(at, known)
    elif at.last == "APPLY":
        yield from _registered(Method)
        yield from ((name, "let", "") for name in methods)
    elif at.last == "WITH":
        yield from _registered(Storage)
    elif at.verb == "FIT" and len(at.words) == 1:
        yield from ((name, "quantity", "") for name in FITTED)
    elif at.fits_by:
        yield CHECKPOINT, "keyword", ""
        yield from _registered(Storage)
    elif at.last == "REQUIRE":
        yield from ((name, "quantity", "") for name in QUANTITIES)
    elif at.last == "IN":
        yield from ((name, "part", "") for name in (LAYERS, *STACKS))
        yield from ((name, "group", "") for name, one in known.items() if isinstance(one, ast.Group))
    elif at.last == "WHERE":
        yield from ((name, "field", "") for name in (*FIELDS, *(each for kind in site_kinds() for each in kind.fields)))
    elif at.last == "_EQUAL" and at.verb == "GROUP":
        yield from ((name, "grouping", f"{name}({LAYERS})") for name in GROUPINGS)
    elif (at.last in BEFORE_SELECTORS and at.verb != "GROUP") or (at.last == "_EQUAL" and at.verb == "LET"):
        yield from ((role, "role", "") for role in roles())
        yield from ((name, "let", "") for name in selectors)
        if at.last == "_EQUAL":
            yield from _registered(Method)


def _registered(kind: type[Configured]) -> Iterator[tuple[str, str, str]]:
    yield from ((name, kind.noun, cls.formula) for name, cls in registered(kind).items())


def _in_call(at: Situation, known: dict[str, ast.Let | ast.Group]) -> Iterator[tuple[str, str, str]]:
    """The parameters of a call, or the values of one."""
    name = str(at.call)
    defined = known.get(name)
    if isinstance(defined, ast.Let) and isinstance(defined.value, ast.Call):
        name = defined.value.name.text
    if name in QUANTITIES and at.verb in ("REQUIRE", "FIT"):
        yield from ((each, "parameter", "") for each in QUANTITIES[name] if each not in at.given())
        return
    if name in GROUPINGS and at.verb == "GROUP":
        yield (LAYERS, "part", "")
        return
    cls = configured(name)
    if cls is None:
        return
    first = next(iter(cls.parameters.values()), None)
    if at.last == "_EQUAL":
        given = str(at.words[-2])
        parameter = next((one for one in cls.parameters.values() if given in (one.name, one.alias)), None)
        yield from _values(parameter) if parameter else ()
        if parameter and is_rank(cls, parameter.name):
            yield AUTO, "value", "what `fit trainable` finds"
    elif at.last in ("LPAR", "COMMA"):
        taken = at.given()
        for one in cls.parameters.values():
            if not taken & {one.name, one.alias}:
                yield one.name, "parameter", one.doc
        if at.last == "LPAR" and first is not None and first.nested:
            yield from _registered(first.nested)


def _values(parameter: Param) -> Iterator[tuple[str, str, str]]:
    if parameter.nested:
        yield from _registered(parameter.nested)
    yield from ((choice, "value", "") for choice in parameter.choices or ())
    if parameter.kind is bool:
        yield from (("true", "value", ""), ("false", "value", ""))


def configured(name: str) -> type[Configured] | None:
    """The method, storage or way of making a matrix of that name."""
    return next((registered(kind)[name] for kind in KINDS if name in registered(kind)), None)


def _words(at: Situation, start: int) -> Iterator[Offer]:
    """The words of the language that the parser takes."""
    following = Reader(at.before).following()
    yield from (Offer(word.lower(), "keyword", start) for word in WORDS if word in following)


def _names(begun: str, start: int, names: Iterable[str]) -> Iterator[Offer]:
    """Names of a model that go on as `begun`: those of all layers at once come first."""
    patterns: dict[str, int] = {}
    single = []
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        patterns[pattern] = patterns.get(pattern, 0) + 1
        single.append(name)
    ends = {f"**.{pattern.rpartition('.')[2]}": 0 for pattern in patterns}
    for pattern, count in patterns.items():
        ends[f"**.{pattern.rpartition('.')[2]}"] += count
    every = [
        *((one, count) for one, count in patterns.items() if count > 1),
        *ends.items(),
        *((one, 1) for one in single),
    ]
    fitting = {one: count for one, count in every if one.startswith(begun)}
    for one in [*fitting][:MOST_NAMES]:
        yield Offer(one, "place", start, f"{fitting[one]} places" if fitting[one] > 1 else "")
