"""Checkpoints that are not all of the model: what is missing is named, and only a new head that learns may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import peftc
from marks import first_is_quick
from peftc.capture.checkpoints.naming import parse_reference
from peftc.cli import main
from zoo import ENCODER, GROUPED

NARROW: dict[str, Any] = {**GROUPED}
SMALL: dict[str, Any] = {**ENCODER}
LORA = "apply lora(r=2) to attn.q"
PACKED = f"quantize linear except head with nf4\n{LORA}"
HEAD = f"{LORA}\ntrain head"
UP, Q, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()


def llama(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**NARROW, **settings))


def saved(model: PreTrainedModel, folder: Path, change: Change, kind: str = "one", **config: Any) -> str:
    """The model's tensors as `change` leaves them: in one file, in shards, or pickled; `config` replaces settings."""
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "1GB")
    for file in sorted(folder.glob("*.safetensors")):
        tensors = change(load_file(file))
        if kind == "bin":
            file.unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, file, {"format": "pt"})
    described = folder / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | config))
    return str(folder)


def lacking(*parts: str) -> Change:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def cut(*names: str) -> Change:
    return lambda tensors: {name: t[:5].clone() if name in names else t for name, t in tensors.items()}


def refused(folder: str, spec: str) -> tuple[peftc.Diagnostic, ...]:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile(folder, spec)
    return raised.value.diagnostics


HOW = [("one", LORA), *((kind, spec) for spec in (PACKED, LORA) for kind in ("shards", "bin"))]


@pytest.mark.parametrize(("kind", "spec"), [*HOW[:2], *(pytest.param(*how, marks=pytest.mark.slow) for how in HOW[2:])])
def test_missing_weights_are_named(kind: str, spec: str, tmp_path: Path) -> None:
    (problem,) = refused(saved(llama(), tmp_path, lacking(UP, Q), kind), spec)
    assert problem.code == "missing-weights"
    assert UP in problem.title
    assert Q in problem.notes[0]


@pytest.mark.parametrize(("kind", "spec"), first_is_quick(HOW))
def test_every_other_shape_is_named(kind: str, spec: str, tmp_path: Path) -> None:
    problems = refused(saved(llama(), tmp_path, cut(UP, NORM), kind), spec)
    assert [problem.code for problem in problems] == ["other-shape"] * 2
    assert [name in str(problem) for name, problem in zip((UP, NORM), problems, strict=True)] == [True, True]


@pytest.mark.parametrize("spec", [HEAD, "train linear"])
def test_no_weight_may_be_missing_because_it_trains(spec: str, tmp_path: Path) -> None:
    """A head of a language model was trained with it, and so was every layer."""
    assert refused(saved(llama(), tmp_path, lacking("lm_head", UP)), spec)[0].code == "missing-weights"


@pytest.mark.slow
def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    compiled = peftc.compile(saved(llama(tie_word_embeddings=True), tmp_path, lacking("lm_head")), LORA)
    assert "checkpoint" not in compiled.report()


STACKED = f"quantize expert with int8\n{LORA}"


@pytest.mark.parametrize(
    ("part", "spec"),
    first_is_quick([(f"experts.2{part}", spec) for spec in (LORA, STACKED) for part in (".w1", ".w2", "")]),
)
def test_a_part_of_a_stacked_weight_is_missing(part: str, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**NARROW, num_local_experts=4))
    text = "\n".join(map(str, refused(saved(model, tmp_path, lacking(f"layers.0.block_sparse_moe.{part}")), spec)))
    assert "layers.0.mlp.experts." in text


def test_settings_that_are_of_another_model(tmp_path: Path) -> None:
    problems = refused(saved(llama(), tmp_path, lacking(), intermediate_size=40), LORA)
    assert {problem.code for problem in problems} == {"other-shape"}
    assert len(problems) == 6  # three projections in each of two layers


# --- a new head ------------------------------------------------------------------------------------------------------


def classifier(folder: Path, **config: Any) -> str:
    """A language model's checkpoint, said to be a classifier's."""
    named: dict[str, Any] = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3, "pad_token_id": 0}
    return saved(llama(), folder, lacking(), **named | config)


def logits(module: Any) -> Tensor:
    return torch.as_tensor(module.eval()(input_ids=torch.arange(1, 11).view(2, 5)).logits)


@pytest.mark.parametrize("spec", first_is_quick([HEAD, f"quantize linear except head with nf4\n{HEAD}"]))
def test_a_head_that_is_new_is_told_and_loads_anew(spec: str, tmp_path: Path) -> None:
    compiled = peftc.compile(classifier(tmp_path / "model"), spec)
    assert "not in the checkpoint, drawn anew: score.weight" in compiled.report()
    assert "in the checkpoint alone, unused: lm_head.weight" in compiled.report()
    told = compiled.plan.to_json()
    assert (told["fresh"], told["unread"]) == (["score.weight"], ["lm_head.weight"])
    with torch.no_grad():
        compiled.get_parameter("score.weight").normal_()
    compiled.save(tmp_path / "artifact")
    torch.manual_seed(99)
    again = peftc.load(tmp_path / "artifact")
    assert not torch.equal(again.base.get_parameter("score.weight"), compiled.base.get_parameter("score.weight"))
    assert torch.equal(logits(again), logits(compiled))


@pytest.mark.parametrize("spec", first_is_quick([LORA, f"quantize linear with int8\n{LORA}", "train norm"]))
def test_a_new_head_that_stays_random_is_refused(spec: str, tmp_path: Path) -> None:
    (problem,) = refused(classifier(tmp_path), spec)
    assert problem.code == "untrained-head"
    assert "score.weight" in problem.title
    assert problem.notes == ('let it learn: train "score"',)


@pytest.mark.parametrize("spec", first_is_quick([HEAD, f"quantize linear except head with nf4\n{HEAD}"]))
def test_a_head_of_another_number_of_labels_is_new_where_they_are_asked_for(spec: str, tmp_path: Path) -> None:
    """As of a classifier of a thousand things that is to tell three of its own; else the checkpoint is of another."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"image_size": 16, "patch_size": 8, "num_labels": 7}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes))
    model.save_pretrained(tmp_path / "model")
    asked = replace(parse_reference(str(tmp_path / "model")), labels=3)
    compiled = peftc.compile(asked, spec)
    assert compiled.plan.captured.differences.fresh == ("classifier.bias", "classifier.weight")
    compiled.save(tmp_path / "artifact")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(peftc.load(tmp_path / "artifact").eval()(images).logits, compiled.eval()(images).logits)
    with pytest.raises(peftc.PeftcError, match="untrained-head"):
        peftc.compile(asked, LORA)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["id2label"] = {str(place): str(place) for place in range(3)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    assert {one.code for one in refused(str(tmp_path / "model"), spec)} == {"other-shape"}


@pytest.mark.slow
def test_every_layer_of_a_new_head_has_to_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL))
    folder = saved(model, tmp_path, lacking(), architectures=["RobertaForSequenceClassification"])
    (problem,) = refused(folder, HEAD)
    assert problem.notes[-1] == 'let it learn: train "classifier.dense"'
    compiled = peftc.compile(folder, f'{HEAD}, "classifier.dense"')
    assert len(compiled.plan.captured.differences.fresh) == 4


def test_a_layer_of_the_base_model_is_no_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SMALL))
    folder = saved(model, tmp_path, lacking(), architectures=["BertForSequenceClassification"])
    assert "bert.pooler.dense.weight" in str(refused(folder, "train head")[0])


def test_a_bench_refuses_a_new_head_that_stays_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, spec = classifier(tmp_path / "model"), tmp_path / "spec.peft"
    spec.write_text(LORA)
    assert main(["bench", str(spec), folder]) == 1
    assert "untrained-head" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, spec = classifier(tmp_path / "model"), tmp_path / "spec.peft"
    spec.write_text(HEAD)
    assert main(["compile", str(spec), folder, "-o", str(tmp_path / "artifact")]) == 0
    assert "drawn anew: score.weight" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "artifact"), "-o", str(tmp_path / "merged")]) == 0
    (tmp_path / "bad").mkdir()
    assert main(["compile", str(spec), saved(llama(), tmp_path / "bad", lacking(UP))]) == 1
    assert UP in capsys.readouterr().err
