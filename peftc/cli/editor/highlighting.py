"""The grammar for Lark -> one for editors that colour by TextMate's: the same words and signs, with a scope each.

A text is coloured as the lexer reads it: each rule is a terminal's own expression, in the order in which the lexer
tries them. Two things more are told by what is around a word: what a call names, and which word is a parameter.
"""

from __future__ import annotations

import json
from typing import Any

from lark.lexer import PatternStr, TerminalDef

from peftc.language.tokens import VERBS, WORDS, grammar

SCOPES = {
    **dict.fromkeys(WORDS, "keyword.operator.word"),
    **dict.fromkeys(VERBS, "keyword.control"),
    **dict.fromkeys(("TRUE", "FALSE"), "constant.language"),
    **dict.fromkeys(("COMPARE", "_EQUAL", "AMPERSAND"), "keyword.operator"),
    "NAME": "variable.other",
    "DOTTED": "support.type",  # a role
    "NUMBER": "constant.numeric",
    "STRING": "string.quoted.double",
    "REGEX": "string.regexp",
}
NAME = "entity.name"


def textmate() -> str:
    """The grammar, as the file that editors read."""
    terminals = sorted(grammar().terminals, key=_order)
    name = next(each for each in terminals if each.name == "NAME").pattern.to_regexp()
    repository = {
        "arguments": {
            "begin": r"\(", "end": r"\)",
            "patterns": [_rule("variable.parameter", rf"{name}(?=[ \t]*=(?![<>=!~]))"), {"include": "$self"}],
        },
        "defined": {
            "match": rf"((?<![\w.*])(?:let|task))[ \t]+({name})",
            "captures": {"1": {"name": "keyword.control.peft"}, "2": {"name": f"{NAME}.peft"}},
        },
        "called": _rule(f"{NAME}.function", rf"{name}(?=[ \t]*\()"),
    }  # fmt: skip
    rules: list[dict[str, Any]] = [{"include": "#defined"}, {"include": "#arguments"}]
    for each in terminals:
        if each.name == "NAME":
            rules.append({"include": "#called"})
        if each.name not in ("LPAR", "RPAR"):  # which `arguments` has
            rules.append(_terminal(each))
    made = {
        "name": "peft", "scopeName": "source.peft", "fileTypes": ["peft"], "patterns": rules, "repository": repository,
    }  # fmt: skip
    return json.dumps(made, indent=2) + "\n"


def _order(terminal: TerminalDef) -> tuple[int, bool, int, int, str]:
    """As Lark's lexer has it; words before the names that they would else be."""
    pattern = terminal.pattern
    word = isinstance(pattern, PatternStr) and terminal.name in WORDS
    return -terminal.priority, not word, -pattern.max_width, -len(pattern.value), terminal.name


def _terminal(terminal: TerminalDef) -> dict[str, Any]:
    expression = terminal.pattern.to_regexp()
    if terminal.name in WORDS:
        expression += r"(?!\w)"
    if terminal.name.startswith("BAD_"):
        return _rule("invalid.illegal", expression)
    if terminal.name.startswith("__IGNORE") and expression.startswith("#"):
        return _rule("comment.line.number-sign", expression)
    return _rule(SCOPES.get(terminal.name, ""), expression)


def _rule(scope: str, expression: str) -> dict[str, Any]:
    return {"name": f"{scope}.peft", "match": expression} if scope else {"match": expression}
