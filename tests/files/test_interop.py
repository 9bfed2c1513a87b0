"""HF PEFT's folder, both ways: what peftc writes HF PEFT reads, and the reverse, with the same outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

import peftc
from marks import first_is_quick
from zoo import ZOO, inputs

NEAR = 1e-5  # fp32, two implementations of one sum


def randomised(compiled: peftc.CompiledModule) -> peftc.CompiledModule:
    """With state that is no start: a zero B would hide what is wrong with A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return compiled.eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize(
    ("name", "spec"),
    first_is_quick(
        [
            ("llama", "apply lora(r=4, alpha=6) to attn.q, mlp.down\napply lora(r=2, rslora=false) to attn.v"),
            ("llama", "apply lora(r=4, rslora=true) to attn.*"),
            ("llama", "apply dora(r=4) to attn.q, attn.v"),
            ("llama", "apply lora(r=3, init=pissa) to attn.q, attn.v"),
            ("bert", "apply ia3 to attn.k, attn.v, mlp.down"),
            ("gpt2", 'apply lora(r=4) to "**.c_attn", mlp.down'),
        ]
    ),
)
def test_hf_peft_reads_what_peftc_writes(name: str, spec: str, tmp_path: Path) -> None:
    model = ZOO[name]()
    model.eval()
    batch = inputs(model)
    compiled = randomised(peftc.compile(model, spec))
    compiled.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    theirs.eval()
    for_task = peft.PeftModelForCausalLM if model.can_generate() else peft.PeftModelForSequenceClassification
    assert type(theirs) is for_task
    torch.testing.assert_close(logits(theirs, batch), logits(compiled, batch), rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    ("name", "config"),
    first_is_quick(
        [
            (
                "llama",
                peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
            ),
            ("llama", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 64})),
            ("llama", peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])),
            ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
            ("gpt2", peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
        ]
    ),
)
def test_peftc_reads_what_hf_peft_writes(name: str, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZOO[name]()
    batch = inputs(model)
    theirs: Any = peft.get_peft_model(ZOO[name](), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    compiled = peftc.load_peft(model, tmp_path)
    compiled.eval()
    torch.testing.assert_close(logits(compiled, batch), logits(theirs, batch), rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    first_is_quick(
        [
            ("llama", "apply adapter(size=4) to mlp", "it has no adapter"),
            ("llama", "apply lora(r=2) to attn.q\napply ia3 to attn.k", "one method"),
            ("bert", 'apply lora(r=2) to attn.q\ntrain "**.dense.weight"', "it holds whole modules"),
            ("gpt2", "apply lora(r=2) to attn.q", "a part of one"),
            ("llama", "apply lora(r=2, dropout=0.1) to attn.q\napply lora(r=2) to attn.v", "lora_dropout"),
        ]
    ),
)
def test_what_does_not_fit_is_refused(name: str, spec: str, reason: str, tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO[name](), spec)
    with pytest.raises(peftc.PeftcError, match=reason):
        compiled.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(ZOO["llama"](), peft.PolyConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(peftc.PeftcError, match="bad-artifact"):
        peftc.load_peft(ZOO["llama"](), tmp_path)
    with pytest.raises(peftc.PeftcError, match="bad-artifact"):
        peftc.load_peft(ZOO["llama"](), tmp_path / "nowhere")


@pytest.mark.slow
def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    peftc.compile(ZOO["llama"](), "apply lora(r=2) to attn.q").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    file.write_bytes(
        safetensors.torch.save({k: t[:, :1].contiguous() if "lora_A" in k else t for k, t in tensors.items()})
    )
    with pytest.raises(peftc.PeftcError, match="bad-artifact"):
        peftc.load_peft(ZOO["llama"](), tmp_path / "adapter")


@pytest.mark.slow
def test_saving_again_leaves_other_files_alone(tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO["llama"](), "apply lora(r=2) to attn.q")
    compiled.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    compiled.save_pretrained(tmp_path)
    compiled.save(tmp_path / "own")
    (tmp_path / "own" / "notes.txt").write_text("mine")
    compiled.save(tmp_path / "own")
    assert (tmp_path / "tokenizer.json").is_file()
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"
    peftc.load(tmp_path / "own", ZOO["llama"]())


@pytest.mark.parametrize(
    ("name", "norms"), [("llama", ["input_layernorm", "post_attention_layernorm", "norm"]), ("bert", ["LayerNorm"])]
)
@pytest.mark.slow
def test_training_norms_is_hf_pefts_layer_norm_tuning(name: str, norms: list[str]) -> None:
    """Three steps of SGD: the same outputs, and the same parameters learn."""
    ours: Any = peftc.compile(ZOO[name](), "train norm").eval()
    with warnings.catch_warnings():  # it warns of every layer that has no features in and out
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(ZOO[name](), peft.LNTuningConfig(target_modules=norms)).eval()
    learning = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learning) == ours.plan.trainable
    batch = inputs(ZOO[name]())
    for _ in range(3):
        for model, parameters in ((ours, [*ours.trainable_parameters().values()]), (theirs, learning)):
            optimizer = torch.optim.SGD(parameters, lr=0.5)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    ("name", "norms"),
    first_is_quick(
        [("llama", ["input_layernorm", "norm"]), ("bert", ["output.LayerNorm"]), ("gpt2", ["ln_1", "ln_f"])]
    ),
)
@pytest.mark.filterwarnings("ignore")  # it warns of every layer that has no features in and out
def test_layer_norm_tuning_both_ways(name: str, norms: list[str], tmp_path: Path) -> None:
    model = ZOO[name]().eval()
    batch = inputs(model)
    theirs: Any = peft.get_peft_model(ZOO[name](), peft.LNTuningConfig(target_modules=norms)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftc.load_peft(model, tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=NEAR)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(ZOO[name](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, batch), logits(theirs, batch), rtol=0, atol=NEAR)
    first, second = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("theirs", "ours"))
    before, after = safetensors.torch.load(first), safetensors.torch.load(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.parametrize("option", [{"init_lora_weights": "corda"}, {"alora_invocation_tokens": [3, 4]}], ids=str)
def test_folders_that_mean_another_model_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    """HF PEFT takes a start out of the base's weights as it loads such a folder, or branches at some tokens only."""
    peftc.compile(ZOO["llama"](), "apply lora(r=2) to attn.q").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with pytest.raises(peftc.PeftcError, match=f"its {next(iter(option))}=.* is none that peftc has"):
        peftc.load_peft(ZOO["llama"](), tmp_path)


@pytest.mark.parametrize("option", [{"rank_pattern": [1]}, {"alpha_pattern": {"(": 3}}], ids=str)
def test_damaged_settings_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    peftc.compile(ZOO["llama"](), "apply lora(r=2) to attn.q").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with pytest.raises(peftc.PeftcError, match="damaged"):
        peftc.load_peft(ZOO["llama"](), tmp_path)
