"""The grammar for editors is what the one for Lark makes, and colours what the lexer reads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import golden
from paths import ROOT
from peftc.cli.editor.highlighting import SCOPES, textmate
from peftc.diagnostics.source import Source
from peftc.language.reader import MOST_WORDS
from peftc.language.tokens import tokens


def test_the_file_is_what_the_grammar_makes(pytestconfig: pytest.Config) -> None:
    golden.check(ROOT / "grammar" / "peft.tmLanguage.json", textmate(), pytestconfig)


def coloured(text: str) -> list[tuple[int, int, str]]:
    """Start, end and scope of each piece, by the first of the rules that match at the nearest place."""
    grammar = json.loads(textmate())

    def rules(patterns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for one in patterns:
            name = one.get("include", "")
            found += (
                rules(grammar["patterns"]) if name == "$self" else [grammar["repository"][name[1:]]] if name else [one]
            )
        return found

    outer, inner = rules(grammar["patterns"]), rules(grammar["repository"]["arguments"]["patterns"])
    place, depth, found = 0, 0, list[tuple[int, int, str]]()
    while place < len(text):
        ending = [{"match": r"\)", "name": "end"}] if depth else []
        matches = (
            (re.compile(one.get("match") or one["begin"]).search(text, place), one)
            for one in (*ending, *(inner if depth else outer))
        )
        match, rule = min(
            ((match, one) for match, one in matches if match and match.end() > match.start()),
            key=lambda pair: pair[0].start(),
        )
        depth += ("begin" in rule) - (rule in ending)
        if "captures" in rule:
            found += [(*match.span(int(group)), scope["name"]) for group, scope in rule["captures"].items()]
        elif "name" in rule:
            found.append((*match.span(), rule["name"]))
        place = match.end()
    return found


MORE = 'apply qalora(group = 32, init=pissa) to /a\\/b#/ & "x#y" where in_features >= 1_024 # end\ntrain norm, é\n'


@pytest.mark.parametrize("name", ["mixed", "s4", "tasks", None])
def test_words_have_the_scope_of_their_kind(name: str | None) -> None:
    text = (ROOT / "examples" / "recipes" / f"{name}.peft").read_text() if name else MORE
    found = {(start, end): scope for start, end, scope in coloured(text)}
    for token in tokens(Source("", text), MOST_WORDS)[:-2]:
        scope = found.get((token.start_pos or 0, token.end_pos or 0), "")
        if token.type.startswith("BAD_"):
            assert scope == "invalid.illegal.peft"
        elif token.type in SCOPES:
            told = {"entity.name", "entity.name.function", "variable.parameter"}  # by what is around a word
            allowed = {SCOPES[token.type], *(told if token.type in ("NAME", "GROUP") else ())}
            assert scope.removesuffix(".peft") in allowed, (token, token.type, scope)
    assert sum(scope.startswith("comment") for scope in found.values()) == len(re.findall(r"(?m)^#|# end", text))


def test_what_calls_name_and_parameters() -> None:
    found = {MORE[start:end]: scope for start, end, scope in coloured(MORE)}
    assert found["qalora"] == "entity.name.function.peft"
    assert found["group"] == found["init"] == "variable.parameter.peft"
    assert found["pissa"] == "variable.other.peft"
