"""The language: what parses to what, what is refused with which words, and that nothing else ever happens."""

import importlib.resources
import json
import logging
from pathlib import Path

import lark
import pytest

import golden
from drawn import NOWHERE, call, name, number, read, role, selector
from paths import GOLDEN, ROOT
from peftc import language as syntax
from peftc.diagnostics.diagnostic import MOST_MISTAKES, PeftcError
from peftc.language import (
    Apply,
    Bool,
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
    Quantize,
    Regex,
    Require,
    Selector,
    String,
    Task,
    Train,
    Union,
    Use,
    Where,
    parse_file,
    tokens,
)

BAD = GOLDEN / "spec" / "syntax"


def codes(text: str) -> list[str]:
    with pytest.raises(PeftcError) as raised:
        read(text)
    return [diagnostic.code for diagnostic in raised.value.diagnostics]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.peft")), ids=lambda path: path.stem)
def test_the_tables_beside_the_grammar_are_its_own(path: Path, pytestconfig: pytest.Config) -> None:
    """Their text differs from one process to the next: what is compared is what they were made of, and what they do."""
    file = ROOT / "grammar" / tokens.TABLES
    if pytestconfig.getoption("update_golden"):
        file.write_text(tokens.tables())
        tokens.grammar.cache_clear()
    if (found := json.loads(file.read_text())["of"])[0] != lark.__version__:
        pytest.skip(f"made with lark {found[0]}; with {lark.__version__} the parser is built anew")
    assert found == json.loads(tokens.tables())["of"], "pytest --update-golden writes grammar/tables.json anew"
    assert tokens.grammar().source_path == "<deserialized>"
    assert tokens.grammar().parse(path.read_text()) == tokens.built().parse(path.read_text())


# ---- Bad specifications ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(BAD.glob("*.peft")), ids=lambda path: path.stem)
def test_bad_spec(path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(PeftcError) as raised:
        parse_file(path.name)
    text = str(raised.value).replace(str(path.parent), "<here>")
    golden.check(path.with_suffix(".err"), f"{text}\n", pytestconfig)


def test_reading_stops_after_many_mistakes() -> None:
    found = codes("oops\n" * 10_000)
    assert found == ["unknown-statement"] * MOST_MISTAKES + ["too-many-mistakes"]


@pytest.mark.parametrize("opening", ["(", "[", "{", "gated(", "task a {\n", "apply f(x=[", "train a in ("])
def test_depth_is_a_diagnostic(opening: str) -> None:
    assert codes(f"apply f({opening * 20_000}")
    assert codes(f"train {opening * 20_000}")
    assert codes(opening * 20_000)


def test_the_grammar_has_no_conflicts(caplog: pytest.LogCaptureFixture) -> None:
    grammar = importlib.resources.files("peftc.grammar").joinpath("peftc.lark").read_text(encoding="utf-8")
    with caplog.at_level(logging.DEBUG, logger=lark.logger.name):
        lark.Lark(grammar, parser="lalr", lexer="basic", start="spec", maybe_placeholders=True, debug=True)
    assert "conflict" not in caplog.text.lower()


# ---- Good ones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n", "# only a comment", "\ufeff", " \t\r\n\r# a\n", "\n\n#\n\n"])
def test_empty(text: str) -> None:
    assert read(text).statements == ()


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("apply ia3 to mlp.down", Apply(call("ia3"), role("mlp.down"), **NOWHERE)),
        ("apply prompt(length=20)", Apply(call("prompt", length=number(20)), None, **NOWHERE)),
        ("quantize linear with nf4", Quantize(role("linear"), call("nf4"), **NOWHERE)),
        ("train bias", Train(role("bias"), **NOWHERE)),
        ("freeze embed", Freeze(role("embed"), **NOWHERE)),
        ("checkpoint block", Checkpoint(role("block"), **NOWHERE)),
        ("let top = block", Let(name("top"), role("block"), **NOWHERE)),
        ("let small = lora(r=2)", Let(name("small"), call("lora", r=number(2)), **NOWHERE)),
        ("let small = lora()", Let(name("small"), call("lora"), **NOWHERE)),
        ("task a {}", Task(name("a"), (), **NOWHERE)),
        ("task a { train norm }", Task(name("a"), (Train(role("norm"), **NOWHERE),), **NOWHERE)),
        ("task a {\n# b\n\ntrain norm\n}", Task(name("a"), (Train(role("norm"), **NOWHERE),), **NOWHERE)),
        (
            "group G1, G2 = spindle(layers)",
            Group((name("G1"), name("G2")), call("spindle", name("layers")), **NOWHERE),
        ),
        ("require trainable <= 1%", Require(call("trainable"), "<=", number(1, "%"), **NOWHERE)),
        (
            "require memory(batch=4) < 24 GiB",
            Require(call("memory", batch=number(4)), "<", number(24, "GiB"), **NOWHERE),
        ),
        (
            "fit memory(batch=4) <= 24 GiB",
            Fit(call("memory", batch=number(4)), "<=", number(24, "GiB"), (), **NOWHERE),
        ),
        (
            "fit memory < 1 GB using checkpoint, nf4(double=true)",
            Fit(
                call("memory"),
                "<",
                number(1, "GB"),
                (call("checkpoint"), call("nf4", double=Bool(True, **NOWHERE))),
                **NOWHERE,
            ),
        ),
        ('use "a.peft"', Use(String("a.peft", **NOWHERE), **NOWHERE)),
        (
            "apply mixture(adapter(size=48), n=4) to mlp",
            Apply(call("mixture", call("adapter", size=number(48)), n=number(4)), role("mlp"), **NOWHERE),
        ),
    ],
)
def test_statement(text: str, statement: syntax.Statement) -> None:
    assert read(text).statements == (statement,)
    assert read(f"{text}  # comment\r\n").statements == (statement,)


A, B, C = role("a"), role("b"), role("c")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("attn.*", role("attn.*")),
        ("self.attn.q", role("self.attn.q")),
        ('"model.*.{up,down}_proj"', Glob("model.*.{up,down}_proj", **NOWHERE)),
        (r"/layers\.\d+\/x/", Regex(r"layers\.\d+\/x", **NOWHERE)),
        ("a, b, c", Union((A, B, C), **NOWHERE)),
        ("(a, b), c", Union((Union((A, B), **NOWHERE), C), **NOWHERE)),
        ("(\na,\nb,\n)", Union((A, B), **NOWHERE)),
        ("a & b & c", Intersect((A, B, C), **NOWHERE)),
        ("a except b except c", Except(Except(A, B, **NOWHERE), C, **NOWHERE)),
        ("a except b, c", Union((Except(A, B, **NOWHERE), C), **NOWHERE)),
        ("a except b & c", Except(A, Intersect((B, C), **NOWHERE), **NOWHERE)),
        ("a & b in encoder", Intersect((A, InStack(B, name("encoder"), **NOWHERE)), **NOWHERE)),
        ("a, b in layers[-4:]", Union((A, InLayers(B, -4, **NOWHERE)), **NOWHERE)),
        ("(a, b) in layers[-4:]", InLayers(Union((A, B), **NOWHERE), -4, **NOWHERE)),
        ("a in layers[:]", InLayers(A, **NOWHERE)),
        ("a in layers[1:2:3]", InLayers(A, 1, 2, 3, **NOWHERE)),
        ("a in layers[::-1]", InLayers(A, None, None, -1, **NOWHERE)),
        ("a in layers[3]", InLayers(A, 3, 4, **NOWHERE)),
        ("a in layers[-1]", InLayers(A, -1, None, **NOWHERE)),
        ("a where in_features >= 1_024", Where(A, name("in_features"), ">=", number(1024), **NOWHERE)),
        (
            "a in G1 where n == 1 & b",
            Intersect(
                (Where(InStack(A, name("G1"), **NOWHERE), name("n"), "==", number(1), **NOWHERE), B),
                **NOWHERE,
            ),
        ),
    ],
)
def test_selector(text: str, wanted: Selector) -> None:
    assert selector(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8", number(8)),
        ("-4", number(-4)),
        ("1_000", number(1000)),
        (".5", number(0.5)),
        ("5.", number(5.0)),
        ("1e-5", number(1e-5)),
        ("-1.5E+3", number(-1500.0)),
        ("1%", number(1, "%")),
        ("7B", number(7, "B")),
        ("1.5 TiB", number(1.5, "TiB")),
        ("true", Bool(True, **NOWHERE)),
        ("false", Bool(False, **NOWHERE)),
        ("pissa", name("pissa")),
        (r'"a\"\\\n\u00e9"', String('a"\\\né', **NOWHERE)),
        ("[]", ListValue((), **NOWHERE)),
        ("[1, [x],]", ListValue((number(1), ListValue((name("x"),), **NOWHERE)), **NOWHERE)),
        ("phm(n=4, shared=true,)", call("phm", n=number(4), shared=Bool(True, **NOWHERE))),
    ],
)
def test_value(text: str, wanted: syntax.Value) -> None:
    assert read(f"apply f(x={text})").statements == (Apply(call("f", x=wanted), None, **NOWHERE),)


def test_scaled_numbers() -> None:
    assert number(1, "%").scaled == 0.01
    assert number(24, "GiB").scaled == 24 * 2**30
    assert number(7, "B").scaled == 7_000_000_000
    assert number(0.5, "K").scaled == 500
    assert number(3).scaled == 3


@pytest.mark.parametrize("word", ["to", "with", "in", "where", "except", "group", "task", "use", "train"])
def test_words_of_the_language_may_name_parameters(word: str) -> None:
    text = f"apply f(\n{word}=1\n) to attn"
    assert read(text).statements == (Apply(call("f", **{word: number(1)}), role("attn"), **NOWHERE),)


def test_words_that_start_like_words_of_the_language() -> None:
    assert selector("tomato.input, where_to") == Union((role("tomato.input"), role("where_to")), **NOWHERE)


def test_spans() -> None:
    text = "train norm\napply lora(r=8) to (attn.q in layers[1:]) & b\n"
    spec = read(text)
    statement = spec.statements[1]
    assert isinstance(statement, Apply)
    target = statement.target
    assert isinstance(target, Intersect)
    assert spec.span.text == text
    assert statement.span.text == text.splitlines()[1]
    assert statement.method.span.text == "lora(r=8)"
    assert statement.method.args[0].span.text == "r=8"
    assert target.span.text == "(attn.q in layers[1:]) & b"
    assert target.items[0].span.text == "attn.q in layers[1:]"
    assert str(target.items[1].span) == "spec.peft:2:45"


# ---- Name patterns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("a.*.c", ["a.b.c", "a.0.c"], ["a.c", "a.b.b.c", "a..c", "axbxc"]),
        ("a.x*y", ["a.xy", "a.xzy"], ["a.x.y"]),
        ("a.**.c", ["a.c", "a.b.c", "a.b.b.c"], ["ac", "a.bc", "a.b", "xa.c"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b"]),
        ("**.c", ["c", "b.c", "a.b.c"], ["bc", "c.d"]),
        ("**", ["", "a", "a.b"], []),
        ("**.**.c.**", ["c", "a.c", "c.a", "a.a.c.a.a"], ["ac"]),
        ("{q,k}_proj", ["q_proj", "k_proj"], ["v_proj", "q", "q,k_proj"]),
        ("a.{b.c,d}.e", ["a.b.c.e", "a.d.e"], ["a.b.e"]),
        ("a+b-c.0", ["a+b-c.0"], ["aab-c.0"]),
    ],
)
def test_name_pattern(pattern: str, matching: list[str], other: list[str]) -> None:
    selected = selector(f'"{pattern}"')
    assert isinstance(selected, Glob)
    assert [path for path in matching + other if selected.regex().fullmatch(path)] == matching


# ---- Files -------------------------------------------------------------------------------------------------


def test_use(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "main.peft").write_text('use "sub/one.peft"\ntask a {\n  use "two.peft"\n}\n')
    (tmp_path / "sub" / "one.peft").write_text('use "../two.peft"\n')
    (tmp_path / "two.peft").write_bytes(b"\xef\xbb\xbftrain norm\r\n")
    one, task = parse_file(tmp_path / "main.peft").statements
    assert isinstance(one, Use)
    assert one.spec
    assert isinstance(task, Task)
    for (inner,) in (one.spec.statements, task.body):
        assert isinstance(inner, Use)
        assert inner.spec
        assert inner.spec.statements == (Train(role("norm"), **NOWHERE),)
        assert Path(inner.spec.source.name).samefile(tmp_path / "two.peft")


def test_use_from_an_allowed_folder(tmp_path: Path) -> None:
    main, shared = tmp_path / "main", tmp_path / "shared"
    main.mkdir()
    shared.mkdir()
    (shared / "a.peft").write_text('use "b.peft"')
    (shared / "b.peft").write_text("train norm")
    (main / "x.peft").write_text('use "../shared/a.peft"')
    (main / "y.peft").write_text('use "link.peft"')
    (main / "link.peft").symlink_to(shared / "b.peft")
    (main / "loop.peft").symlink_to(main / "loop.peft")
    (main / "z.peft").write_text('use "loop.peft"')
    for file, code in (("x", "use-outside"), ("y", "use-outside"), ("z", "unreadable-file")):
        with pytest.raises(PeftcError) as raised:
            parse_file(main / f"{file}.peft")
        assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]
    for file in "xy":
        assert parse_file(main / f"{file}.peft", roots=[shared])


def test_limits_of_files(tmp_path: Path) -> None:
    (tmp_path / "large.peft").write_bytes(b"#" * (syntax.LARGEST_FILE + 1))
    for index in range(30):
        (tmp_path / f"{index}.peft").write_text(f'use "{index + 1}.peft"\nuse "{index + 1}.peft"\n')
    (tmp_path / "many.peft").write_text('use "30.peft"\n' * 200)
    (tmp_path / "30.peft").write_text("train norm")
    for file, reason in (
        ("large", "larger than 1 MiB"),
        ("0", "are used"),
        ("many", "are used"),
        ("?", "no such"),
    ):
        with pytest.raises(PeftcError, match=reason):
            parse_file(tmp_path / f"{file}.peft")
