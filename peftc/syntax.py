"""Specification text to a frozen syntax tree, and back.

`parse` reports all the mistakes of a text at once: after a bad statement it goes on with the next one.
`parse_file` also reads the files named by `use`. `unparse` is the inverse of `parse` up to white space and
comments. Nodes compare without their spans.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree, UnexpectedToken

from peftc import errors
from peftc.errors import Diagnostic, PeftcError, suggest
from peftc.text import Source, Span

# ---- The syntax tree ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Anything read from a specification."""

    span: Span = field(compare=False, repr=False, kw_only=True)


class Statement(Node):
    """One line of a specification."""


class Value(Node):
    """What a parameter is given."""


class Selector(Node):
    """A set of sites."""


@dataclass(frozen=True)
class Name(Value):
    text: str


@dataclass(frozen=True)
class Number(Value):
    value: int | float
    unit: str | None = None

    @property
    def scaled(self) -> int | float:
        """The number its unit stands for: 1% is 0.01, 24 GiB is 25769803776, 7B is 7000000000."""
        if self.unit == "%":
            return self.value / 100
        return self.value * UNITS[self.unit] if self.unit else self.value


UNITS = {
    "%": 0.01,
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12},
}


@dataclass(frozen=True)
class Bool(Value):
    value: bool


@dataclass(frozen=True)
class String(Value):
    value: str


@dataclass(frozen=True)
class ListValue(Value):
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Arg(Node):
    """`name=value`, or a bare value (`name` is None); all bare values come first and no name comes twice."""

    name: Name | None
    value: Value


@dataclass(frozen=True)
class Call(Value):
    """A method, storage format or quantity with its parameters; `apply ia3` is `apply ia3()`."""

    name: Name
    args: tuple[Arg, ...] = ()


@dataclass(frozen=True)
class Role(Selector):
    """A dotted word such as `attn.q`, `mlp.*`, `norm`. A single word may also be a name made by `let`."""

    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Glob(Selector):
    """A pattern for module names: `*` is a segment or part of one, `**` any number, `{a,b}` a choice."""

    pattern: str

    def regex(self) -> re.Pattern[str]:
        """The same for `fullmatch`. `**` may stand for no segment: `a.**` matches `a`."""
        return re.compile(_glob_regex(self.pattern))


@dataclass(frozen=True)
class Regex(Selector):
    """A regular expression as written between the slashes, `\\/` for a slash; valid for `re.compile`."""

    pattern: str

    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)


@dataclass(frozen=True)
class Union(Selector):
    items: tuple[Selector, ...]


@dataclass(frozen=True)
class Intersect(Selector):
    items: tuple[Selector, ...]


@dataclass(frozen=True)
class Except(Selector):
    base: Selector
    removed: Selector


@dataclass(frozen=True)
class Filter(Selector):
    """The sites of `base` that satisfy a condition."""

    base: Selector


@dataclass(frozen=True)
class InLayers(Filter):
    """`in layers[start:stop:step]`, with Python's meaning; `layers[3]` is read as `layers[3:4]`."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class InStack(Filter):
    """`in encoder`, `in decoder` or `in` a group."""

    name: Name


@dataclass(frozen=True)
class Where(Filter):
    """`where in_features >= 1024`."""

    field: Name
    op: str
    value: Value


@dataclass(frozen=True)
class Apply(Statement):
    method: Call
    target: Selector | None


@dataclass(frozen=True)
class Quantize(Statement):
    target: Selector
    storage: Call


@dataclass(frozen=True)
class Train(Statement):
    target: Selector


@dataclass(frozen=True)
class Freeze(Statement):
    target: Selector


@dataclass(frozen=True)
class Let(Statement):
    """A name for a selector or a method. A bare word on the right is a `Role` until the plan knows better."""

    name: Name
    value: Selector | Call


@dataclass(frozen=True)
class Task(Statement):
    name: Name
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Group(Statement):
    names: tuple[Name, ...]
    call: Call


@dataclass(frozen=True)
class Require(Statement):
    quantity: Call
    op: str
    value: Number


@dataclass(frozen=True)
class Use(Statement):
    """`spec` is what the file says, once it has been read; comparisons leave it out."""

    path: String
    spec: Spec | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Spec(Node):
    statements: tuple[Statement, ...]
    source: Source = field(compare=False, repr=False)


# ---- Text to tree ------------------------------------------------------------------------------------------

# Brackets in brackets, filters on filters: keeps every walk over a tree within Python's own stack.
DEEPEST = 64
MOST_MISTAKES = 100
_FILTER_OPERATORS = ("<=", ">=", "<", ">", "==", "!=")
_BUDGET_OPERATORS = ("<=", "<", ">=", ">", "==")


def parse(source: Source) -> Spec:
    """The specification in a text; `use` is not followed. Raises `PeftcError` with every mistake found."""
    spec, problems = _parse(source)
    if problems:
        raise PeftcError(*problems)
    return spec


def _parse(source: Source) -> tuple[Spec, list[Diagnostic]]:
    """What could be read, and the mistakes in the order of the text."""
    reader = _Reader(source)
    builder = _Builder(source)
    statements = tuple(builder.statement(tree) for tree in reader.read().children if isinstance(tree, Tree))
    problems = sorted(reader.problems + builder.problems, key=lambda problem: problem.span.start if problem.span else 0)
    return Spec(statements, source, span=Span(source, 0, len(source.text))), problems


class _MistakeTerminals:
    """Lark drops terminals that no rule uses; a post-lexer is its way to ask for them."""

    always_accept = ("BAD_STRING", "BAD_QUOTE", "BAD_REGEX", "BAD_OPERATOR", "BAD_NAME", "BAD_CHARACTER")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@functools.cache
def _lark() -> Lark:
    grammar = importlib.resources.files("peftc.grammar").joinpath("peftc.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        lexer="basic",
        start="spec",
        propagate_positions=True,
        maybe_placeholders=True,
        postlex=_MistakeTerminals(),
    )


_CLOSING = {"(": ")", "[": "]", "{": "}"}
_BRACKETS = {"LPAR": "(", "LSQB": "[", "LBRACE": "{", "RPAR": ")", "RSQB": "]", "RBRACE": "}"}
_VERBS = ("APPLY", "QUANTIZE", "TRAIN", "FREEZE", "LET", "TASK", "GROUP", "REQUIRE", "USE")
_WORDS = (*_VERBS, "TO", "WITH", "IN", "WHERE", "EXCEPT", "TRUE", "FALSE")
_NEWLINE, _END = "_NEWLINE", "$END"


class _Reader:
    """Feeds tokens to the LALR parser and puts it back to the start of the statement after a mistake.

    Putting back is cutting the parser's stacks to their height at that point: below it lies only what whole
    statements have left, and nothing that the bad statement did has touched that.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []
        self.tokens = _tokens(source)
        self.parser = _lark().parse_interactive()
        self.taken: list[Token] = []  # what the parser has read, without the line ends it never saw
        self.open: list[Token] = []  # brackets
        self.start = (1, 0)  # height of the parser's stack and of `open` where the present statement starts
        self.outer_starts: list[tuple[int, int]] = []  # the same for the tasks around it
        self.fresh = True  # between statements

    def read(self) -> Tree[Token]:
        """The tree of the good statements; `problems` has the others."""
        index = 0
        while self.tokens[index].type != _END:
            token = self.tokens[index]
            problem = self._bracket_problem(index)
            if problem is None and token.type == _NEWLINE and self._in_brackets():
                index += 1
                continue
            problem = problem or self._feed(index)
            if problem is None:
                index += 1
                continue
            self.problems.append(problem)
            if len(self.problems) == MOST_MISTAKES:
                self.problems.append(errors.TooManyMistakes(limit=MOST_MISTAKES, span=problem.span))
                return Tree("spec", [])
            if isinstance(problem, errors.UnclosedBracket):
                del self.open[self.start[1] :]  # nothing to skip to
            index = self._recover(index)
        return self._end(self.tokens[index])

    def _feed(self, index: int) -> Diagnostic | None:
        """Give the parser one token, or explain why it does not take it."""
        token = self.tokens[index]
        try:
            self.parser.feed_token(token)
        except UnexpectedToken:
            return _Explanation(self, index).diagnostic()
        if self.fresh and token.type not in (_NEWLINE, "RBRACE"):
            self.start = (len(self.parser.parser_state.state_stack) - 1, len(self.open))
        self.fresh = token.type in (_NEWLINE, "LBRACE")
        bracket = _BRACKETS.get(token.type)
        if bracket in _CLOSING:
            self.open.append(token)
        elif bracket:
            self.open.pop()
        if bracket == "{":
            self.outer_starts.append(self.start)
        elif bracket == "}":
            self.start = self.outer_starts.pop()
        self.taken.append(token)
        return None

    def _end(self, end: Token) -> Tree[Token]:
        """Close the tasks that the text leaves open, so that what they hold is still checked."""
        while self.open:
            self.problems.append(self.unclosed(None))
            self.open.pop()
            for terminal in ("RBRACE", _NEWLINE):
                self.parser.feed_token(Token.new_borrow_pos(terminal, "", end))
        tree: Tree[Token] = self.parser.feed_token(end)
        return tree

    def span(self, token: Token) -> Span:
        """Where a token stands; for an end of line or text, the place after the last word before it."""
        if token.type in (_NEWLINE, _END) and self.taken:
            return Span(self.source, self.taken[-1].end_pos or 0, self.taken[-1].end_pos or 0)
        return Span(self.source, token.start_pos or 0, token.end_pos or 0)

    def _in_brackets(self) -> bool:
        return bool(self.open) and self.open[-1] != "{"

    def _starts_statement(self, index: int) -> bool:
        """A verb first on its line, and not the name of a parameter (`group=32`)."""
        first = index > 0 and self.tokens[index - 1].type == _NEWLINE
        return first and self.tokens[index].type in _VERBS and self.tokens[index + 1].type != "_EQUAL"

    def _bracket_problem(self, index: int) -> Diagnostic | None:
        """Brackets that do not match; the parser could only say that it expected something else."""
        token = self.tokens[index]
        span, bracket = self.span(token), _BRACKETS.get(token.type)
        if self._in_brackets():
            if self._starts_statement(index):
                return self.unclosed(span)
            if self.tokens[index + 1].type == _END:
                return self.unclosed(None)
        if bracket is None:
            return None
        if bracket in _CLOSING:
            return errors.TooDeep(limit=DEEPEST, span=span) if len(self.open) >= DEEPEST else None
        if not self.open:
            return errors.UnopenedBracket(bracket=bracket, span=span)
        wanted = _CLOSING[self.open[-1]]
        if bracket == wanted:
            return None
        return errors.MismatchedBracket(bracket=bracket, opening=self.span(self.open[-1]), wanted=wanted, span=span)

    def unclosed(self, found: Span | None) -> Diagnostic:
        """The last open bracket is never closed, though it should be before `found`."""
        opening = self.open[-1]
        wanted = _CLOSING[opening]
        return errors.UnclosedBracket(bracket=str(opening), wanted=wanted, span=self.span(opening), found=found)

    def _recover(self, index: int) -> int:
        """Forget the bad statement; the index of a token that can be read next, such as its line end."""
        brackets = blocks = 0  # of the bad statement, that are still open: ( or [, and { at the end of a line
        if not self.fresh:
            height, opened = self.start
            del self.parser.parser_state.state_stack[height:]
            del self.parser.parser_state.value_stack[height - 1 :]
            brackets = len(self.open) - opened
            del self.open[opened:]
            self.fresh = True
        while (token := self.tokens[index]).type != _END:
            if not blocks and (
                self._starts_statement(index)
                or (token.type == _NEWLINE and not brackets)
                or (token.type == "RBRACE" and self.open)
            ):
                break
            if token.type == "LBRACE":
                blocks += self.tokens[index + 1].type == _NEWLINE
            elif token.type == "RBRACE":
                blocks, brackets = max(blocks - 1, 0), 0
            elif bracket := _BRACKETS.get(token.type):
                brackets = brackets + 1 if bracket in _CLOSING else max(brackets - 1, 0)
            index += 1
        return index


def _tokens(source: Source) -> list[Token]:
    """All tokens of a text, then a line end and the end, both at the end of the text."""
    size = len(source.text)
    ends = [Token(kind, "", size, 0, 0, 0, 0, size) for kind in (_NEWLINE, _END)]
    return [*_lark().lex(source.text), *ends]


# ---- What went wrong ---------------------------------------------------------------------------------------

_SELECTOR = {"NAME", "DOTTED", "STRING", "REGEX", "LPAR"}
_VALUE = {"NAME", "NUMBER", "STRING", "TRUE", "FALSE", "LSQB"}
_KINDS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": "a string in double quotes",
    "COMPARE": "a comparison",
    "_EQUAL": "'='",
    _NEWLINE: "the end of the line",
}
_OTHER_LANGUAGES = {
    "and": "write '&' between sets, or a second 'where'",
    "or": "write ','",
    "not": "write 'except'",
    "on": "write 'to'",
    "|": "write ',' for a union",
}


class _Explanation:
    """Why the parser does not take a token, from what was read before it and what could stand there."""

    def __init__(self, reader: _Reader, index: int) -> None:
        self.reader = reader
        self.token, self.next = reader.tokens[index], reader.tokens[min(index + 1, len(reader.tokens) - 1)]
        self.span = reader.span(self.token)
        self.before = reader.taken[-1] if reader.taken else self.token
        self.accepts: set[str] = reader.parser.accepts()  # type: ignore[no-untyped-call]
        self.found = _described(self.token)

    def diagnostic(self) -> Diagnostic:
        """The first explanation that fits, from the narrow to the general."""
        narrow = (
            self._operator,
            self._mistake,
            self._statement,
            self._slice,
            self._argument,
            self._selector,
            self._word,
        )
        return next(filter(None, (explain() for explain in narrow)), None) or self._general()

    def _operator(self) -> Diagnostic | None:
        if self.token.type not in ("_EQUAL", "BAD_OPERATOR") or "COMPARE" not in self.accepts:
            return None
        operators = _BUDGET_OPERATORS if self._statement_verb() == "REQUIRE" else _FILTER_OPERATORS
        return _unknown_operator(self.token, operators, self.span)

    def _statement_verb(self) -> str:
        """The verb of the present statement."""
        return next((token.type for token in reversed(self.reader.taken) if token.type in _VERBS), "")

    def _mistake(self) -> Diagnostic | None:
        return _lexical_mistake(self.token, self.span)

    def _statement(self) -> Diagnostic | None:
        if self.reader.fresh:
            verbs = tuple(map(str.lower, _VERBS))
            hint = suggest(self.token, verbs)
            return errors.UnknownStatement(found=self.found, hint=hint, verbs=verbs, span=self.span)
        if self.token.type in _VERBS and _NEWLINE in self.accepts:
            return errors.SeveralStatements(verb=str(self.token), span=self.span)
        return None

    def _slice(self) -> Diagnostic | None:
        # In a list, the other use of square brackets, a comma or a string could stand instead.
        if not self.reader.open or self.reader.open[-1] != "[" or self.accepts & {"COMMA", "STRING"}:
            return None
        empty = self.token.type == "RSQB" and self.before.type == "LSQB"
        reason = "it is empty" if empty else f"expected {errors.choices(_expected(self.accepts))}, found {self.found}"
        return errors.BadSlice(reason=reason, span=self.span)

    def _argument(self) -> Diagnostic | None:
        if self.before.type == "NUMBER" and self.token.type == "NAME" and self.next.type != "_EQUAL":
            if self.token in _OTHER_LANGUAGES:
                return self._general()
            return _unknown_unit(str(self.token), self.span)
        if not self.reader.open or "NUMBER" not in self.accepts:
            return None
        if self.before.type == "_EQUAL" and self.token.type in ("COMMA", "RPAR", "RSQB"):
            name = self.reader.taken[-2]
            return errors.MissingValue(name=str(name), span=self.reader.span(name).to(self.reader.span(self.before)))
        if self.token.type in ("DOTTED", "REGEX"):
            return self._general(f'write "{self.token}"')
        return None

    def _selector(self) -> Diagnostic | None:
        if "DOTTED" not in self.accepts:
            return None
        if self.before.type == "COMMA" and self.token.type in (_NEWLINE, "TO", "WITH"):
            return errors.TrailingComma(span=self.reader.span(self.before))
        if self.before.type == "_EQUAL":
            return errors.Unexpected(expected=("a selector", "a method"), found=self.found, span=self.span)
        hint = f'for module names write "{self.token}"' if self.token.type == "NUMBER" else None
        after = _described(self.before)
        return errors.MissingSelector(after=after, found=self.found, hint=hint, span=self.span)

    def _word(self) -> Diagnostic | None:
        if self.reader.open and self.token.type in ("TO", "WITH") and "COMMA" in self.accepts:
            return self.reader.unclosed(self.span)
        if self.accepts == {"STRING"} and self.token.type in ("NAME", "DOTTED"):
            return self._general(f'write "{self.token}"')
        if self.accepts == {"NAME"}:
            if self.before.type in ("APPLY", "WITH"):
                wanted = "a method" if self.before.type == "APPLY" else "a storage format"
                return errors.Unexpected(expected=(wanted,), found=self.found, span=self.span)
            if self.token.type in _WORDS:
                return errors.ReservedName(word=str(self.token), span=self.span)
        if self.token.type not in _SELECTOR or self._hint():
            return None
        for word in {"TO", "WITH"} & self.accepts:
            return errors.MissingWord(word=word.lower(), before=self.found, span=self.span)
        return None

    def _hint(self) -> str | None:
        if self.next.type == "_EQUAL" and self.token.type == "NAME":
            if "LPAR" in self.accepts:
                return "write parameters in brackets"
            if "COMMA" in self.accepts and self.reader.open:
                return "write ',' between parameters"
        words = (word.lower() for word in _WORDS if word in self.accepts)
        return _OTHER_LANGUAGES.get(self.token) or suggest(self.token, words)

    def _general(self, hint: str | None = None) -> Diagnostic:
        expected = _expected(self.accepts)
        return errors.Unexpected(expected=expected, found=self.found, hint=hint or self._hint(), span=self.span)


def _expected(accepts: set[str]) -> tuple[str, ...]:
    """What the parser could take: kinds of things, punctuation, words, the end of the line."""
    left = set(accepts)
    words = []
    if {"APPLY", *_VALUE} <= left:
        words.append("a parameter")
        left -= {*_VALUE, *_WORDS}
    for kind, terminals in (("a selector", _SELECTOR), ("a value", _VALUE)):
        if terminals <= left:
            words.append(kind)
            left -= terminals
    literals = {terminal.name: f"'{terminal.pattern.value}'" for terminal in _lark().terminals}
    words += sorted(_KINDS.get(terminal, literals[terminal]) for terminal in left - {_NEWLINE})
    return (*words, _KINDS[_NEWLINE]) if _NEWLINE in left else tuple(words)


def _described(token: Token) -> str:
    if token.type in (_NEWLINE, _END):
        return "the end of the line"
    return f"'{token}'" if len(token) <= 40 else f"'{token[:37]}...'"


def _bad_number(rest: str, span: Span) -> Diagnostic:
    """What follows the digits of a number is no unit: a misspelt one, or the whole is no number."""
    if rest.isalpha() and rest not in ("e", "E"):
        return _unknown_unit(rest, Span(span.source, span.end - len(rest), span.end))
    return errors.BadNumber(text=span.text, span=span)


def _unknown_unit(unit: str, span: Span) -> Diagnostic:
    return errors.UnknownUnit(unit=unit, hint=suggest(unit, UNITS), units=tuple(UNITS), span=span)


def _unknown_operator(operator: str, operators: tuple[str, ...], span: Span) -> Diagnostic:
    meant = {"=": "==", "=<": "<=", "=>": ">=", "<>": "!=", "===": "=="}.get(operator)
    hint = f"did you mean '{meant}'?" if meant in operators else None
    return errors.UnknownOperator(operator=operator, hint=hint, operators=operators, span=span)


_CHARACTER_HINTS = {
    ";": "one statement a line",
    "\\": "a statement goes on in the next line inside brackets",
    "-": "names have '_' instead",
    "+": "write ',' for a union",
}
_PUNCTUATION = {
    **dict.fromkeys("\u201c\u201d\u201e\u2018\u2019", '"'),
    **dict.fromkeys("\u2013\u2014\u2212", "-"),
    **{"\u2264": "<=", "\u2265": ">=", "\u2260": "!="},
}
_LETTERS = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u03b1\u03bf", "aeopcyxijsao")


def _lexical_mistake(token: Token, span: Span) -> Diagnostic | None:
    """The diagnostic for a token of the grammar's mistake terminals."""
    text = str(token)
    match token.type:
        case "BAD_STRING":
            return errors.UnclosedString(span=span)
        case "BAD_QUOTE":
            return errors.WrongQuote(text=text, span=span)
        case "BAD_REGEX":
            return errors.UnclosedRegex(comment=text.startswith("//"), span=span)
        case "BAD_NAME":
            at = next(index for index, letter in enumerate(text) if not letter.isascii())
            plain = unicodedata.normalize("NFKD", text.translate(_LETTERS)).encode("ascii", "ignore").decode()
            meant = plain if len(plain) == len(text) else None
            return errors.BadName(word=text, character=text[at], meant=meant, span=span)
        case "BAD_CHARACTER":
            plain = _PUNCTUATION.get(text) or unicodedata.normalize("NFKC", text)
            meant = plain if plain != text and plain.isascii() and len(plain) <= 2 else None
            hint = _CHARACTER_HINTS.get(text, "")
            return errors.BadCharacter(character=text, meant=meant, hint=hint, span=span)
    return None


# ---- Parse tree to syntax tree -----------------------------------------------------------------------------


class _Builder:
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
            case "let":
                is_call = parts[1].data == "call"
                return Let(self.name(parts[0]), (self.call if is_call else self.selector)(parts[1]), span=span)
            case "task":
                return self._task(tree, span)
            case "group":
                return Group(tuple(map(self.name, parts[:-1])), self.call(parts[-1]), span=span)
            case "require":
                operator = self._operator(parts[1], _BUDGET_OPERATORS)
                return Require(self.call(parts[0]), operator, self.number(parts[2]), span=span)
            case _:
                return Use(self.string(parts[0]), span=span)

    def _task(self, tree: Tree[Token], span: Span) -> Task:
        name, *body = _parts(tree)
        if self.tasks:
            self.problems.append(errors.NestedTask(outer=self.tasks[-1], span=self._span(name)))
        self.tasks.append(self._span(name))
        task = Task(self.name(name), tuple(self.statement(part) for part in body if part), span=span)
        self.tasks.pop()
        return task

    # Selectors

    def selector(self, tree: Tree[Token]) -> Selector:
        span, parts = self._span(tree), _parts(tree)
        self.depth += 1
        try:
            if self.depth > DEEPEST:
                self.problems.append(errors.TooDeep(limit=DEEPEST, span=span))
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
                    operator = self._operator(parts[2], _FILTER_OPERATORS)
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
        if not all(word.isascii() and word.isidentifier() for word in words):
            self.problems.append(errors.BadRole(text=str(token), span=span))
        return Role(parts, span=span)

    def _glob(self, token: Token, span: Span) -> Glob:
        pattern, offsets = self._unescaped(token)
        if problem := _glob_problem(pattern):
            start, reason = problem
            place = Span(self.source, offsets[start], offsets[min(start + 1, len(pattern))])
            self.problems.append(errors.BadGlob(reason=reason, span=place))
        return Glob(pattern, span=span)

    def _regex(self, pattern: str, span: Span) -> Regex:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
        except re.error as error:
            start = span.start + 1 + (error.pos or 0)
            place = Span(self.source, start, min(start + 1, span.end - 1)) if error.pos is not None else span
            self.problems.append(errors.BadRegex(reason=error.msg, span=place))
        except (OverflowError, RecursionError, Warning) as error:
            self.problems.append(errors.BadRegex(reason=str(error).split(" at position")[0], span=span))
        return Regex(pattern, span=span)

    def _in_layers(self, parts: list[Any], span: Span) -> InLayers:
        base, name, inside = self.selector(parts[0]), self.name(parts[1]), parts[2]
        if name.text != "layers":
            self.problems.append(errors.SlicedGroup(name=name.text, span=name.span))
        bounds = [part and self._bound(part) for part in _parts(inside)]
        if inside.data == "index":
            start = bounds[0]
            return InLayers(base, start, None if start == -1 else start + 1, None, span=span)
        if bounds[2] == 0:
            self.problems.append(errors.BadSlice(reason="the step cannot be 0", span=self._span(_parts(inside)[2])))
        return InLayers(base, *bounds, span=span)

    def _bound(self, tree: Tree[Token]) -> int:
        number = self.number(tree)
        if isinstance(number.value, int) and number.unit is None:
            return number.value
        self.problems.append(errors.BadSlice(reason="layers are counted in whole numbers", span=number.span))
        return 1

    def _in_stack(self, parts: list[Any], span: Span) -> InStack:
        base, name = self.selector(parts[0]), self.name(parts[1])
        if name.text == "layers":
            self.problems.append(errors.SlicedGroup(name=name.text, span=name.span))
        return InStack(base, name, span=span)

    def _operator(self, token: Token, operators: tuple[str, ...]) -> str:
        if token not in operators:
            self.problems.append(_unknown_operator(str(token), operators, self._span(token)))
        return str(token)

    # Methods and values

    def call(self, tree: Tree[Token]) -> Call:
        name, *arguments = _parts(tree)
        args: list[Arg] = []
        named: dict[str, Name] = {}
        for arg in map(self._argument, filter(None, arguments)):
            if arg.name is None and named:
                keyword = next(reversed(named.values()))
                self.problems.append(errors.PositionalAfterKeyword(keyword=keyword.span, span=arg.span))
            elif arg.name and arg.name.text in named:
                first = named[arg.name.text].span
                self.problems.append(errors.DuplicateArgument(name=arg.name.text, first=first, span=arg.name.span))
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
                return self.name(tree)
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

    def string(self, tree: Tree[Token]) -> String:
        return String(self._unescaped(_parts(tree)[0])[0], span=self._span(tree))

    def number(self, tree: Tree[Token]) -> Number:
        span = self._span(tree)
        match = _NUMBER.fullmatch(span.text)
        digits, fraction, unit = match.groups() if match else ("", None, span.text)
        if unit and unit not in UNITS:
            self.problems.append(_bad_number(unit, span))
            return Number(1, span=span)
        value: int | float = math.inf
        if fraction is not None:
            value = float(digits + fraction)
        elif len(digits) < 40:
            value = int(digits)
        if abs(value) > (2**63 - 1 if isinstance(value, int) else sys.float_info.max):
            self.problems.append(errors.NumberTooLarge(span=span))
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
                self.problems.append(errors.BadEscape(escape=part, span=place))
            elif part < " " and part != "\t":
                self.problems.append(errors.BadCharacter(character=part, span=place))
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
_ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}


def _unescape(escape: str) -> str | None:
    if len(escape) == 2:
        return _ESCAPES.get(escape[1])
    character = chr(int(escape[2:], 16))
    return None if unicodedata.category(character) == "Cs" else character


# ---- Name patterns -----------------------------------------------------------------------------------------


def _glob_problem(pattern: str) -> tuple[int, str] | None:
    """Where and why a name pattern is bad: the offset of a character, or of the end."""
    opened = None
    for index, char in enumerate(pattern):
        if char in "?[]()|\\" or char.isspace():
            return index, f"'{char}' has no meaning here"
        if char == "{":
            if opened is not None:
                return index, "a choice inside a choice"
            opened = index
        elif char == "}":
            if opened is None:
                return index, "'}' closes nothing"
            if index == opened + 1:
                return opened, "the choice is empty"
            opened = None
        elif char == "," and opened is None:
            return index, "',' outside of a choice"
    if opened is not None:
        return opened, "'{' is never closed"
    start = 0
    for segment in _segments(pattern):
        if not segment:
            return start, "empty segment" if pattern else "it is empty"
        if "**" in segment and segment != "**":
            return start + segment.index("**"), "'**' must be a whole segment"
        start += len(segment) + 1
    return None


def _segments(pattern: str) -> list[str]:
    """The parts between dots; a dot inside a choice does not count."""
    return re.split(r"\.(?![^{}]*\})", pattern)


def _glob_regex(pattern: str) -> str:
    pattern = re.sub(r"\*\*(?:\.\*\*)+", "**", pattern)
    if pattern == "**":
        return ".*"
    regex = r"\.".join(map(_segment_regex, _segments(pattern)))
    regex = re.sub(rf"^{_ANY}\\\.", r"(?:.*\\.)?", regex)
    return re.sub(rf"\\\.{_ANY}", r"(?:\\..*)?", regex)


_ANY = "<any>"  # stands for `**` until the dots beside it are known; no segment can hold it unescaped


def _segment_regex(segment: str) -> str:
    if segment in ("*", "**"):
        return "[^.]+" if segment == "*" else _ANY
    return "".join({"*": "[^.]*", "{": "(?:", ",": "|", "}": ")"}.get(char) or re.escape(char) for char in segment)


# ---- Tree to text ------------------------------------------------------------------------------------------


def unparse(node: Node) -> str:
    """Canonical text of a node; of a whole specification, one that `parse` reads back to an equal tree."""
    match node:
        case Spec(statements):
            return "".join(f"{unparse(statement)}\n" for statement in statements)
        case Statement():
            return _statement_text(node)
        case Selector():
            return _selector_text(node)
        case Arg(name, value):
            return f"{name.text}={unparse(value)}" if name else unparse(value)
        case Value():
            return _value_text(node)
    raise TypeError(f"no syntax node: {node!r}")


def _statement_text(statement: Statement) -> str:
    match statement:
        case Apply(method, target):
            return f"apply {_method_text(method)}" + (f" to {unparse(target)}" if target else "")
        case Quantize(target, storage):
            return f"quantize {unparse(target)} with {_method_text(storage)}"
        case Train(target):
            return f"train {unparse(target)}"
        case Freeze(target):
            return f"freeze {unparse(target)}"
        case Let(name, value):
            return f"let {name.text} = {unparse(value)}"
        case Task(name, body):
            inside = "".join(f"    {line}\n" for inner in body for line in unparse(inner).split("\n"))
            return f"task {name.text} {{\n{inside}}}"
        case Group(names, call):
            return f"group {', '.join(name.text for name in names)} = {_method_text(call)}"
        case Require(quantity, op, number):
            return f"require {_method_text(quantity)} {op} {unparse(number)}"
        case Use(path):
            return f"use {unparse(path)}"
    raise TypeError(f"no statement: {statement!r}")


def _method_text(call: Call) -> str:
    """A call where only a method can stand: there it needs no brackets."""
    return unparse(call) if call.args else call.name.text


def _value_text(value: Value) -> str:
    match value:
        case Name(text):
            return text
        case Number(number, unit):
            return f"{number!r}{'' if unit in (None, '%') else ' '}{unit or ''}"
        case Bool(truth):
            return "true" if truth else "false"
        case String(text):
            return _quoted(text)
        case ListValue(items):
            return f"[{', '.join(map(unparse, items))}]"
        case Call(name, args):
            return f"{name.text}({', '.join(map(unparse, args))})"
    raise TypeError(f"no value: {value!r}")


def _quoted(text: str) -> str:
    escapes = {value: f"\\{letter}" for letter, value in _ESCAPES.items()}
    return '"' + "".join(escapes.get(char) or (f"\\u{ord(char):04x}" if char < " " else char) for char in text) + '"'


_BINDING: dict[type[Selector], int] = {Union: 0, Except: 1, Intersect: 2}  # the others bind tightest


def _selector_text(selector: Selector, binding: int = 0) -> str:
    """The text of a selector, in brackets if it binds more loosely than its place asks for."""
    if _BINDING.get(type(selector), 3) < binding:
        return f"({_selector_text(selector)})"
    match selector:
        case Union(items):
            return ", ".join(_selector_text(item, 1) for item in items)
        case Except(base, removed):
            return f"{_selector_text(base, 1)} except {_selector_text(removed, 2)}"
        case Intersect(items):
            return " & ".join(_selector_text(item, 3) for item in items)
        case InLayers(base, start, stop, step):
            bounds = ["" if bound is None else str(bound) for bound in (start, stop, step)]
            return f"{_selector_text(base, 3)} in layers[{':'.join(bounds[: 2 if step is None else 3])}]"
        case InStack(base, name):
            return f"{_selector_text(base, 3)} in {name.text}"
        case Where(base, quantity, op, value):
            return f"{_selector_text(base, 3)} where {quantity.text} {op} {unparse(value)}"
        case Role():
            return selector.text
        case Glob(pattern):
            return _quoted(pattern)
        case Regex(pattern):
            slashes_escaped = re.sub(r"(\\.)|/", lambda part: part[1] or r"\/", pattern)
            return f"/{slashes_escaped}/"
    raise TypeError(f"no selector: {selector!r}")


# ---- Files -------------------------------------------------------------------------------------------------

LARGEST_FILE = 1 << 20  # bytes
MOST_FILES = 100
DEEPEST_USE = 16


def parse_file(path: str | Path, *, roots: Iterable[str | Path] = ()) -> Spec:
    """The specification in a file, and in the files it uses (`Use.spec`).

    A used file is found relative to the file that names it, and must lie, symbolic links resolved, below the
    folder of `path` or one of `roots`. Raises `PeftcError` with every mistake of every file.
    """
    reader = _Files((Path(path).resolve().parent, *(Path(root).resolve() for root in roots)))
    spec = reader.read(Path(path), str(path), None)
    if reader.problems:
        raise PeftcError(*reader.problems)
    assert spec is not None  # or there were problems
    return spec


class _Files:
    """Reads a file and what it uses, depth first."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self.folders = folders
        self.problems: list[Diagnostic] = []
        self.chain: list[Path] = []  # the files being read, resolved
        self.count = 0

    def read(self, path: Path, name: str, asked: Span | None) -> Spec | None:
        self.count += 1
        if self.count > MOST_FILES or len(self.chain) > DEEPEST_USE:
            limit = MOST_FILES if self.count > MOST_FILES else DEEPEST_USE
            self.problems.append(errors.TooManyFiles(limit=limit, span=asked))
            return None
        text = _text(path)
        if isinstance(text, _Unreadable):
            self.problems.append(errors.UnreadableFile(path=name, reason=text.reason, span=asked))
            return None
        spec, problems = _parse(Source(name, text))
        self.problems += problems
        self.chain.append(path.resolve())
        spec = replace(spec, statements=self._follow(spec.statements, Path(name).parent))
        self.chain.pop()
        return spec

    def _follow(self, statements: Sequence[Statement], folder: Path) -> tuple[Statement, ...]:
        """The statements with the files they use read."""
        followed: list[Statement] = []
        for statement in statements:
            if isinstance(statement, Use):
                statement = replace(statement, spec=self._use(statement.path, folder))
            elif isinstance(statement, Task):
                statement = replace(statement, body=self._follow(statement.body, folder))
            followed.append(statement)
        return tuple(followed)

    def _use(self, path: String, folder: Path) -> Spec | None:
        try:
            target = (folder / path.value).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            self.problems.append(errors.UnreadableFile(path=path.value, reason=_reason(error), span=path.span))
            return None
        if not any(target.is_relative_to(allowed) for allowed in self.folders):
            allowed = tuple(map(str, self.folders))
            self.problems.append(errors.UseEscapes(path=path.value, folders=allowed, span=path.span))
            return None
        if target in self.chain:
            chain = tuple(file.name for file in (*self.chain[self.chain.index(target) :], target))
            self.problems.append(errors.UseCycle(chain=chain, span=path.span))
            return None
        return self.read(target, str(folder / path.value), path.span)


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _text(path: Path) -> str | _Unreadable:
    try:
        if not path.is_file():
            return _Unreadable("it is no regular file" if path.exists() else "there is no such file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            return _Unreadable(f"it is larger than {LARGEST_FILE >> 20} MiB")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _Unreadable(f"it is not UTF-8 (byte {error.start}, line {line})")
    except (OSError, ValueError) as error:
        return _Unreadable(_reason(error))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
