"""The loss of a training step is the base model's own, with its logits or without, and so are the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftc
from marks import first_is_quick
from peftc.protocol.site import Linear
from zoo import TOKENS, VOCABULARY, ZOO, inputs

RANK = 3
SPEC = f"apply lora(r={RANK}, alpha={RANK}) to mlp.down"  # the factor of B A is 1
# Sums in another order, by another library's products; T5's logits are larger than 1.
NEAR = 2e-5


def whisper() -> PreTrainedModel:
    """A model that makes its decoder's inputs of the labels by writing in place."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 80,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 16,
        "max_target_positions": 32, "decoder_start_token_id": 1,
    }  # fmt: skip
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**settings))


def heard() -> dict[str, Tensor]:
    """What Whisper is trained on."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(3, VOCABULARY, (2, 8), generator=random)
    return {"input_features": torch.randn(2, 8, 32, generator=random), "labels": labels}


FACTORIES: dict[str, Callable[[], PreTrainedModel]] = {"whisper": whisper, **ZOO}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every probability of leaving something out at zero, wherever it keeps that."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, given in vars(module).items():
            if "dropout" in name and isinstance(given, float):
                setattr(module, name, 0.0)
    return model


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs with labels, of which some are left out where there is one a token."""
    given = heard() if isinstance(model, hf.WhisperForConditionalGeneration) else inputs(model)
    if given["labels"].dim() > 1:
        given["labels"][0, -2:] = -100
        given["labels"][1, 3] = -100
    return given


def dinov2() -> PreTrainedModel:
    """An image classifier whose graph reads the number of examples off the labels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        "num_labels": 3,
    }  # fmt: skip
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**settings))


def test_a_classifier_is_asked_without_labels() -> None:
    compiled = peftc.compile(dinov2(), "apply lora to attn.q")
    sizes = compiled.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert "labels" in {str(node.args[0]) for node in sizes}
    pixels = torch.randn(3, 3, 28, 28)
    compiled.eval()
    torch.testing.assert_close(compiled(pixels).logits, dinov2().eval()(pixels).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", first_is_quick(list(FACTORIES)))
def test_loss_and_gradients_are_the_base_models(name: str) -> None:
    """B starts at zero, so that its gradient is that of the base's own weight, seen through A."""
    base = without_dropout(FACTORIES[name]()).train()
    given = batch(base)
    example = given if isinstance(base, hf.WhisperForConditionalGeneration) else None
    expected = base(**given).loss
    expected.backward()
    found = {}
    for logits in (True, False):
        torch.manual_seed(0)
        compiled = peftc.compile(base, SPEC, example=example).train()
        compiled.logits_in_training = logits
        loss = compiled(**given).loss
        torch.testing.assert_close(loss, expected, rtol=NEAR, atol=NEAR)
        loss.backward()
        for binding in compiled.plan.bindings:
            site = binding.site
            if not isinstance(site, Linear):
                continue
            gradient = dict(base.named_parameters(remove_duplicate=False))[site.weight].grad
            a, b = (compiled.get_parameter(binding.names[part]) for part in ("A", "B"))
            assert gradient is not None
            assert b.grad is not None
            whole = gradient.t() if site.transposed else gradient
            rows = whole if site.rows is None else whole[list(site.rows)]
            torch.testing.assert_close(b.grad, rows @ a.detach().t(), rtol=1e-3, atol=NEAR)
            found[logits, site.name] = b.grad
    assert found or not any(isinstance(binding.site, Linear) for binding in compiled.plan.bindings)
