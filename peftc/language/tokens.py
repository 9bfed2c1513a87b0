"""The words and signs of the language, and the lexer that finds them."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Iterator

from lark import Lark, Token

from peftc.diagnostics.source import Source, Span

VERBS = ("APPLY", "QUANTIZE", "TRAIN", "FREEZE", "CHECKPOINT", "LET", "TASK", "GROUP", "REQUIRE", "USE")
WORDS = (*VERBS, "TO", "WITH", "IN", "WHERE", "EXCEPT", "TRUE", "FALSE")
NEWLINE, END = "_NEWLINE", "$END"
CLOSING = {"(": ")", "[": "]", "{": "}"}
BRACKETS = {"LPAR": "(", "LSQB": "[", "LBRACE": "{", "RPAR": ")", "RSQB": "]", "RBRACE": "}"}
FILTER_OPERATORS = ("<=", ">=", "<", ">", "==", "!=")
BUDGET_OPERATORS = ("<=", "<", ">=", ">", "==")


class _MistakeTerminals:
    """Lark drops terminals that no rule uses; a post-lexer is its way to ask for them."""

    always_accept = ("BAD_STRING", "BAD_QUOTE", "BAD_REGEX", "BAD_OPERATOR", "BAD_NAME", "BAD_CHARACTER")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@functools.cache
def grammar() -> Lark:
    text = importlib.resources.files("peftc.grammar").joinpath("peftc.lark").read_text(encoding="utf-8")
    return Lark(
        text,
        parser="lalr",
        lexer="basic",
        start="spec",
        propagate_positions=True,
        maybe_placeholders=True,
        postlex=_MistakeTerminals(),
    )


def tokens(source: Source, most: int) -> list[Token]:
    """All tokens of a text, or of a longer one one more than `most`; then a line end and the end, both at its end."""
    size = len(source.text)
    ends = [Token(kind, "", size, 0, 0, 0, 0, size) for kind in (NEWLINE, END)]
    return [*itertools.islice(grammar().lex(source.text), most + 1), *ends]


def span(source: Source, token: Token) -> Span:
    return Span(source, token.start_pos or 0, token.end_pos or 0)
