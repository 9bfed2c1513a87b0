"""Places in texts, and how diagnostics look."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, suggest
from peftc.diagnostics.render import render
from peftc.diagnostics.source import Label, Source, Span


class Mistake(Diagnostic):
    code = "mistake"
    words: str = "something is wrong"
    at_caret: str = ""
    others: tuple[Label, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.words

    @property
    def label(self) -> str:
        return self.at_caret

    @property
    def secondary(self) -> tuple[Label, ...]:
        return self.others

    @property
    def notes(self) -> tuple[str, ...]:
        return self.remarks


def find(text: str, part: str, name: str = "spec.peft") -> Span:
    start = text.index(part)
    return Span(Source(name, text), start, start + len(part))


def rendered(text: str, part: str, label: str = "") -> str:
    """The excerpt alone."""
    return "\n".join(render(Mistake(span=find(text, part), at_caret=label)).splitlines()[2:])


def test_the_look_of_a_diagnostic() -> None:
    text = "quantize linear with nf4\ntrain norm\napply lora(rnak=8) to attn.q\n"
    mistake = Mistake(
        words="lora has no parameter 'rnak'",
        span=find(text, "rnak"),
        at_caret="did you mean 'rank'?",
        remarks=("lora takes: r (rank), alpha, dropout, init, rslora",),
    )
    assert render(mistake) == (
        "error[unknown-parameter]: lora has no parameter 'rnak'\n"
        " --> spec.peft:3:12\n"
        "3 | apply lora(rnak=8) to attn.q\n"
        "  |            ^^^^ did you mean 'rank'?\n"
        "  = lora takes: r (rank), alpha, dropout, init, rslora"
    ).replace("unknown-parameter", "mistake")


def test_without_a_place() -> None:
    mistake = Mistake(remarks=("first line\nsecond line",))
    assert render(mistake) == "error[mistake]: something is wrong\n  = first line\n    second line"


def test_gutter_is_as_wide_as_the_widest_line_number() -> None:
    text = "\n" * 8 + "train x\ntrain y\n"
    mistake = Mistake(span=find(text, "y"), others=(Label(find(text, "x"), "as here"),), remarks=("a note",))
    assert render(mistake).splitlines()[1:] == [
        "  --> spec.peft:10:7",
        " 9 | train x",
        "   |       - as here",
        "10 | train y",
        "   |       ^",
        "   = a note",
    ]


def test_secondary_labels_in_the_same_line_and_in_other_files() -> None:
    text, other = "f(r=1, r=2)", "let r = 1\n\nuse it"
    mistake = Mistake(
        span=find(text, "r=2"),
        at_caret="again",
        others=(Label(find(text, "r=1"), "first"), Label(find(other, "it", "b.peft"), "from here")),
    )
    assert render(mistake).splitlines()[1:] == [
        " --> spec.peft:1:8",
        "1 | f(r=1, r=2)",
        "  |        ^^^ again",
        "  |   --- first",
        " ::: b.peft:3:5",
        "3 | use it",
        "  |     -- from here",
    ]


def test_span_over_several_lines() -> None:
    text = "apply lora(\n  r=8,\n  alpha=16\n) to attn.q\n"
    assert rendered(text, text[6:-11], "here") == ("1 | apply lora(\n  |       ^^^^^\n...\n4 | ) to attn.q\n  | ^ here")


@pytest.mark.parametrize(
    ("text", "part", "excerpt"),
    [
        ("a\tbad", "bad", "1 | a   bad\n  |     ^^^"),
        ("\t\tbad", "bad", "1 |         bad\n  |         ^^^"),
        ("漢字 bad", "bad", "1 | 漢字 bad\n  |      ^^^"),
        ("漢字", "字", "1 | 漢字\n  |   ^^"),
        ("e\u0301e\u0301 bad", "bad", "1 | e\u0301e\u0301 bad\n  |    ^^^"),
        ("e\u0301x", "\u0301", "1 | e\u0301x\n  |  ^"),
        ("\x1b[31m\u202ebad", "bad", "1 | ␛[31m\ufffdbad\n  |       ^^^"),
        ("a\r\nbad\r\nc", "bad", "2 | bad\n  | ^^^"),
        ("a\rbad", "bad", "2 | bad\n  | ^^^"),
    ],
)
def test_columns_on_the_screen(text: str, part: str, excerpt: str) -> None:
    assert rendered(text, part) == excerpt


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("", "1 |\n  | ^"),
        ("train", "1 | train\n  |      ^"),
        ("train\n", "2 |\n  | ^"),
        ("train\r\n", "2 |\n  | ^"),
    ],
)
def test_end_of_the_text(text: str, excerpt: str) -> None:
    span = Span(Source("x", text), len(text), len(text))
    assert "\n".join(render(Mistake(span=span)).splitlines()[2:]) == excerpt


def test_long_lines_are_cut_around_the_caret() -> None:
    line, underline = rendered("x" * 5000 + "bad" + "y" * 5000, "bad").splitlines()
    assert len(line) < 150
    assert line[4] == line[-1] == "…"
    assert line[underline.index("^") : underline.index("^") + 3] == "bad"


def test_colour_changes_nothing_but_colour() -> None:
    mistake = Mistake(span=find("a b c", "b"), at_caret="x", remarks=("y",))
    coloured = render(mistake, colour=True)
    assert "\x1b[1;31m^\x1b[0m" in coloured
    plain = coloured
    for code in ("0", "1", "1;31", "1;34"):
        plain = plain.replace(f"\x1b[{code}m", "")
    assert plain == render(mistake)


def test_words_are_kept_whole_on_a_terminal() -> None:
    """Titles, words at a caret and notes end their lines between words; a source line is cut, so that carets fit."""
    mistake = Mistake(
        words="one of the words of this title is more than there is room for",
        span=find("before " * 20 + "bad" + " after" * 20, "bad"),
        at_caret="words that stand beside it, in more than one line",
        remarks=("choices: " + ", ".join(["alpha", "beta", "gamma"] * 5), "  indented " * 6),
    )
    assert render(mistake, columns=60).splitlines() == [
        "error[mistake]: one of the words of this title is more than",
        "  there is room for",
        " --> spec.peft:1:141",
        "1 | …fore before before bad after after after after after a…",
        "  |                     ^^^ words that stand beside it, in",
        "  |                         more than one line",
        "  = choices: alpha, beta, gamma, alpha, beta, gamma, alpha,",
        "    beta, gamma, alpha, beta, gamma, alpha, beta, gamma",
        "  =   indented   indented   indented   indented   indented",
        "      indented",
    ]
    assert max(map(len, render(mistake, columns=40).splitlines())) <= 40


def test_words_stand_below_a_caret_at_the_edge() -> None:
    mistake = Mistake(
        span=find("a line that ends where the caret stands: bad", "bad"), at_caret="some words, told below"
    )
    assert render(mistake, columns=60).splitlines()[2:] == [
        "1 | a line that ends where the caret stands: bad",
        "  |                                          ^^^",
        "  |                                   some words, told below",
    ]


def test_a_note_is_told_once() -> None:
    both = ("choices: a, b",)
    one, two = Mistake(words="one", remarks=both), Mistake(words="two", remarks=(*both, "of two alone"))
    assert str(PeftcError(one, two)) == (
        "error[mistake]: one\n  = choices: a, b\n\nerror[mistake]: two\n  = of two alone"
    )


def test_json() -> None:
    other = Label(find("a\nb c", "c"), "there")
    assert Mistake(span=find("a\nb c", "b"), at_caret="here", others=(other,)).to_json() == {
        "code": "mistake",
        "title": "something is wrong",
        "file": "spec.peft",
        "line": 2,
        "column": 1,
        "end_line": 2,
        "end_column": 2,
        "label": "here",
        "notes": [],
        "secondary": [{"file": "spec.peft", "line": 2, "column": 3, "end_line": 2, "end_column": 4, "label": "there"}],
    }
    assert Mistake().to_json()["line"] is None


def test_an_error_prints_all_its_diagnostics() -> None:
    error = PeftcError(Mistake(words="one"), Mistake(words="two"))
    assert str(error) == "error[mistake]: one\n\nerror[mistake]: two"


def test_suggest() -> None:
    assert suggest("rnak", ["alpha", "rank"]) == "did you mean 'rank'?"
    assert suggest("gib", ["KiB", "GiB"]) == "did you mean 'GiB'?"
    assert suggest("qwertz", ["alpha", "rank"]) is None


@given(st.text(), st.data())
def test_any_span_of_any_text_renders(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    source = Source("any", text)
    mistake = Mistake(words=text, span=Span(source, start, end), others=(Label(Span(source, 0, end), text),))
    output = render(mistake) + render(mistake, columns=data.draw(st.integers(1, 100)))
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in output if char != "\n")


@given(st.text(alphabet="a\r\n\u2028"))
def test_lines_and_positions_agree(text: str) -> None:
    source = Source("any", text)
    for offset in range(len(text)):
        line, column = source.position(offset)
        assert (source.line(line) + "\r\n")[column - 1] == text[offset] or text[offset] == "\n"
