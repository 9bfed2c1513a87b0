"""A spec in the one layout that `peftc fmt` gives it: white space alone changes.

Where lines break stays the author's choice; a line is indented by the brackets that are open in front of it, words and
signs stand as far apart as their kinds ask for, comments stay with their lines, and of blank lines in a row one stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lark import Token

from peftc.diagnostics.source import Source
from peftc.language import parse
from peftc.language.reader import MOST_WORDS
from peftc.language.tokens import BRACKETS, CLOSING, NEWLINE, tokens

INDENT = "    "
BEFORE_COMMENT = 2  # columns, at least: comments behind lines in a row stand below one another
_COMMENT = re.compile(r"#[^\r\n]*")


def laid_out(source: Source) -> str:
    """The text in its layout; laid out again it stays as it is.

    Raises:
        PeftcError: with every mistake of a text that cannot be read.
        RuntimeError: where the result would not say the same, which is a mistake of this function.
    """
    spec = parse(source)
    lines = _lines(source)
    text = _text(lines)
    again = Source(source.name, text)
    if parse(again) != spec or _comments(_lines(again)) != _comments(lines):
        raise RuntimeError(f"the layout of {source.name} would change what it says; it is left as it is")
    return text


@dataclass
class _Line:
    """The words and signs of a line, and the comment behind them."""

    tokens: list[Token] = field(default_factory=list)
    comment: str = ""

    @property
    def blank(self) -> bool:
        return not self.tokens and not self.comment

    @property
    def opens(self) -> bool:
        """Whether it ends with an opening bracket."""
        return bool(self.tokens) and BRACKETS.get(self.tokens[-1].type, "") in CLOSING

    @property
    def closers(self) -> int:
        """How many closing brackets it begins with."""
        kinds = [BRACKETS.get(token.type) in CLOSING.values() for token in self.tokens]
        return [*kinds, False].index(False)


def _lines(source: Source) -> list[_Line]:
    lines, end = [_Line()], 0
    for token in tokens(source, MOST_WORDS)[:-1]:  # the last but one ends a line that no line end does
        if comment := _COMMENT.search(source.text, end, token.start_pos or 0):
            lines[-1].comment = comment.group().rstrip()
        if token.type == NEWLINE:
            lines.append(_Line())
        else:
            lines[-1].tokens.append(token)
        end = token.end_pos or 0
    return lines


def _comments(lines: list[_Line]) -> list[str]:
    return [line.comment for line in lines if line.comment]


def _text(lines: list[_Line]) -> str:
    kept = _without_blanks(lines)
    code = _code(kept)
    columns = _comment_columns(kept, code)
    whole = [
        f"{words}{' ' * (column - len(words))}{line.comment}"
        for words, line, column in zip(code, kept, columns, strict=True)
    ]
    return "".join(f"{line.rstrip()}\n" for line in whole)


def _without_blanks(lines: list[_Line]) -> list[_Line]:
    """The lines without those blank ones that stand at an end of the file or a bracket, or behind another."""
    kept: list[_Line] = []
    for line in lines:
        while line.closers and kept and kept[-1].blank:
            kept.pop()
        if not line.blank or (kept and not kept[-1].blank and not kept[-1].opens):
            kept.append(line)
    while kept and kept[-1].blank:
        kept.pop()
    return kept


def _code(lines: list[_Line]) -> list[str]:
    """Each line without its comment; brackets that one line opened indent once."""
    made: list[str] = []
    opened: list[tuple[str, int]] = []  # brackets, and the lines that they stand in
    for number, line in enumerate(lines):
        depth = len({at for _, at in opened[: len(opened) - line.closers]})
        text, before = "", None
        for token in line.tokens:
            within = opened[-1][0] if opened else ""
            text += ("" if before is None else _gap(before, token, within)) + _word(token)
            bracket = BRACKETS.get(token.type)
            if bracket in CLOSING:
                opened.append((bracket, number))
            elif bracket:
                opened.pop()
            before = token
        made.append(INDENT * depth + text if text or line.comment else "")
    return made


def _comment_columns(lines: list[_Line], code: list[str]) -> list[int]:
    """Where the comment of each line begins."""
    columns = [len(words) for words in code]
    start = 0
    while start < len(lines):
        end = start
        while end < len(lines) and lines[end].tokens and lines[end].comment:
            end += 1
        if end > start:
            columns[start:end] = [max(map(len, code[start:end])) + BEFORE_COMMENT] * (end - start)
        start = end + 1
    return columns


def _word(token: Token) -> str:
    """A number has one blank before its unit, and none before `%`."""
    return re.sub(r"[ \t]+", " ", token).replace(" %", "%") if token.type == "NUMBER" else str(token)


def _gap(before: Token, token: Token, within: str) -> str:
    """What stands between two tokens of a line; `within`: the innermost bracket around the second."""
    left, right = BRACKETS.get(before.type, before.type), BRACKETS.get(token.type, token.type)
    if right in (")", "]", "COMMA", "COLON") or left in ("(", "[", "COLON"):
        return ""
    if right in ("(", "[") and left == "NAME":
        return ""
    if "_EQUAL" in (left, right):
        return "" if within in ("(", "[") else " "
    return "" if (left, right) == ("{", "}") else " "
