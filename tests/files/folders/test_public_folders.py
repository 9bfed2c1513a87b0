"""Settings as HF PEFT wrote them in the last three years, and other tools that call it: each means what it means there.

The files are those of public adapters of their time, with the base model and the sizes of a small Llama.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import peftc
from foldercases import MODELS, logits, theirs_in
from hfpeft import quietly, tensors_in
from marks import first_is_quick

NEAR = 1e-5  # fp32, two implementations of one sum
# peft 0.3, of 2023: with fields that have gone since.
V03 = {
    "base_model_name_or_path": "huggyllama/llama-7b", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
    "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
V05 = {
    "auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": None, "peft_type": "LORA",
    "r": 4, "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
V07: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "mistralai/Mistral-7B-v0.1", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {},
    "revision": None, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
V10 = V07 | {"layer_replication": None, "use_dora": False, "use_rslora": True}
V15 = V10 | {
    "corda_config": None, "eva_config": None, "exclude_modules": None, "lora_bias": False,
    "trainable_token_indices": None,
}  # fmt: skip
V18 = V15 | {
    "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0",
    "qalora_group_size": 16, "target_parameters": None, "use_qalora": False,
}  # fmt: skip
V21 = V18 | {
    "kasa_config": None, "lora_ga_config": None, "monteclora_config": None, "peft_version": "0.21.2",
    "use_bdlora": None, "velora_config": None,
}  # fmt: skip
UNSLOTH = V18 | {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True,
                     "parent_library": "transformers.models.llama.modeling_llama"},
    "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit", "lora_dropout": 0, "task_type": None, "use_rslora": False,
    "target_modules": r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
                      r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))",
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "0.3": V03, "0.5": V05, "0.7": V07, "0.10": V10, "0.15": V15, "0.18": V18, "0.21": V21, "unsloth": UNSLOTH,
    "eva": V15 | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}, "use_rslora": False},
    "few fields": {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 4},
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> None:
    """Another set of settings beside the tensors that are there."""
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


@pytest.mark.parametrize("name", first_is_quick([*FILES]))
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")  # HF PEFT says which fields it passes by
def test_settings_of_their_time_load(name: str, tmp_path: Path) -> None:
    base = MODELS["llama"]()
    theirs_in(tmp_path, copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    write(tmp_path, FILES[name])
    theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path)).eval()
    ours = peftc.load_peft(base, tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=NEAR)


def test_an_unknown_field_that_says_something_is_refused(tmp_path: Path) -> None:
    theirs_in(tmp_path, MODELS["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    write(tmp_path, V21 | {"use_something_new": True})
    with pytest.raises(peftc.PeftcError, match="its use_something_new=True is none that peftc has"):
        peftc.load_peft(MODELS["llama"](), tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    first_is_quick(
        [
            ("llama", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")),
            ("llama", peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, init_lora_weights="pissa",
                                      target_modules=["q_proj", "up_proj"])),
            ("llama", peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights="olora")),
            ("gpt2", peft.LoraConfig(r=4, target_modules=["c_fc"], init_lora_weights="pissa", fan_in_fan_out=True)),
        ]
    ),
    ids=lambda it: it if isinstance(it, str) else f"{it.init_lora_weights} {it.use_rslora}",
)  # fmt: skip
@pytest.mark.whole
def test_a_start_that_takes_from_the_weight_is_taken_again(name: str, config: Any, tmp_path: Path) -> None:
    """The folder has no residual weight: HF PEFT works it out of the base's as it loads."""
    base = MODELS[name]()
    theirs = theirs_in(tmp_path / "theirs", copy.deepcopy(base), config)
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=NEAR)
    ours.save_pretrained(tmp_path / "ours")  # of twice the rank, beside the whole weight
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=NEAR)


@pytest.mark.parametrize("old", [".lora_{}.default.weight", "modules_to_save"])
def test_names_of_before_are_understood(old: str, tmp_path: Path) -> None:
    base = MODELS["llama"]()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = theirs_in(tmp_path, copy.deepcopy(base), config)
    before = tensors_in(tmp_path)
    if old == "modules_to_save":
        named = {key.replace("lm_head.", "lm_head.modules_to_save.default."): t for key, t in before.items()}
        named["base_model.model.lm_head.original_module.weight"] = base.lm_head.weight.detach().clone()
    else:
        named = {key.replace(".weight", ".default.weight") if "lora" in key else key: t for key, t in before.items()}
    assert named.keys() != before.keys()
    safetensors.torch.save_file(named, tmp_path / "adapter_model.safetensors")
    ours = peftc.load_peft(base, tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=NEAR)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    theirs_in(tmp_path, MODELS["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(peftc.PeftcError, match=r"a pickle, which peftc does not read: .*writes safetensors"):
        peftc.load_peft(MODELS["llama"](), tmp_path)
