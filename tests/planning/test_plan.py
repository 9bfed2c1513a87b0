"""What a spec comes to on a model: bad ones with their words, the algebra of selectors, and the papers' counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import golden
import peftc
from paths import EXAMPLES, GOLDEN
from peftc.capture.capture import Captured, capture
from peftc.capture.inputs import example_inputs
from peftc.capture.references import load_model, parse_reference
from peftc.language.syntax import Apply
from peftc.planning.plan import Plan
from peftc.planning.planner import make_plan
from peftc.planning.select import Selection
from peftc.protocol.site import Linear, Site, Sites
from peftc.roles.find import find_sites
from peftc.spec.check import as_spec, intend
from zoo import ZOO

torch.set_num_threads(1)

BAD = GOLDEN / "spec" / "plan"


@cache
def captured(model: str) -> tuple[Captured, Sites]:
    """A zoo model captured once for all tests of a process: planning leaves the graph as it is."""
    built = ZOO[model]()
    found = capture(built, example_inputs(built))
    return found, find_sites(found)


def plan(model: str, spec: str | Path) -> Plan:
    return make_plan(*captured(model), intend(spec))


def together(model: str) -> pytest.MarkDecorator:
    """One worker of pytest-xdist gets all tests of a model, which it captures once."""
    return pytest.mark.xdist_group(f"plan-{model}")


# ---- Bad specifications --------------------------------------------------------------------------------------------


def model_of(path: Path) -> str:
    """The first line of each says which zoo model it is for."""
    return path.read_text().splitlines()[0].removeprefix("# model:").strip()


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=together(model_of(path)), id=path.stem) for path in sorted(BAD.glob("*.peft"))]
)
def test_bad_spec(path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(peftc.PeftcError) as raised:
        plan(model_of(path), Path(path.name))
    golden.check(path.with_suffix(".err"), f"{raised.value}\n", pytestconfig)


# ---- Selectors -----------------------------------------------------------------------------------------------------


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


# ---- The papers' counts --------------------------------------------------------------------------------------------

GPT3 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 12288, "n_layer": 96, "n_head": 96,
    "n_positions": 2048, "vocab_size": 50257,
}  # fmt: skip
T5_XXL = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 4096, "d_kv": 64, "num_heads": 64,
    "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "vocab_size": 32128,
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT3_COUNTS = [
    ("apply lora(r=1) to attn.q, attn.v", 4_718_592),  # Hu et al. 2021, table 4: 4.7M
    ("apply lora(r=8) to attn.q, attn.v", 37_748_736),  # 37.7M
    *((f"apply lora(r=8) to attn.{one}", 18_874_368) for one in "qkvo"),  # table 5: 18M each
    ("apply lora(r=4) to attn.q, attn.v", 18_874_368),
    ("apply lora(r=2) to attn.*", 18_874_368),
    ("apply adapter(size=1) to attn, mlp", 7_078_080),  # table 4: 7.1M
    ("apply adapter(size=8) to attn, mlp", 40_109_568),  # 40.1M
    ("apply prompt(length=264)", 3_244_032),  # 3.2M
]


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def planner(path: Path) -> Callable[[str | Path], Plan]:
    """`peftc.plan` of one config and many specs, with one capture."""
    model, _ = load_model(parse_reference(str(path)), meta=True)
    found = capture(model, example_inputs(model))
    sites = find_sites(found)
    return lambda spec: make_plan(found, sites, intend(spec))


@pytest.mark.slow
@pytest.mark.xdist_group("plan-gpt3")
def test_counts_of_gpt3(tmp_path: Path) -> None:
    counts = planner(written(tmp_path, GPT3))
    assert [(spec, counts(spec).trainable) for spec, _ in GPT3_COUNTS] == GPT3_COUNTS
    assert 174e9 < counts("train norm").total < 176e9


def test_counts_of_one_layer_of_gpt3(tmp_path: Path) -> None:
    """What one of its 96 layers contributes, through the public door and on the meta device."""
    path = written(tmp_path, {**GPT3, "n_layer": 1})
    plan = peftc.plan(path, "apply lora(r=1) to attn.q, attn.v\napply adapter(size=8) to attn, mlp")
    assert plan.trainable == (4_718_592 + 40_109_568) // 96
    assert plan.captured.module.get_parameter("transformer.wte.weight").is_meta


@pytest.mark.slow
@pytest.mark.xdist_group("plan-t5-xxl")
def test_counts_of_t5_xxl(tmp_path: Path) -> None:
    """Liu et al. 2022: IA3 on T0-11B keeps 4.2 MB a task, which is 1 081 344 numbers of four bytes."""
    counts = planner(written(tmp_path, T5_XXL))
    assert counts("apply ia3 to attn.k, attn.v, mlp.down").trainable == 1_081_344
    assert counts("apply ia3 to (attn.k, attn.v) in encoder").trainable == 24 * 2 * 4096
    assert counts("apply ia3 to cross.attn.k, cross.attn.v").trainable == 24 * 2 * 4096
    assert counts("apply ia3 to mlp.down in decoder").trainable == 24 * 10240
    assert 11.0e9 < counts("train norm").total < 11.2e9


COMPACTER = "apply adapter(size=24, weight=phm(n=4, rank=1, shared=true)) to {}\ntrain norm"


@pytest.mark.slow
@pytest.mark.xdist_group("plan-t5-base")
def test_counts_of_t5_base() -> None:
    """Karimi Mahabadi et al. 2021, table 1: Compacter trains 0.073 % of 222.9M, Compacter++ 0.047 %.

    An adapter has s and t of D and of U, 2 (24 + 768), and biases, 24 + 768: 2 376. All share four matrices of 4x4,
    and 62 norms of 768 learn, too.
    """
    counts = planner(EXAMPLES / "configs" / "t5-base.json")
    whole, feed_forward = counts(COMPACTER.format("self.attn, mlp")), counts(COMPACTER.format("mlp"))
    assert whole.trainable == 48 * 2376 + 4 * 4 * 4 + 62 * 768 == 161_728
    assert feed_forward.trainable == 24 * 2376 + 4 * 4 * 4 + 62 * 768 == 104_704
    base = sum(whole.sites.parameters.values())
    assert f"{base / 1e6:.1f}M" == "222.9M"
    assert f"{whole.trainable / base:.3%}" == "0.073%"
    assert f"{feed_forward.trainable / base:.3%}" == "0.047%"
    recipes = EXAMPLES / "recipes"
    assert counts(recipes / "compacter.peft").trainable == 161_728
    assert counts(recipes / "compacter_pp.peft").trainable == 104_704


@pytest.mark.slow
def test_counts_of_one_layer_of_t5_base(tmp_path: Path) -> None:
    """Of one layer a stack: two self-attentions, two feed-forwards, seven norms, and the matrices that all share."""
    config = json.loads((EXAMPLES / "configs" / "t5-base.json").read_text())
    path = written(tmp_path, {**config, "num_layers": 1, "num_decoder_layers": 1})
    assert peftc.plan(path, COMPACTER.format("self.attn, mlp")).trainable == 4 * 2376 + 64 + 7 * 768


def test_counts_of_one_projection() -> None:
    """The lecture's example: 4 608 numbers instead of 32 768, 86 % fewer."""
    model = nn.Sequential(nn.Linear(512, 64, bias=False), nn.ReLU(), nn.Linear(64, 2))
    found = peftc.plan(model, 'apply lora(r=8) to "0"', example=torch.zeros(2, 512))
    assert found.trainable == 4_608
    assert found.sites.parameters["0.weight"] == 32_768
    assert found.to_json()["statements"] == [
        {"statement": 'apply lora(r=8) to "0"', "sites": 1, "parameters": 4_608}
    ]  # fmt: skip


def test_a_bare_layer_is_a_model_too() -> None:
    found = peftc.plan(nn.Linear(512, 64), "apply lora(r=8) to linear", example=torch.zeros(2, 512))
    assert found.trainable == 4_608
