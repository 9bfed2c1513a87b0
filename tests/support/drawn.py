"""The language in tests: nodes without places, and specifications that hypothesis draws."""

from typing import Any

from hypothesis import strategies as st

from peftc import language as syntax
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.source import Source, Span
from peftc.language import (
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
    Spec,
    String,
    Task,
    Train,
    Union,
    Use,
    Where,
    parse,
    unparse,
)

NOWHERE: Any = {"span": Span(Source("", ""), 0, 0)}


def read(text: str) -> Spec:
    return parse(Source("spec.peft", text))


def selector(text: str) -> Selector:
    (statement,) = read(f"train {text}").statements
    assert isinstance(statement, Train)
    return statement.target


def role(text: str) -> Role:
    return Role(tuple(text.split(".")), **NOWHERE)


def name(text: str) -> Name:
    return Name(text, **NOWHERE)


def number(value: float, unit: str | None = None) -> Number:
    return Number(value, unit, **NOWHERE)


def call(method: str, *args: Any, **named: Any) -> Call:
    positional = [Arg(None, value, **NOWHERE) for value in args]
    keyword = [Arg(name(key), value, **NOWHERE) for key, value in named.items()]
    return Call(name(method), (*positional, *keyword), **NOWHERE)


WORDS = [
    *(word.lower() for word in syntax.WORDS),
    "lora",
    "attn.q",
    "layers",
    "r",
    "x.*",
    '"a.*"',
    "/a+/",
    "8",
]
SIGNS = [*"()[]{},=:&#\n*.\"/'\\-%", "<=", "==", "24 GiB", "\r\n", "\t", "\ufeff", "é", "\0"]


def only_diagnostics(text: str) -> None:
    """Any text is a specification, which can be written and read back, or has diagnostics with places."""
    try:
        spec = read(text)
    except PeftcError as error:
        diagnostics = error.diagnostics
    else:
        assert read(unparse(spec)) == spec
        return
    assert all(diagnostic.span and str(diagnostic) and diagnostic.to_json() for diagnostic in diagnostics)


identifiers = st.from_regex("[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(
    lambda word: word.upper() not in syntax.WORDS or word != word.lower()
)
names = st.builds(name, identifiers)
integers = st.integers(-(2**62), 2**62)
numbers = st.builds(
    number,
    st.one_of(integers, st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from([None, *syntax.UNITS]),
)
texts = st.text(st.characters(exclude_categories=["Cs"]))
strings = st.builds(String, texts, span=st.just(NOWHERE["span"]))
bools = st.builds(Bool, st.booleans(), span=st.just(NOWHERE["span"]))


def calls(values: st.SearchStrategy[syntax.Value]) -> st.SearchStrategy[Call]:
    keys = st.one_of(identifiers, st.sampled_from([word.lower() for word in syntax.WORDS[:-2]]))
    positional = st.lists(values, max_size=2)
    keyword = st.dictionaries(keys, values, max_size=3)
    return st.builds(lambda method, args, named: call(method, *args, **named), identifiers, positional, keyword)


values: st.SearchStrategy[syntax.Value] = st.recursive(
    st.one_of(names, numbers, bools, strings),
    lambda inner: st.one_of(
        calls(inner), st.lists(inner, max_size=3).map(lambda items: ListValue(tuple(items), **NOWHERE))
    ),
    max_leaves=6,
)
roles = st.builds(
    lambda words, star: Role((*words, "*") if star else tuple(words), **NOWHERE),
    st.lists(identifiers, min_size=1, max_size=3),
    st.booleans(),
)
segments = st.sampled_from(["a", "**", "*", "x_*", "{q,k}_proj", "0", "{b.c,d}", "é"])
globs = st.lists(segments, min_size=1, max_size=4).map(lambda parts: Glob(".".join(parts), **NOWHERE))
regexes = st.sampled_from([r"a.*", r"\/", r"[^.]+\.q", r"a\\", "é{2}"]).map(lambda text: Regex(text, **NOWHERE))
bounds = st.one_of(st.none(), integers)


def larger(inner: st.SearchStrategy[Selector]) -> st.SearchStrategy[Selector]:
    span = st.just(NOWHERE["span"])
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    steps = bounds.filter(lambda step: step != 0)
    operators = st.sampled_from(syntax.FILTER_OPERATORS)
    return st.one_of(
        st.builds(Union, several, span=span),
        st.builds(Intersect, several, span=span),
        st.builds(Except, inner, inner, span=span),
        st.builds(InLayers, inner, bounds, bounds, steps, span=span),
        st.builds(InStack, inner, names.filter(lambda word: word.text != "layers"), span=span),
        st.builds(Where, inner, names, operators, values, span=span),
    )


selectors: st.SearchStrategy[Selector] = st.recursive(st.one_of(roles, globs, regexes), larger, max_leaves=8)
SPAN = st.just(NOWHERE["span"])
methods = calls(values)
tools = st.lists(st.one_of(methods, st.just(Call(Name("checkpoint", **NOWHERE), **NOWHERE))), max_size=3).map(tuple)
simple = st.one_of(
    st.builds(Apply, methods, st.one_of(st.none(), selectors), span=SPAN),
    st.builds(Quantize, selectors, methods, span=SPAN),
    st.builds(Train, selectors, span=SPAN),
    st.builds(Freeze, selectors, span=SPAN),
    st.builds(Checkpoint, selectors, span=SPAN),
    st.builds(Let, names, st.one_of(selectors, methods), span=SPAN),
    st.builds(Group, st.lists(names, min_size=1, max_size=3).map(tuple), methods, span=SPAN),
    st.builds(Require, methods, st.sampled_from(syntax.BUDGET_OPERATORS), numbers, span=SPAN),
    st.builds(Fit, methods, st.sampled_from(syntax.FIT_OPERATORS), numbers, tools, span=SPAN),
    st.builds(Use, strings, span=SPAN),
)
tasks = st.builds(Task, names, st.lists(simple, max_size=3).map(tuple), span=SPAN)
statements: st.SearchStrategy[syntax.Statement] = st.one_of(simple, tasks)
