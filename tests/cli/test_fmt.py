"""`peftc fmt`: one layout, in which a spec says what it said, comments and all."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import NOWHERE, statements
from paths import ROOT
from peftc import language as syntax
from peftc.cli import main
from peftc.cli.editor.layout import laid_out
from peftc.diagnostics.source import Source
from peftc.language import Spec, parse, unparse
from peftc.language.reader import MOST_WORDS
from peftc.language.tokens import BRACKETS, CLOSING, tokens

MESSY = """\

#  head
let  top=block   in layers [ -2 : ]# tail
apply gated(lora(   # rank
r=8, alpha = 16
   # alone
   ) )to (attn.q ,mlp.*,) in layers[1:5]&"**.#x"   # c

\t
require memory( batch = 4 )<=24    GiB
require trainable <=1 %
task a {train norm}
task b{

  # hello
train bias

}
"""
LAID_OUT = """\
#  head
let top = block in layers[-2:]  # tail
apply gated(lora(               # rank
    r=8, alpha=16
    # alone
)) to (attn.q, mlp.*,) in layers[1:5] & "**.#x"  # c

require memory(batch=4) <= 24 GiB
require trainable <= 1%
task a { train norm }
task b {
    # hello
    train bias
}
"""


def test_a_layout() -> None:
    assert laid_out(Source("messy.peft", MESSY)) == LAID_OUT
    assert laid_out(Source("messy.peft", MESSY.replace("\n", "\r\n"))) == LAID_OUT
    assert laid_out(Source("messy.peft", LAID_OUT)) == LAID_OUT
    assert laid_out(Source("empty.peft", "\n \n")) == ""


def _spaced(text: str, seed: int) -> tuple[str, list[str]]:
    """The same statements, with white space, line ends and comments wherever they may stand; and the comments."""
    draw, made, comments, opened = random.Random(seed), "", list[str](), list[str]()
    for token in tokens(Source("", text), MOST_WORDS)[:-1]:
        bracket = BRACKETS.get(token.type)
        gaps = [" ", "\t "]
        if token.type == "_NEWLINE":
            gaps = [" ", " # end"]
        elif opened and opened[-1] != "{" and token.type != "_EQUAL":  # `group` at the end of a line is a verb
            gaps = [" ", "  ", " # so\n", "\n\n"]
        gap = draw.choice(gaps) if made else ""
        comments += [gap.strip()] if "#" in gap else []
        made += gap + token
        if bracket in CLOSING:
            opened.append(bracket)
        elif bracket:
            opened.pop()
    return made, comments


@settings(max_examples=40)
@given(st.lists(statements, max_size=3), st.integers(0, 2**32))
def test_any_spec_says_the_same_and_stays(items: list[syntax.Statement], seed: int) -> None:
    spec = Spec(tuple(items), Source("", ""), **NOWHERE)
    text, comments = _spaced(unparse(spec), seed)
    assert parse(Source("spaced.peft", text)) == spec
    once = laid_out(Source("spaced.peft", text))
    assert parse(Source("once.peft", once)) == spec
    assert laid_out(Source("once.peft", once)) == once
    assert [line.split("# ")[-1] for line in once.split("\n") if line.endswith(("# so", "# end"))] == [
        comment.removeprefix("# ") for comment in comments
    ]


def test_the_recipes_are_laid_out() -> None:
    assert main(["fmt", "--check", *map(str, sorted((ROOT / "examples" / "recipes").glob("*.peft")))]) == 0


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, messy, wrong = (tmp_path / f"{name}.peft" for name in ("good", "messy", "wrong"))
    good.write_text(LAID_OUT)
    messy.write_text(MESSY)
    messy.chmod(0o640)
    wrong.write_text("train  norm\napply lora(r=8 to attn.q\n")
    files = [str(good), str(messy)]

    assert main(["fmt", "--check", *files]) == 1
    assert capsys.readouterr().err.count("would be laid out otherwise") == 1
    assert main(["fmt", "--diff", *files]) == 0
    assert "+require trainable <= 1%" in capsys.readouterr().out
    assert messy.read_text() == MESSY

    link = tmp_path / "link.peft"
    link.symlink_to(messy)
    assert main(["fmt", "--json", str(good), str(link)]) == 0
    assert json.loads(capsys.readouterr().out) == {"changed": [str(link)], "unchanged": [str(good)]}
    assert link.is_symlink()
    assert messy.read_text() == LAID_OUT
    assert messy.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.peft", "link.peft", "messy.peft", "wrong.peft"]

    assert main(["fmt", str(wrong)]) == 1
    assert "wrong.peft:2" in capsys.readouterr().err
    assert wrong.read_text().startswith("train  norm")


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"train   norm")))
    assert main(["fmt", "-"]) == 0
    assert capsys.readouterr().out == "train norm\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"train \xff")))
    assert main(["fmt", "-"]) == 1
    assert "it is not UTF-8" in capsys.readouterr().err
