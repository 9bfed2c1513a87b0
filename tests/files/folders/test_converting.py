"""`peftc convert`: the spec that files of others mean, held to what they are when they are loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

import peftc
from foldercases import MODELS, logits, theirs_in, two_of
from hfpeft import shaken, tensors_in
from marks import first_is_quick
from peftc.planning.plan import Plan

Run = Callable[..., tuple[int, str, str]]


def meaning(plan: Plan) -> Any:
    """What stands where, and what learns."""
    return sorted((b.site.name, repr(b.method)) for b in plan.bindings), sorted(plan.trained)


@pytest.mark.parametrize(
    ("name", "config", "text"),
    first_is_quick(
        [
            ("llama", peft.LoraConfig(r=4, lora_alpha=16, target_modules=two_of("llama"), task_type="CAUSAL_LM"),
             "# what a holds, HF PEFT's LORA\n# for: CAUSAL_LM\n"
             'apply lora(r=4) to "**.{q_proj,v_proj}"\n'),
            ("llama", peft.LoraConfig(r=4, target_modules="all-linear", rank_pattern={"layers.0.*q_proj": 2},
                                      init_lora_weights="gaussian", modules_to_save=["lm_head"]), None),
            ("llama", peft.LoraConfig(r=4, target_modules=["q_proj", "mlp.up_proj"], layers_to_transform=[1],
                                      use_dora=True), None),
            ("bert classes", peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), None),
            ("t5", peft.LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"), None),
            ("llama", peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["o_proj"], init_lora_weights="olora"),
             None),
            ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), None),
            ("llama", peft.LoKrConfig(r=2, target_modules=["q_proj"]), None),
            ("llama", peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj"]), None),
            ("llama", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), None),
            ("llama", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), None),
            ("llama", peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]), None),
            ("llama", peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=["q_proj", "o_proj"]), None),
            ("llama", peft.LoraConfig(r=3, kasa_config=peft.KasaConfig(), target_modules=["q_proj"]), None),
            ("gpt2", peft.LoraConfig(r=3, bias="all", lora_bias=False, target_modules=["c_attn"]), None),
            ("bert classes", peft.LoraConfig(r=3, bias="lora_only", target_modules=["query"]), None),
            ("bert classes", peft.LoraConfig(r=3, bias="all", target_modules=["query"], task_type="SEQ_CLS"), None),
            ("llama", peft.TrainableTokensConfig(token_indices=[17, 5], target_modules=["embed_tokens"]), None),
            ("llama", peft.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, task_type="CAUSAL_LM"), None),
        ]
    ),
    ids=lambda it: str(getattr(it, "peft_type", "")),
)  # fmt: skip
@pytest.mark.whole
def test_the_spec_is_what_the_folder_is(name: str, config: Any, text: str | None, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "a"
    theirs_in(folder, MODELS[name](), config)
    assert run("convert", folder, "-o", tmp_path / "spec.peft")[0] == 0
    written = (tmp_path / "spec.peft").read_text()
    assert text is None or written == text
    assert meaning(peftc.plan(MODELS[name](), str(tmp_path / "spec.peft"))) == meaning(
        peftc.load_peft(MODELS[name](), folder).plan
    )
    assert not peftc.check(written)


def test_what_peftc_has_not_is_an_error(tmp_path: Path, run: Run) -> None:
    theirs_in(tmp_path / "a", MODELS["llama"](), peft.PolyConfig(r=2, target_modules=["q_proj"]))
    status, out, err = run("convert", tmp_path / "a")
    assert (status, out) == (1, "")
    assert "peft_type=POLY" in err


def test_a_start_has_a_comment(tmp_path: Path, run: Run) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    theirs_in(tmp_path / "a", MODELS["llama"](), config)
    assert "# no counterpart: init_lora_weights=orthogonal" in run("convert", tmp_path / "a")[1]


# Files of kohya's scripts and of LyCORIS

ENDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya(folder: Path, to: Path, *, dots: bool = False) -> Path:
    """The tensors of a folder of HF PEFT as kohya's scripts name them, alpha 6 for each."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors_in(folder).items():
        end = next((end for end in ENDS if key.endswith(end)), f".{key.rpartition('.')[2]}")
        module = key.removeprefix("base_model.model.").removesuffix(end)
        name = module if dots else "lora_te_" + module.replace(".", "_")
        found |= {f"{name}{ENDS.get(end, end)}": tensor, f"{name}.alpha": torch.tensor(6.0)}
    safetensors.torch.save_file(found, to)
    return to


@pytest.mark.parametrize(
    "config",
    first_is_quick(
        [
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "mlp.up_proj"], rank_pattern={"up_proj": 2}),
            peft.LoHaConfig(r=4, alpha=6, target_modules=["q_proj", "v_proj"]),
        ]
    ),
    ids=lambda it: str(it.peft_type),
)
@pytest.mark.whole
def test_a_file_of_other_tools_is_what_it_means(config: Any, tmp_path: Path, run: Run) -> None:
    base = MODELS["llama"]()
    theirs = theirs_in(tmp_path / "a", copy.deepcopy(base), config)
    file = kohya(tmp_path / "a", tmp_path / "k.safetensors")
    ours = peftc.load_peft(copy.deepcopy(base), file).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    base.config.save_pretrained(tmp_path / "base")
    status, out, _ = run("convert", file, "--model", tmp_path / "base" / "config.json")
    assert status == 0
    assert meaning(peftc.plan(base, out)) == meaning(ours.plan)
    assert (
        run("convert", kohya(tmp_path / "a", tmp_path / "d.safetensors", dots=True))[1].splitlines()[1:]
        == (out.splitlines()[1:])
    )


def test_names_that_cannot_be_told_are_said(tmp_path: Path, run: Run) -> None:
    base = MODELS["llama"]()
    theirs_in(tmp_path / "a", copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    file = kohya(tmp_path / "a", tmp_path / "k.safetensors")
    assert "where the dots of lora_te_model_layers_0_self_attn_q_proj are the model says" in run("convert", file)[2]
    with pytest.raises(peftc.PeftcError, match="is no module of the model"):
        peftc.load_peft(MODELS["gpt2"](), file)
    with pytest.raises(peftc.PeftcError, match="pass the model, load_peft"):
        peftc.load_peft(file)


# From where the base is, and the card


@pytest.mark.parametrize("name", first_is_quick(["llama", "bert classes"]))
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_a_folder_brings_its_base(name: str, tmp_path: Path) -> None:
    """In both libraries; of a classifier whose base has no head the head comes out of the folder."""
    MODELS[name]().save_pretrained(tmp_path / "base")
    if name == "bert classes":
        file = tmp_path / "base" / "model.safetensors"
        tensors = safetensors.torch.load(file.read_bytes())
        headless = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier")}
        safetensors.torch.save_file(headless, file, metadata={"format": "pt"})
    spec = "apply lora(r=4) to attn.q, attn.v in layers[1:]\ntrain head"
    compiled = shaken(peftc.compile(str(tmp_path / "base"), spec))
    compiled.save_pretrained(tmp_path / "a")
    auto: Any = peft.AutoPeftModelForCausalLM if name == "llama" else peft.AutoPeftModelForSequenceClassification
    theirs = auto.from_pretrained(str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(compiled), rtol=0, atol=1e-5)
    again = peftc.load_peft(tmp_path / "a").eval()
    torch.testing.assert_close(logits(again), logits(compiled), rtol=0, atol=0)
    card = (tmp_path / "a" / "README.md").read_text()
    assert spec in card
    assert f"| all |  | {compiled.plan.trainable:,} |" in card
    assert f"{auto.__name__}.from_pretrained(" in card


def test_a_card_of_others_is_left_alone(tmp_path: Path) -> None:
    compiled = peftc.compile(MODELS["llama"](), "apply lora(r=4) to attn.q")
    compiled.save_pretrained(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    compiled.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_that_names_no_base_asks_for_it(tmp_path: Path) -> None:
    theirs = theirs_in(tmp_path, MODELS["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(peftc.PeftcError, match="does not say where its base model is"):
        peftc.load_peft(tmp_path)
    ids = torch.randint(3, 97, (2, 5))
    given = peftc.load_peft(MODELS["llama"](), tmp_path, example={"input_ids": ids}).eval()
    torch.testing.assert_close(logits(given), logits(theirs), rtol=0, atol=1e-5)
