"""Selectors: what each means on a model, and that they are sets and keep the laws of their algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftc
from peftc.language import Apply
from peftc.planning.select import Selection
from peftc.protocol.method import Method
from peftc.protocol.site import Linear, Site
from peftc.spec.check import as_spec
from planned import captured, plan, together
from variants import DEFAULTS, built

torch.set_num_threads(1)


def select(model: str, selector: str) -> list[Site]:
    """What a selector means, through the same door as `train` and `apply`."""
    (statement,) = as_spec(f"apply ia3 to {selector}").statements
    assert isinstance(statement, Apply)
    assert statement.target is not None
    selection = Selection(captured(model)[1])
    found = selection(statement.target)
    if selection.problems:
        raise peftc.PeftcError(*selection.problems)
    return found


def names(model: str, selector: str) -> list[str]:
    return [site.name for site in select(model, selector)]


GPT2_REST = ("attn.c_attn[k]", "attn.c_attn[v]", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GPT2_LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")


def in_both(prefix: str, parts: Iterable[str], *more: str) -> set[str]:
    return {prefix.format(layer) + part for layer in (0, 1) for part in parts} | set(more)


@pytest.mark.parametrize(
    ("model", "selector", "expected"),
    [
        pytest.param(model, selector, expected, marks=together(model), id=f"{model}: {selector}")
        for model, selector, expected in [
            # parts of a fused weight
            ("gpt2", "linear", in_both("transformer.h.{}.", GPT2_LINEAR, "lm_head")),
            ("gpt2", "linear except attn.q", in_both("transformer.h.{}.", GPT2_REST, "lm_head")),
            ("gpt2", "linear except attn.*", in_both("transformer.h.{}.mlp.", ["c_fc", "c_proj"], "lm_head")),
            ("gpt2", "linear except (attn.q, attn.v) except head & linear", in_both(
                "transformer.h.{}.", ["attn.c_attn[k]", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])),
            ("gpt2", "linear & attn.q", in_both("transformer.h.{}.attn.c_attn", ["[q]"])),
            ("gpt2", "attn.q & linear", in_both("transformer.h.{}.attn.c_attn", ["[q]"])),
            ("gpt2", "attn.q, linear", in_both("transformer.h.{}.", GPT2_LINEAR, "lm_head")),
            ("gpt2", "attn.q, attn.q, attn.*", in_both(
                "transformer.h.{}.attn.", ["c_attn[q]", "c_attn[k]", "c_attn[v]", "c_proj"])),
            ("gpt2", '"transformer.h.*.attn.c_attn" except attn.k', in_both(
                "transformer.h.{}.attn.c_attn", ["[q]", "[v]"])),
            # a role that a model lacks may be left out of what it has
            ("gpt2", "linear except (mlp.gate, head, expert)", in_both("transformer.h.{}.", GPT2_LINEAR)),
            # layers, each stack counted for itself
            ("llama", "attn.q in layers[-1:]", {"model.layers.1.self_attn.q_proj"}),
            ("llama", "attn.q in layers[0]", {"model.layers.0.self_attn.q_proj"}),
            ("llama", "attn.q in layers[-2]", {"model.layers.0.self_attn.q_proj"}),
            ("llama", "attn.q in layers[::-1]", in_both("model.layers.{}.self_attn.q_proj", [""])),
            ("llama", "attn.q in layers[1::2]", {"model.layers.1.self_attn.q_proj"}),
            ("llama", "block in layers[-5:1]", {"model.layers.0"}),
            ("llama", "linear in layers[:] except attn.*", in_both("model.layers.{}.mlp.", LLAMA_MLP)),
            ("t5", "attn.q in layers[-1:]", {
                "encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q",
                "decoder.block.1.layer.1.EncDecAttention.q"}),
            ("t5", "attn.q in layers[::2] in encoder", {"encoder.block.0.layer.0.SelfAttention.q"}),
            ("t5", "self.attn.q in decoder", in_both("decoder.block.{}.layer.0.SelfAttention.q", [""])),
            ("t5", "cross.attn.v", in_both("decoder.block.{}.layer.1.EncDecAttention.v", [""])),
            ("t5", "cross.attn", in_both("decoder.block.{}.layer.1.EncDecAttention", [""])),
            # names
            ("llama", '"model.layers.*.mlp.{up,down}_proj"', in_both("model.layers.{}.mlp.", LLAMA_MLP[1:])),
            ("llama", '"**.q_proj"', in_both("model.layers.{}.self_attn.q_proj", [""])),
            ("llama", '"*.q_proj", "lm_head"', None),
            ("llama", r"/layers\.1\.mlp\..*_proj$/", {f"model.layers.1.mlp.{part}" for part in LLAMA_MLP}),
            ("llama", "/up_proj/", in_both("model.layers.{}.mlp.up_proj", [""])),
            # numbers
            ("llama", "linear where in_features > 48", in_both("model.layers.{}.mlp.down_proj", [""])),
            ("llama", "linear where in_features >= 48 & attn.*", in_both("model.layers.{}.self_attn.o_proj", [""])),
            ("llama", "linear where out_features == 97", {"lm_head"}),
            ("llama", "(norm, linear) where out_features != 97 where in_features == 80", in_both(
                "model.layers.{}.mlp.down_proj", [""])),
            ("gpt2", "attn.* where out_features < 96", in_both(
                "transformer.h.{}.attn.", ["c_attn[q]", "c_attn[k]", "c_attn[v]", "c_proj"])),
        ]
    ],
)  # fmt: skip
def test_selector(model: str, selector: str, expected: set[str] | None) -> None:
    if expected is None:
        with pytest.raises(peftc.PeftcError, match="matches nothing"):
            select(model, selector)
        return
    found = names(model, selector)
    assert sorted(found) == sorted(expected)
    order = [site.name for site in captured(model)[1]]
    assert found == sorted(found, key=order.index)


@together("gpt2")
def test_a_misspelt_name_among_what_is_removed() -> None:
    """A role may be missing from a model; a name that nothing has is a mistake, alone or in a list."""
    with pytest.raises(peftc.PeftcError, match="nearest: lm_head"):
        select("gpt2", 'linear except (attn.q, "lm_haed")')


Element = tuple[str, int, int | None]


def denotation(found: Iterable[Site]) -> frozenset[Element]:
    """A set of sites as what it covers: single rows of weights, and other sites as they are; each with its layer."""
    elements: set[Element] = set()
    for site in found:
        if isinstance(site, Linear):
            elements |= {(site.weight, row, site.layer) for row in site.rows or range(site.n_out)}
        else:
            elements.add((f"{site.kind} {site.name}", 0, site.layer))
    return frozenset(elements)


ATOMS = {
    "gpt2": (
        "attn.q", "attn.k", "attn.v", "attn.o", "attn.*", "mlp.*", "mlp.down", "linear", "head", "norm", "bias", "attn",
        "mlp", "mlp.gate", '"transformer.h.*.attn.c_attn"', '"transformer.h.0.**"', "/c_proj$/", '"lm_haed"',
    ),
    "phi3": ("attn.q", "attn.*", "mlp.up", "mlp.gate", "mlp.*", "linear", '"**.gate_up_proj"', "norm", "block"),
}  # fmt: skip


class Empty(Exception):
    """The selector, or a part of it that may not be empty, matches nothing."""


Meaning = Callable[[bool], frozenset[Element]]
Expression = tuple[str, Meaning]


def atom(model: str, text: str) -> Expression:
    """A role may be missing from what is removed; a name may not."""
    try:
        found = denotation(select(model, text))
    except peftc.PeftcError:
        found = frozenset()
    return text, strictly(lambda _may_be_empty: found, excused=text[0].isalpha())


def strictly(meaning: Meaning, *, excused: bool = False) -> Meaning:
    """An empty result is an error, unless a role, or a union of such, stands where it may be missing."""

    def checked(may_be_empty: bool) -> frozenset[Element]:
        found = meaning(may_be_empty)
        if not found and not (may_be_empty and excused):
            raise Empty
        return found

    return checked


def union(left: Expression, right: Expression) -> Expression:
    return f"({left[0]}), ({right[0]})", strictly(lambda lenient: left[1](lenient) | right[1](lenient), excused=True)


def both(left: Expression, right: Expression) -> Expression:
    return f"({left[0]}) & ({right[0]})", strictly(lambda lenient: left[1](lenient) & right[1](lenient))


def less(left: Expression, removed: Expression) -> Expression:
    """What is removed may be absent: `linear except (head, expert)` is right for every model."""
    return f"({left[0]}) except ({removed[0]})", strictly(lambda lenient: left[1](lenient) - removed[1](True))


def layers(base: Expression, start: int | None, stop: int | None, step: int) -> Expression:
    chosen = range(2)[start:stop:step]
    text = f"({base[0]}) in layers[{'' if start is None else start}:{'' if stop is None else stop}:{step}]"
    return text, strictly(lambda lenient: frozenset(item for item in base[1](lenient) if item[2] in chosen))


def expressions(model: str) -> st.SearchStrategy[Expression]:
    bound = st.none() | st.integers(-3, 3)
    return st.recursive(
        st.sampled_from(ATOMS[model]).map(lambda text: atom(model, text)),
        lambda inner: st.one_of(
            *(st.builds(operation, inner, inner) for operation in (union, both, less)),
            st.builds(layers, inner, bound, bound, st.sampled_from([-2, -1, 1, 2])),
        ),
        max_leaves=5,
    )


on_atoms = pytest.mark.parametrize(
    "model",
    [pytest.param("gpt2", marks=together("gpt2")), pytest.param("phi3", marks=[together("phi3"), pytest.mark.slow])],
)


@on_atoms
@given(data=st.data())
@settings(max_examples=80)
def test_selectors_are_sets(model: str, data: st.DataObject) -> None:
    """A selector means the set of rows that its parts mean, combined; it fails exactly where a part is empty."""
    text, meaning = data.draw(expressions(model), label="selector")
    try:
        expected = meaning(False)
    except Empty:
        with pytest.raises(peftc.PeftcError) as raised:
            select(model, text)
        assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"no-match"}
        return
    found = select(model, text)
    assert denotation(found) == expected
    assert len({site.name for site in found}) == len(found)
    assert sum(len(denotation([site])) for site in found) == len(expected), "a row stands in two sites"


@on_atoms
@given(data=st.data())
@settings(max_examples=30)
def test_laws_of_the_algebra(model: str, data: st.DataObject) -> None:
    atoms = st.sampled_from([text for text in ATOMS[model] if text not in ("mlp.gate", '"lm_haed"')])
    a, b = data.draw(atoms, label="a"), data.draw(atoms, label="b")
    assert names(model, f"{a}, {a}") == names(model, a) == names(model, f"{a} & {a}")
    assert names(model, f"{a}, {b}") == names(model, f"{b}, {a}")
    with pytest.raises(peftc.PeftcError, match="matches nothing"):
        select(model, f"{a} except {a}")
    try:
        shared = select(model, f"{a} & {b}")
    except peftc.PeftcError:
        assert denotation(select(model, f"{a} except {b}")) == denotation(select(model, a))
        return
    assert denotation(shared) <= denotation(select(model, a))
    assert [site.name for site in shared] == names(model, f"{b} & {a}")


@pytest.mark.parametrize("variant", [v for v in DEFAULTS if type(built(v)).shared is not Method.shared])
def test_a_method_on_nothing(variant: str) -> None:
    """What a method has in common for all its sites is not asked for where there are none."""
    with pytest.raises(peftc.PeftcError) as raised:
        plan("gpt2", f"apply {variant} to attn & mlp")
    assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"no-match"}
