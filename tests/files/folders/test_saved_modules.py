"""Heads and other modules that HF PEFT's folders hold whole, both ways: `train head` is its `modules_to_save`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from foldercases import MODELS, logits, theirs_in, two_of
from hfpeft import quietly, shaken, tensors_in
from marks import first_is_quick

NEAR = 1e-5  # fp32, two implementations of one sum
KINDS = {"classes": "SEQ_CLS", "tokens": "TOKEN_CLS", "answers": "QUESTION_ANS"}


def config_in(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    first_is_quick(
        [
            ("bert classes", "SEQ_CLS", {}),
            ("bert tokens", "TOKEN_CLS", {}),
            ("bert answers", "QUESTION_ANS", {}),
            ("roberta classes", "SEQ_CLS", {}),
            ("distilbert classes", "SEQ_CLS", {"layers_to_transform": [1]}),
            ("gpt2 tokens", "TOKEN_CLS", {"rank_pattern": {"h.0.attn.c_attn": 2}, "alpha_pattern": {"h.1.*": 3}}),
            ("llama classes", "SEQ_CLS", {"target_modules": "all-linear", "use_dora": True}),
            ("llama", "CAUSAL_LM", {"modules_to_save": ["embed_tokens", "lm_head"]}),
            ("llama", "CAUSAL_LM", {"modules_to_save": ["layers.1.mlp", "norm"], "exclude_modules": "up_proj"}),
            ("llama", None, {"modules_to_save": ["lm_head"]}),
            ("t5", "SEQ_2_SEQ_LM", {"target_modules": r"decoder.*\.(EncDec|Self)Attention\.(q|v)"}),
        ]
    ),
    ids=str,
)
@pytest.mark.whole
def test_a_folder_of_hf_pefts_comes_back(name: str, kind: str | None, given: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS[name]()
    settings: dict[str, Any] = {"r": 4, "target_modules": two_of(name), "task_type": kind, **given}
    theirs = theirs_in(tmp_path / "theirs", copy.deepcopy(base), peft.LoraConfig(**settings))
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=NEAR)
    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=NEAR)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    learning = {key for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert ours.plan.trainable == sum(theirs.get_parameter(key).numel() for key in learning)


@pytest.mark.parametrize(
    ("name", "spec", "saved"),
    first_is_quick(
        [
            ("llama classes", "apply lora(r=4) to attn.q\ntrain head", ["score"]),
            ("llama classes", "apply lora(r=4) to attn.q", ["score"]),  # which theirs has, whether it learns or not
            ("bert answers", "apply dora(r=4) to attn.q\ntrain head", ["qa_outputs"]),
            ("llama", 'apply ia3 to attn.k, mlp.down\ntrain "lm_head.weight", norm', None),
            ("llama tied", "apply lora(r=4) to attn.q\ntrain head, embed", None),
            ("llama classes", "apply lora(r=4) to head", None),
            ("bert classes", "apply prompt(length=3)\ntrain head", ["classifier"]),
            (
                "t5",
                'apply lora(r=4) to attn.q in decoder\ntrain "decoder.final_layer_norm"',
                ["decoder.final_layer_norm"],
            ),
        ]
    ),
    ids=str,
)
def test_hf_peft_reads_what_learns_beside_an_adapter(
    name: str, spec: str, saved: list[str] | None, tmp_path: Path
) -> None:
    base = MODELS[name]()
    compiled = shaken(peftc.compile(copy.deepcopy(base), spec))
    compiled.save_pretrained(tmp_path)
    theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(compiled), rtol=0, atol=NEAR)
    assert saved is None or config_in(tmp_path)["modules_to_save"] == saved
    again = peftc.load_peft(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(compiled), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama tied", {"modules_to_save": ["lm_head"]}, "lm_head.weight is another than .*tie_word_embeddings=False"),
        (
            "llama",
            {"modules_to_save": ["lm_head", "l.norm"]},
            "no base_model.model.model.norm.weight, which its modules",
        ),
        ("llama", {"modules_to_save": "lm_head"}, "modules_to_save=lm_head is none"),
        ("llama", {"modules_to_save": None}, None),  # an output that is another than the base's, as after a resize
    ],
    ids=str,
)
def test_a_module_that_does_not_fit_is_named(
    name: str, change: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    base = MODELS[name]()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = theirs_in(tmp_path, copy.deepcopy(base), config)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if words is None:
        ours = peftc.load_peft(base, tmp_path).eval()
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=NEAR)
        return
    with pytest.raises(peftc.PeftcError, match=words):
        peftc.load_peft(base, tmp_path)
