"""The words and signs of the language, and the lexer that finds them."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Iterator
from typing import Any

from lark import Lark, Token
from lark import __version__ as lark_version
from lark.grammar import Rule
from lark.lexer import TerminalDef

from peftc.diagnostics.source import Source, Span

VERBS = ("APPLY", "QUANTIZE", "TRAIN", "FREEZE", "CHECKPOINT", "LET", "TASK", "GROUP", "REQUIRE", "FIT", "USE")
WORDS = (*VERBS, "USING", "TO", "WITH", "IN", "WHERE", "EXCEPT", "TRUE", "FALSE")
NEWLINE, END = "_NEWLINE", "$END"
GRAMMAR, TABLES = "peftc.lark", "tables.json"
CLOSING = {"(": ")", "[": "]", "{": "}"}
BRACKETS = {"LPAR": "(", "LSQB": "[", "LBRACE": "{", "RPAR": ")", "RSQB": "]", "RBRACE": "}"}
FILTER_OPERATORS = ("<=", ">=", "<", ">", "==", "!=")
BUDGET_OPERATORS = ("<=", "<", ">=", ">", "==")
FIT_OPERATORS = ("<=", "<")


class _MistakeTerminals:
    """Lark drops terminals that no rule uses; a post-lexer is its way to ask for them."""

    always_accept = ("BAD_STRING", "BAD_QUOTE", "BAD_REGEX", "BAD_OPERATOR", "BAD_NAME", "BAD_CHARACTER")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@functools.cache
def grammar() -> Lark:
    """The parser. Its tables lie beside the grammar: to make them takes longer than a whole check does with them."""
    known = json.loads(_packaged(TABLES), object_pairs_hook=_with_numbers)
    if known["of"] != _origin():
        return built()
    parser: Lark = Lark._load_from_dict(known["data"], known["memo"], postlex=_MistakeTerminals())  # type: ignore[no-untyped-call]
    return parser


def built() -> Lark:
    """The parser, from the grammar itself."""
    return Lark(
        _packaged(GRAMMAR),
        parser="lalr",
        lexer="basic",
        start="spec",
        propagate_positions=True,
        maybe_placeholders=True,
        postlex=_MistakeTerminals(),
    )


def tables() -> str:
    """What lies beside the grammar: the parser's tables, and what they were made of and with."""
    data, memo = built().memo_serialize([TerminalDef, Rule])
    del data["options"]["postlex"]
    return json.dumps({"of": _origin(), "data": data, "memo": memo}, separators=(",", ":")) + "\n"


def _origin() -> list[str]:
    return [lark_version, hashlib.sha256(_packaged(GRAMMAR).encode()).hexdigest()]


def _packaged(name: str) -> str:
    return importlib.resources.files("peftc.grammar").joinpath(name).read_text(encoding="utf-8")


def _with_numbers(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """States and what refers to rules are numbered, and JSON has words alone for keys."""
    return {int(key) if key.isdecimal() else key: value for key, value in pairs}


def tokens(source: Source, most: int) -> list[Token]:
    """All tokens of a text, or of a longer one one more than `most`; then a line end and the end, both at its end."""
    size = len(source.text)
    ends = [Token(kind, "", size, 0, 0, 0, 0, size) for kind in (NEWLINE, END)]
    return [*itertools.islice(grammar().lex(source.text), most + 1), *ends]


def span(source: Source, token: Token) -> Span:
    return Span(source, token.start_pos or 0, token.end_pos or 0)
