"""What a spec comes to on a model: bad ones with their words, and the papers' counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import golden
import peftc
from paths import EXAMPLES, GOLDEN
from peftc.capture.capture import capture
from peftc.capture.checkpoints.references import load_model, parse_reference
from peftc.capture.inputs import example_inputs
from peftc.planning.plan import Plan
from peftc.planning.planner import make_plan
from peftc.roles.assign import find_sites
from peftc.spec.check import intend
from planned import plan, together

torch.set_num_threads(1)

BAD = GOLDEN / "spec" / "plan"


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
