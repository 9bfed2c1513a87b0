"""Weight methods beyond LoRA that HF PEFT has: the same state, outputs, loss and gradients; and half precision."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftc
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from peftc.protocol.site import Linear
from training import gradients_by_their_names
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

NEAR = 1e-5  # fp32, two implementations of one sum


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


EACH_ON_ITS_ROLE = """
apply loha(r=2) to attn.q
apply lokr(r=2) to attn.k
apply krona to attn.v
apply qalora(r=2, group=16) to attn.o
apply far to mlp.up
apply vera(r=8) to mlp.gate
apply adalora(r=4, target=2) to mlp.down
"""


# ---- HF PEFT: the same state, the same outputs, loss and gradients -----------------------------------------------


def randomised(model: Any) -> Any:
    """With adapters that are no start: a zero factor would hide what is wrong with the other."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def without_dropout(name: str) -> Any:
    """A tiny model that computes the same in `train()` and `eval()`."""
    model = ZOO[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def assert_same(compiled: peftc.CompiledModule, theirs: Any, batch: dict[str, Tensor]) -> None:
    compiled.logits_in_training = True
    penalised = compiled.plan.bindings[0].method.name == "adalora"  # the penalty joins the loss in training
    ours, expected = compiled.train(penalised)(**batch), theirs.train(penalised)(**batch)
    close(ours.logits, expected.logits, NEAR)
    close(ours.loss, expected.loss, NEAR)
    ours.loss.backward()
    expected.loss.backward()
    found = gradients_by_their_names(compiled)
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            largest = parameter.grad.abs().max()  # may be 1e-5, where the attention is nearly uniform
            assert largest > 0, f"{name} proves nothing"
            close(found[short] / largest, parameter.grad / largest, NEAR)
            compared += 1
    assert compared == len(compiled.trainable_parameters())


# Without a task, their PeftModel goes past the forward that adds the penalty.
AdaLoraConfig = partial(peft.AdaLoraConfig, task_type="CAUSAL_LM")
BOTH = ["q_proj", "down_proj"]  # 48 x 32 and 32 x 80 on the tiny Llama
CONFIGS = {
    "loha, factored": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=BOTH)),
    "loha, dense": ("llama", peft.LoHaConfig(r=8, target_modules=BOTH)),
    "loha, two ranks": (
        "llama",
        peft.LoHaConfig(r=3, target_modules=BOTH, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    ),
    "lokr": ("llama", peft.LoKrConfig(r=3, alpha=5, target_modules=BOTH)),
    "lokr, dense": ("llama", peft.LoKrConfig(r=8, target_modules=BOTH)),
    "lokr, a factor": ("llama", peft.LoKrConfig(r=2, decompose_factor=4, target_modules=BOTH)),
    "lokr, a factor that divides nothing": ("llama", peft.LoKrConfig(r=2, decompose_factor=7, target_modules=BOTH)),
    "lokr, a large factor": ("llama", peft.LoKrConfig(r=2, decompose_factor=16, target_modules=BOTH)),
    "lokr, both thin": (
        "llama",
        peft.LoKrConfig(r=2, decompose_both=True, target_modules=BOTH, init_weights="lycoris"),
    ),
    "vera": ("llama", peft.VeraConfig(r=5, target_modules=BOTH)),
    "vera, gpt2": ("gpt2", peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "adalora": ("llama", AdaLoraConfig(init_r=5, target_r=3, target_modules=BOTH, total_step=10)),
    "adalora, no penalty": (
        "llama",
        AdaLoraConfig(init_r=5, target_modules=BOTH, total_step=10, orth_reg_weight=0.0, lora_alpha=3),
    ),
    "adalora, gpt2": (
        "gpt2",
        AdaLoraConfig(init_r=3, target_r=2, target_modules=["c_attn"], total_step=9, fan_in_fan_out=True),
    ),
    "lokr, bert": ("bert", peft.LoKrConfig(r=2, target_modules=["value", "intermediate.dense"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_in_hf_peft(name: str, tmp_path: Path) -> None:
    """Their adapter, read by peftc: outputs, loss and every gradient; and peftc's own folder, read by them."""
    zoo_model, config = CONFIGS[name]
    base = without_dropout(zoo_model)
    batch = inputs(base)
    theirs = randomised(peft.get_peft_model(without_dropout(zoo_model), config))
    theirs.save_pretrained(tmp_path / "theirs")
    compiled = peftc.load_peft(base, tmp_path / "theirs")
    assert_same(compiled, theirs, batch)
    theirs.eval()
    compiled.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(ZOO[zoo_model](), str(tmp_path / "ours"))
    assert torch.equal(back.eval()(**batch).logits, theirs(**batch).logits)


@pytest.mark.filterwarnings("ignore:Specified to not")
def test_vera_without_its_projections(tmp_path: Path) -> None:
    """A folder that leaves out A and B: they are drawn anew from the seed, bit for bit as HF PEFT draws them."""
    config = peft.VeraConfig(r=5, target_modules=BOTH, save_projection=False, projection_prng_key=7)
    theirs = randomised(peft.get_peft_model(ZOO["llama"](), config))
    theirs.save_pretrained(tmp_path)
    compiled = peftc.load_peft(ZOO["llama"](), tmp_path)
    state = compiled.state_dict()
    assert torch.equal(state["vera.A"], theirs.base_model.vera_A["default"])
    assert torch.equal(state["vera.B"], theirs.base_model.vera_B["default"])
    assert_same(compiled, theirs, inputs(ZOO["llama"]()))


@pytest.mark.parametrize("spec", ["loha(r=3)", "lokr(r=3)"])
def test_hf_peft_has_none_on_transposed_weights(spec: str, tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO["gpt2"](), f"apply {spec} to mlp.up")
    with pytest.raises(peftc.PeftcError, match="no transposed weight"):
        compiled.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["w1", "w2"])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_starts_are_hf_peft_s(name: str, init: str) -> None:
    """Zero where theirs is zero, and of the same bounds elsewhere."""
    torch.manual_seed(0)
    if name == "loha":
        config: Any = peft.LoHaConfig(r=4, target_modules=BOTH)
        spec = "loha(r=4)"
    else:
        config = peft.LoKrConfig(r=2, target_modules=BOTH, init_weights=True if init == "w1" else "lycoris")
        spec = f"lokr(r=2, init={init})"
    theirs: Any = peft.get_peft_model(ZOO["llama"](), config)
    compiled = peftc.compile(ZOO["llama"](), f"apply {spec} to attn.q, mlp.down")
    expected = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    for binding in compiled.plan.bindings:
        state = {key: get_attribute(compiled, f"{binding.path}.{key}") for key in binding.state}
        for key, tensor in binding.method.to_peft(binding.site, state)[1].items():
            other = expected[f"base_model.model.{binding.site.name}.{key}"]
            assert tensor.shape == other.shape
            assert tensor.any() == other.any()
            # both uniform: their largest values are near their bound, those of 8 numbers less so
            torch.testing.assert_close(tensor.abs().max(), other.abs().max(), rtol=0.5, atol=0)


def test_lokr_shapes_are_those_of_lycoris() -> None:
    """For every size and factor, the two sides of the Kronecker product are HF PEFT's, which are LyCORIS's."""
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (None, *range(1, 20)):
            site = Linear("layer", "layer", frozenset(), n_in=size, n_out=1)
            state = methods()["lokr"](r=1000, factor=factor).state(site)
            shape = state["w1"].shape[1], state["w2"].shape[1]
            assert shape == factorization(size, factor or -1), (size, factor)


# ---- Half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_learns_in_fp32_beside_a_half_precision_base(dtype: torch.dtype) -> None:
    """Every method of this file and the next, each on a role of its own."""
    base: Any = ZOO["llama"]()
    base.to(dtype)
    batch = inputs(base)
    compiled = peftc.compile(base, EACH_ON_ITS_ROLE)
    output = compiled.eval()(**batch)
    assert output.logits.dtype == dtype
    assert torch.equal(output.logits, base.eval()(**batch).logits)
    output.loss.backward()
    for key, parameter in compiled.trainable_parameters().items():
        assert parameter.dtype == torch.float32, key
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    merged = randomised(compiled).merge().eval()
    # one rounding of each weight to 8 or 11 bits, on logits of about 1
    torch.testing.assert_close(merged(**batch).logits, compiled(**batch).logits, rtol=0.05, atol=0.05)
