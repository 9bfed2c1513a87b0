"""Low-rank methods and IA3 are HF PEFT's: the same start, outputs and gradients on five architectures."""

import copy
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from marks import first_is_quick
from training import copy_state, randomise, their_tensors
from zoo import ZOO, inputs

# Where each method stands, as the ends of module names. HF PEFT's OLoRA is left out on GPT-2: it swaps A and B there.
PLACES: dict[str, dict[str, str]] = {
    "llama": {"lora": "q_proj", "rslora": "k_proj", "dora": "v_proj", "pissa": "down_proj", "olora": "up_proj"},
    "gpt2": {"lora": "mlp.c_proj", "rslora": "attn.c_proj", "dora": "attn.c_attn", "pissa": "mlp.c_fc"},
    "bert": {
        "lora": "self.query",
        "rslora": "self.key",
        "dora": "self.value",
        "pissa": "intermediate.dense",
        "olora": "attention.output.dense",
    },
    "t5": {
        "lora": "SelfAttention.q",
        "rslora": "SelfAttention.k",
        "dora": "EncDecAttention.v",
        "pissa": "wi",
        "olora": "wo",
    },
    "vit": {"lora": "q_proj", "rslora": "k_proj", "dora": "v_proj", "pissa": "fc1", "olora": "fc2"},
}
THEIR_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
OUR_METHODS = {
    "lora": "lora(r=4, alpha=6)",
    "rslora": "lora(r=4, alpha=6, rslora=true)",
    "dora": "dora(r=4, alpha=6)",
    "pissa": "lora(r=4, alpha=6, init=pissa)",
    "olora": "lora(r=4, alpha=6, init=olora)",
}
# keys, values, and the module whose input is scaled
IA3_PLACES = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "bert": ("self.key", "self.value", "intermediate.dense"),
    "t5": ("SelfAttention.k", "EncDecAttention.v", "wo"),
    "vit": ("k_proj", "v_proj", "fc2"),
}


def assert_same(
    theirs: nn.Module, ours: peftc.CompiledModule, batch: dict[str, Tensor], *, at_start: bool = False
) -> None:
    """Outputs and the gradients of everything that learns; only at the start may a gradient be zero."""
    theirs.eval()
    ours.eval()
    expected, actual = theirs(**batch), ours(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    for name, parameter in their_tensors(theirs, ours).items():
        gradient = ours.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert at_start or parameter.grad.abs().max() > 0, name
        own = gradient.reshape(parameter.grad.shape)
        torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))
    theirs.zero_grad()
    ours.zero_grad()


@pytest.mark.parametrize("name", first_is_quick(list(PLACES)))
def test_low_rank_methods_equal_hf_pefts(name: str) -> None:
    """One model with a method on each kind of layer; HF PEFT has them as adapters that are active together."""
    base = ZOO[name]()
    theirs: Any = None
    adapters = {method: f"with_{method}" for method in PLACES[name]}  # HF PEFT warns of an adapter called "lora"
    for method, place in PLACES[name].items():
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=[place], fan_in_fan_out=name == "gpt2", **THEIR_OPTIONS[method]
        )
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=adapters[method])
        else:
            theirs.add_adapter(adapters[method], config)
    theirs.base_model.set_adapter(list(adapters.values()))
    spec = "\n".join(f'apply {OUR_METHODS[method]} to "**.{place}"' for method, place in PLACES[name].items())
    ours = peftc.compile(base, spec)
    assert_starts_equal(theirs, ours, PLACES[name])
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base), at_start=True)
    randomise(theirs)
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base))


def assert_starts_equal(theirs: nn.Module, ours: peftc.CompiledModule, places: dict[str, str]) -> None:
    """Where the start is not random it is HF PEFT's: the lengths of DoRA, the products of PiSSA and OLoRA."""
    expected = their_tensors(theirs, ours)
    for name, parameter in expected.items():
        module, _, leaf = name.removesuffix(".m").removesuffix(".B").rpartition(".")
        if name.endswith(".m"):
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)
        elif name.endswith(".B") and module.endswith(tuple(places.get(kind, "-") for kind in ("pissa", "olora"))):
            a, b = (f"{module}.{leaf}.{part}" for part in "AB")
            product = ours.get_parameter(b) @ ours.get_parameter(a)
            torch.testing.assert_close(product, expected[b] @ expected[a], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.slow
def test_ia3_equals_hf_pefts(name: str) -> None:
    base = ZOO[name]()
    *scaled, last = IA3_PLACES[name]
    config = peft.IA3Config(target_modules=[*scaled, last], feedforward_modules=[last], fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    outputs = ", ".join(f'"**.{place}"' for place in scaled)
    ours = peftc.compile(base, f'apply ia3(on=output) to {outputs}\napply ia3(on=input) to "**.{last}"')
    randomise(theirs)
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base))
