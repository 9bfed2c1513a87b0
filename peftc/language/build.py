"""Parse tree to syntax tree, with the checks that the grammar cannot make."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

from lark import Token, Tree

import peftc.language.errors as mistakes
import peftc.language.globs as patterns
import peftc.language.spelling as spelling
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.source import Source, Span
from peftc.language.explain import bad_number, unknown_operator
from peftc.language.matching import compiled
from peftc.language.reader import DEEPEST
from peftc.language.tokens import BUDGET_OPERATORS, FILTER_OPERATORS, FIT_OPERATORS
from peftc.language.tree import (
    UNITS,
    Apply,
    Arg,
    Bool,
    Call,
    Checkpoint,
    Except,
    Fit,
    Freeze,
    Glob,
    Group,
    InLayers,
    InStack,
    Intersect,
    Let,
    ListValue,
    Name,
    Number,
    Quantize,
    Regex,
    Require,
    Role,
    Selector,
    Statement,
    String,
    Task,
    Train,
    Union,
    Use,
    Value,
    Where,
)

if TYPE_CHECKING:
    import regex
else:
    regex = Lazy("regex")


class Builder:
    """Makes nodes, and checks what the grammar cannot.

    After a mistake it goes on with a stand-in, which nobody sees: a text with mistakes yields no tree.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []
        self.tasks: list[Span] = []
        self.depth = 0

    def statement(self, tree: Tree[Token]) -> Statement:
        span, parts = self._span(tree), _parts(tree)
        match tree.data:
            case "apply":
                return Apply(self.call(parts[0]), self.selector(parts[1]) if parts[1] else None, span=span)
            case "quantize":
                return Quantize(self.selector(parts[0]), self.call(parts[1]), span=span)
            case "train":
                return Train(self.selector(parts[0]), span=span)
            case "freeze":
                return Freeze(self.selector(parts[0]), span=span)
            case "checkpoint":
                return Checkpoint(self.selector(parts[0]), span=span)
            case "let":
                is_call = parts[1].data == "call"
                return Let(self._given(parts[0]), (self.call if is_call else self.selector)(parts[1]), span=span)
            case "task":
                return self._task(tree, span)
            case "group":
                return Group(tuple(map(self._given, parts[:-1])), self.call(parts[-1]), span=span)
            case "require":
                operator = self._operator(parts[1], BUDGET_OPERATORS)
                return Require(self.call(parts[0]), operator, self.number(parts[2]), span=span)
            case "fit":
                operator = self._operator(parts[2], FIT_OPERATORS)
                using = tuple(self._tool(tool) for tool in filter(None, parts[5:]))
                return Fit(self.call(parts[1]), operator, self.number(parts[3]), using, span=span)
            case _:
                return Use(self.string(parts[0]), span=span)

    def _tool(self, tree: Tree[Token]) -> Call:
        """What a `fit` may use: a word of the language, or a storage."""
        (part,) = _parts(tree)
        if isinstance(part, Tree):
            return self.call(part)
        span = self._span(part)
        return Call(Name(str(part), span=span), span=span)

    def _task(self, tree: Tree[Token], span: Span) -> Task:
        name, *body = _parts(tree)
        if self.tasks:
            self.problems.append(mistakes.NestedTask(outer=self.tasks[-1], span=self._span(name)))
        self.tasks.append(self._span(name))
        task = Task(self._given(name), tuple(self.statement(part) for part in body if part), span=span)
        self.tasks.pop()
        return task

    # Selectors

    def selector(self, tree: Tree[Token]) -> Selector:
        span, parts = self._span(tree), _parts(tree)
        self.depth += 1
        try:
            if self.depth > DEEPEST:
                self.problems.append(mistakes.TooDeep(limit=DEEPEST, span=span))
                return Role(("x",), span=span)
            match tree.data:
                case "union":
                    return Union(tuple(map(self.selector, parts)), span=span)
                case "intersect":
                    return Intersect(tuple(map(self.selector, parts)), span=span)
                case "except":
                    return Except(self.selector(parts[0]), self.selector(parts[1]), span=span)
                case "brackets" if len(parts) == 1:
                    return self.selector(parts[0])
                case "brackets":
                    within = self._span(parts[0]).to(self._span(parts[-1]))
                    return Union(tuple(map(self.selector, parts)), span=within)
                case "in_layers":
                    return self._in_layers(parts, span)
                case "in_stack":
                    return self._in_stack(parts, span)
                case "where":
                    operator = self._operator(parts[2], FILTER_OPERATORS)
                    return Where(
                        self.selector(parts[0]),
                        self.name(parts[1]),
                        operator,
                        self.value(parts[3]),
                        span=span,
                    )
                case _:
                    return self._atom(parts[0], span)
        finally:
            self.depth -= 1

    def _atom(self, token: Token, span: Span) -> Selector:
        if token.type == "STRING":
            return self._glob(token, span)
        if token.type == "REGEX":
            return self._regex(str(token)[1:-1], span)
        parts = tuple(token.split("."))
        words = parts[:-1] if parts[-1] == "*" and len(parts) > 1 else parts
        if token.type == "DOTTED" and not all(word.isascii() and word.isidentifier() for word in words):
            self.problems.append(spelling.BadRole(text=str(token), span=span))
        return Role(parts, span=span)

    def _glob(self, token: Token, span: Span) -> Glob:
        pattern, offsets = self._unescaped(token)
        if problem := patterns.problem(pattern):
            start, reason = problem
            place = Span(self.source, offsets[start], offsets[min(start + 1, len(pattern))])
            self.problems.append(spelling.BadGlob(reason=reason, span=place))
        return Glob(pattern, span=span)

    def _regex(self, pattern: str, span: Span) -> Regex:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
                compiled(pattern)
        except re.error as error:
            start = span.start + 1 + (error.pos or 0)
            place = Span(self.source, start, min(start + 1, span.end - 1)) if error.pos is not None else span
            self.problems.append(spelling.BadRegex(reason=error.msg, span=place))
        except (OverflowError, RecursionError, MemoryError, Warning, regex.error) as error:
            self.problems.append(spelling.BadRegex(reason=str(error).split(" at position")[0], span=span))
        return Regex(pattern, span=span)

    def _in_layers(self, parts: list[Any], span: Span) -> InLayers:
        base, name, inside = self.selector(parts[0]), self.name(parts[1]), parts[2]
        if name.text != "layers":
            self.problems.append(mistakes.SlicedGroup(name=name.text, span=name.span))
        bounds = [part and self._bound(part) for part in _parts(inside)]
        if inside.data == "index":
            start = bounds[0]
            return InLayers(base, start, None if start == -1 else start + 1, None, span=span)
        if bounds[2] == 0:
            self.problems.append(mistakes.BadSlice(reason="the step cannot be 0", span=self._span(_parts(inside)[2])))
        return InLayers(base, *bounds, span=span)

    def _bound(self, tree: Tree[Token]) -> int:
        number = self.number(tree)
        if isinstance(number.value, int) and number.unit is None:
            return number.value
        self.problems.append(mistakes.BadSlice(reason="layers are counted in whole numbers", span=number.span))
        return 1

    def _in_stack(self, parts: list[Any], span: Span) -> InStack:
        base, name = self.selector(parts[0]), self.name(parts[1])
        if name.text == "layers":
            self.problems.append(mistakes.SlicedGroup(name=name.text, span=name.span))
        return InStack(base, name, span=span)

    def _operator(self, token: Token, operators: tuple[str, ...]) -> str:
        if token not in operators:
            self.problems.append(unknown_operator(str(token), operators, self._span(token)))
        return str(token)

    # Methods and values

    def call(self, tree: Tree[Token]) -> Call:
        name, *arguments = _parts(tree)
        args: list[Arg] = []
        named: dict[str, Name] = {}
        for arg in map(self._argument, filter(None, arguments)):
            if arg.name is None and named:
                keyword = next(reversed(named.values()))
                self.problems.append(mistakes.PositionalAfterKeyword(keyword=keyword.span, span=arg.span))
            elif arg.name and arg.name.text in named:
                first = named[arg.name.text].span
                self.problems.append(mistakes.DuplicateArgument(name=arg.name.text, first=first, span=arg.name.span))
            elif arg.name:
                named[arg.name.text] = arg.name
            args.append(arg)
        return Call(self.name(name), tuple(args), span=self._span(tree))

    def _argument(self, tree: Tree[Token]) -> Arg:
        *name, value = _parts(tree)
        return Arg(self.name(name[0]) if name else None, self.value(value), span=self._span(tree))

    def value(self, tree: Tree[Token]) -> Value:
        match tree.data:
            case "name":
                return self._given(tree)
            case "number":
                return self.number(tree)
            case "string":
                return self.string(tree)
            case "bool":
                return Bool(tree.children[0] == "true", span=self._span(tree))
            case "list":
                return ListValue(tuple(map(self.value, filter(None, _parts(tree)))), span=self._span(tree))
            case _:
                return self.call(tree)

    def name(self, tree: Tree[Token]) -> Name:
        return Name(str(tree.children[0]), span=self._span(tree))

    def _given(self, tree: Tree[Token]) -> Name:
        """A name that nobody looks up: those of others that have a hyphen (`reader._joined`) are none."""
        name = self.name(tree)
        if "-" in name.text:
            self.problems.append(spelling.BadCharacter(character="-", span=name.span))
        return name

    def string(self, tree: Tree[Token]) -> String:
        return String(self._unescaped(_parts(tree)[0])[0], span=self._span(tree))

    def number(self, tree: Tree[Token]) -> Number:
        span = self._span(tree)
        match = _NUMBER.fullmatch(span.text)
        digits, fraction, unit = match.groups() if match else ("", None, span.text)
        if unit and unit not in UNITS:
            self.problems.append(bad_number(unit, span))
            return Number(1, span=span)
        value: int | float = math.inf
        if fraction is not None:
            value = float(digits + fraction)
        elif len(digits) < 40:
            value = int(digits)
        if abs(value) > (2**63 - 1 if isinstance(value, int) else sys.float_info.max):
            self.problems.append(spelling.NumberTooLarge(span=span))
            return Number(1, span=span)
        return Number(value, unit or None, span=span)

    def _unescaped(self, token: Token) -> tuple[str, list[int]]:
        """The text of a string, and where each of its characters and its end stand in the source."""
        characters, offsets = [], []
        base = token.start_pos or 0
        for match in _STRING_PART.finditer(token, 1, len(token) - 1):
            part, place = match.group(), Span(self.source, base + match.start(), base + match.end())
            character = _unescape(part) if part[0] == "\\" else part
            if character is None:
                self.problems.append(spelling.BadEscape(escape=part, span=place))
            elif part < " " and part != "\t":
                self.problems.append(spelling.BadCharacter(character=part, span=place))
            characters.append(character or "x")
            offsets.append(place.start)
        return "".join(characters), [*offsets, base + len(token) - 1]

    def _span(self, item: Tree[Token] | Token) -> Span:
        at = item.meta if isinstance(item, Tree) else item
        return Span(self.source, at.start_pos or 0, at.end_pos or 0)


def _parts(tree: Tree[Token]) -> list[Any]:
    """The children; which of them are trees, tokens or None (an optional part left out) the grammar says."""
    return tree.children


_DIGITS, _EXPONENT = "[0-9]+(?:_[0-9]+)*", "[eE][+-]?[0-9]+"
_NUMBER = re.compile(  # whole part, fraction or exponent, unit or whatever follows
    rf"([+-]?(?:{_DIGITS}|(?=\.[0-9])))(\.(?:{_DIGITS})?(?:{_EXPONENT})?|{_EXPONENT})?[ \t]*(.*)"
)
_STRING_PART = re.compile(r"\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL)
ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}


def _unescape(escape: str) -> str | None:
    if len(escape) == 2:
        return ESCAPES.get(escape[1])
    character = chr(int(escape[2:], 16))
    return None if unicodedata.category(character) == "Cs" else character
