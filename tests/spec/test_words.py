"""Words that people bring: each is answered by something that this language has, in the diagnostic that meets it."""

from __future__ import annotations

import pytest
from peft import LoraConfig

import peftc
from peftc.diagnostics.diagnostic import PeftcError
from peftc.language.tokens import VERBS
from peftc.language.words import BROUGHT, LORA_CONFIG, Word
from zoo import ZOO

UNSAID = {"auto_mapping", "peft_type", "peft_version", "runtime_config"}  # of LoraConfig, what no user writes


@pytest.mark.parametrize("word", BROUGHT.values(), ids=[*BROUGHT])
def test_what_a_word_is_here_is_no_mistake(word: Word) -> None:
    here = word.here
    if not here:
        assert word.why
    elif here.split()[0].upper() in VERBS:
        assert peftc.check(here) == []
    elif "(" in here:
        method = here if here.split("(")[0] not in ("prompt", "ptuning") else None
        assert peftc.check(f"apply {method} to linear" if method else f"apply {here}") == []
    else:
        assert peftc.check(f"train {here}") == []


def test_every_setting_of_lora_config_is_known() -> None:
    settings = {name for name in LoraConfig.__dataclass_fields__ if not name.startswith("_")}
    assert settings - UNSAID <= LORA_CONFIG.keys()


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("apply lora(r=8, lora_alpha=16) to attn.q", "this is 'alpha' here"),
        ("apply lora(lora_dropout=0.1) to attn.q", "this is 'dropout' here"),
        ("apply lora(init_lora_weights=gaussian) to attn.q", "this is 'init' here"),
        ('apply lora(target_modules="q_proj") to attn.q', "write: apply lora(r=8) to attn.q, attn.v"),
        ("apply lora(use_dora=true) to attn.q", "write: apply dora(r=8) to attn.q, attn.v"),
        ('apply lora(bias="all") to attn.q', "write: train bias"),
        ('apply lora(modules_to_save="score") to attn.q', "write: train head"),
        ('apply lora(task_type="CAUSAL_LM") to attn.q', "leave it out"),
        ("apply prompt(num_virtual_tokens=20)", "this is 'length' here"),
        ("apply pissa to attn.q", "write: lora(init=pissa)"),
        ("apply lora to all-linear", "write: linear except head"),
        ("apply lora(lora-alpha=16) to attn.q", "this is 'alpha' here"),
        ("apply prefix-tuning(length=20) to attn", "write: apply prefix(length=20) to attn"),
        ('apply lora(bias="none") to attn.q', "leave it out"),
        ("quantize 4bit", "write: quantize linear except head with nf4(double=true)"),
        ("quantize linear with 4bit", "write: quantize linear except head with nf4(double=true)"),
        ("lora(r=8) to attn.q", "write 'apply' before a method"),
        ("apply lora to attn.q attn.v", "write ',' between selectors"),
        ("apply lora to attn.q[:4]", "a slice is one of layers: in layers[a:b]"),
        ("apply lora to lm_head", "write: head"),
        ("apply lora to q_proj", "write: attn.q"),
        ("apply lora to c_fc", 'for modules of this name: "**.c_fc"'),
        ('target_modules = ["q_proj"]', "write: apply lora(r=8) to attn.q, attn.v"),
        ("lora_alpha: 16", "write: lora(alpha=16)"),
    ],
)
def test_a_word_of_others_is_answered(spec: str, label: str) -> None:
    assert label in [problem.label for problem in peftc.check(spec)]


@pytest.mark.parametrize(
    ("model", "name", "label"),
    [
        ("llama", "q_proj", 'write "**.q_proj" or attn.q'),
        ("llama", "mlp.down_proj", 'write "**.mlp.down_proj" or mlp.down'),
        ("gpt2", "c_attn", 'write "**.c_attn"'),
        ("gpt2", "**.q_proj", "write attn.q"),
        ("llama", "all-linear", "write linear except head"),
    ],
)
def test_the_end_of_a_name_is_no_name(model: str, name: str, label: str) -> None:
    """`target_modules` matches by the end of a name; here a name is whole, and the way to say the other is said."""
    with pytest.raises(PeftcError) as raised:
        peftc.plan(ZOO[model](), f'apply lora(r=2) to "{name}"')
    assert [problem.label for problem in raised.value.diagnostics] == [label]


@pytest.mark.parametrize(
    "spec",
    [
        "let all-linear = linear",
        "group all-linear, b = spindle(layers)",
        "task p-tuning {\n  apply lora to linear\n}",
        "apply prompt(init=p-tuning)",  # any other word is a text to begin with
    ],
)
def test_a_word_of_others_with_a_hyphen_is_no_name_here(spec: str) -> None:
    assert "bad-character" in [problem.code for problem in peftc.check(spec)]


def test_a_word_with_a_hyphen_keeps_nothing_back() -> None:
    problems = peftc.check("apply lora(rnak=16, use-dora=true) to all-linear")
    assert [problem.span.text for problem in problems if problem.span] == ["rnak", "use-dora", "all-linear"]


def test_syntax_and_names_are_said_together() -> None:
    """What cannot be read keeps nothing back that can; a name that may be defined in it is none to complain of."""
    spec = """\
let top = attn.q in layers[-4:
apply lora(rnak=8) to top
train nrom
group A, B = spindle(
apply lora to attn.v in A
use ""
"""
    codes = [problem.code for problem in peftc.check(spec)]
    assert codes == ["unclosed-bracket", "unknown-parameter", "unclosed-bracket", "use-without-file"]
    assert [problem.code for problem in peftc.check("apply lora to\ntrain nrom")] == [
        "missing-selector",
        "unknown-role",
    ]
