"""`peftc explain`: what a line matches and leaves out, and why a place is what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc import api
from peftc.cli import main
from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.explain import Explainer, told
from peftc.show.screen import Hung, rendered
from peftc.spec.check import intend
from zoo import ZOO

SPEC = "apply lora(r=2) to attn.q, mlp.* in layers[1:] except mlp.down\ntrain norm\n"


def explainer(model: str, spec: str) -> Explainer:
    return Explainer(api.sites(ZOO[model]()), intend(spec))


def test_a_line_says_what_it_matches_and_what_its_filters_leave_out() -> None:
    (found,) = explainer("llama", SPEC).line(1)
    assert found.places == (
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
    )  # fmt: skip
    layers, exception = found.left_out.items()
    assert layers[0] == "mlp.* in layers[1:]"
    assert set(layers[1]) == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert exception == ("mlp.* in layers[1:] except mlp.down", ("model.layers.1.mlp.down_proj",))
    assert len(explainer("llama", SPEC).line(None)) == 2


@pytest.mark.parametrize(
    ("model", "name", "role", "words"),
    [
        ("llama", "0.self_attn.q_proj", "attn.q", "the queries of the attention in model.layers.0.self_attn"),
        ("llama", "0.self_attn.v_proj", "attn.v", "the values of the attention in model.layers.0.self_attn"),
        ("llama", "0.self_attn.o_proj", "attn.o", "the first linear layer behind the attention"),
        ("llama", "0.mlp.down_proj", "mlp.down", "its output is added to the residual stream"),
        ("gpt2", "h.1.attn.c_proj", "attn.o", "the first linear layer behind the attention"),
    ],
)
def test_a_place_says_by_what_evidence_it_is_what_it_is(model: str, name: str, role: str, words: str) -> None:
    (found,) = explainer(model, SPEC).name(name)
    assert role in found.roles
    assert any(words in line for line in found.evidence), found.evidence


def test_a_fit_says_what_it_chose() -> None:
    plan = peftc.plan(ZOO["llama"](), "apply lora(r=auto) to attn.q\nfit trainable <= 2%\nfit memory <= 1.5 MB")
    why = Explainer(plan.sites, plan.intentions, plan.fitted)
    ranks, memory, block = why.line(2) + why.line(3)
    assert ranks.note == plan.fitted[0].told
    assert memory.statement == "fit memory <= 1.5 MB"
    assert "blocks computed again" in memory.note
    assert (block.statement, block.file) == ("checkpoint block in layers[:1]", "chosen for line 3 of <spec>")
    assert block.places == ("model.layers.0",)
    assert len(why.line(None)) == 4
    assert "  " + memory.note in list(told([memory]))


def test_the_lines_that_reach_a_place() -> None:
    why = explainer("llama", SPEC)
    (query,) = why.name("model.layers.0.self_attn.q_proj")
    assert query.statements == ("<spec>:1: apply lora(r=2) to attn.q, mlp.* in layers[1:] except mlp.down",)
    (down,) = why.name("model.layers.1.mlp.down_proj")
    assert down.statements == ()
    assert "  no statement reaches it" in [*told([down])]
    fused = explainer("gpt2", 'apply lora(r=2) to "**.0.attn.c_attn"')
    (key,) = (site.name for site in fused.sites if "attn.k" in site.roles and ".0." in site.name)
    (part,) = fused.name(key)
    assert len(part.statements) == 1, "a part of a weight is reached by what reaches the whole"


@pytest.mark.parametrize("asked", [3, "q_porj"])
def test_what_is_nowhere_is_said(asked: Any) -> None:
    why = explainer("llama", SPEC)
    with pytest.raises(PeftcError, match="nothing-to-explain"):
        _ = why.line(asked) if isinstance(asked, int) else why.name(asked)


def test_a_misspelt_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(PeftcError, match=r"did you mean 'self_attn\.q_proj'"):
        explainer("llama", SPEC).name("self_attn.q_porj")


def test_a_line_goes_on_two_columns_in() -> None:
    assert rendered(Hung("one two three\n  four five six seven"), width=14) == (
        "one two three\n  four five\n    six seven"
    )


def test_a_spec_without_places_is_said() -> None:
    with pytest.raises(PeftcError, match="there is nothing at any line: no statement that names places"):
        _ = explainer("llama", "apply prompt(length=4)").line(None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "spec.peft").write_text(f'{SPEC}use "more.peft"\n')
    (tmp_path / "more.peft").write_text("train embed\n")
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "spec.peft"), str(tmp_path / "llama"), "1"]) == 0
    out = capsys.readouterr().out
    assert "matches 4: model.layers.0.self_attn.q_proj" in out
    assert "train embed" not in out, "that is line 1 of another file"
    assert main(["explain", str(tmp_path / "spec.peft"), str(tmp_path / "llama"), "norm", "--json"]) == 0
    (norm,) = json.loads(capsys.readouterr().out)
    assert norm["statements"] == [f"{tmp_path / 'spec.peft'}:2: train norm"]


def test_a_place_may_be_called_by_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines count from 1; for another number a place is asked for by an option."""
    (tmp_path / "row.py").write_text(
        "import torch\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)), torch.zeros(2, 8)\n"
    )
    spec = tmp_path / "lora.peft"
    spec.write_text("# a comment\napply lora(r=2) to linear\n")
    model = f"{tmp_path / 'row.py'}:make"
    assert main(["explain", str(spec), model, "0", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], len(found["statements"])) == ("0", 1)
    assert main(["explain", str(spec), model, "1"]) == 1
    assert "there is a place called 1: ask for it with --place" in capsys.readouterr().err
    assert main(["explain", str(spec), model, "1", "--place", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "1"
