"""The loss of a training step is the base model's own, with its logits or without, and so are the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import peftc
from marks import first_is_quick
from peftc.protocol.site import Linear
from zoo import ENCODER, GROUPED, TOKENS, VOCABULARY, WIDE, ZOO, inputs

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


def assert_the_base_models(base: nn.Module, given: dict[str, Tensor], spec: str, example: Any) -> None:
    """Loss and gradients of a training step, with the logits and without.

    B starts at zero, so that its gradient is that of the base's own weight, seen through A.
    """
    expected = base.train()(**given)["loss"]
    expected.backward()
    found = {}
    for logits in (True, False):
        torch.manual_seed(0)
        compiled = peftc.compile(base, spec, example=example).train()
        compiled.logits_in_training = logits
        loss = compiled(**given)["loss"]
        torch.testing.assert_close(loss, expected, rtol=NEAR, atol=NEAR, equal_nan=True)
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
            torch.testing.assert_close(b.grad, rows @ a.detach().t(), rtol=1e-3, atol=NEAR, equal_nan=True)
            found[logits, site.name] = b.grad
    assert found or not any(isinstance(binding.site, Linear) for binding in compiled.plan.bindings)


@pytest.mark.parametrize("name", first_is_quick(list(FACTORIES)))
def test_loss_and_gradients_are_the_base_models(name: str) -> None:
    base = without_dropout(FACTORIES[name]())
    given = batch(base)
    example = given if isinstance(base, hf.WhisperForConditionalGeneration) else None
    assert_the_base_models(base, given, SPEC, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "t5", "mixtral", "gemma2"])
def test_where_every_label_is_ignored(name: str) -> None:
    """The mean over nothing is no number, and has no gradient."""
    base = without_dropout(ZOO[name]())
    given = inputs(base)
    given["labels"] = torch.full_like(given["labels"], -100)
    assert_the_base_models(base, given, SPEC, None)


WORDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
TAGS = torch.tensor([[1, 4, 0, 2, 3, -100, -100], [3, 3, -100, 1, 2, 0, 4]])
SPAN = {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([3, 6])}  # one is past the end
SETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
CHOICES = {name: tensor[:, None].repeat(1, 2, 1) for name, tensor in TEXT.items()}
SEEN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
SEVERAL = "multi_label_classification"
# Class, config, settings, inputs; and whether the inputs that it is compiled with must be given.
TASKS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Tensor], bool]] = {
    "several_classes": (hf.BertForSequenceClassification, hf.BertConfig,
                        {**ENCODER, "num_labels": 3, "problem_type": SEVERAL}, {**TEXT, "labels": SETS}, False),
    "a_number": (hf.BertForSequenceClassification, hf.BertConfig, {**ENCODER, "num_labels": 1},
                 {**TEXT, "labels": torch.tensor([0.3, -1.0])}, False),
    "three_numbers": (hf.BertForSequenceClassification, hf.BertConfig,
                      {**ENCODER, "num_labels": 3, "problem_type": "regression"}, {**TEXT, "labels": SETS}, False),
    "one_ignored": (hf.BertForSequenceClassification, hf.BertConfig, {**ENCODER, "num_labels": 3},
                    {**TEXT, "labels": torch.tensor([2, -100])}, False),
    "tags": (hf.LlamaForTokenClassification, hf.LlamaConfig, {**GROUPED, "num_labels": 5},
             {**TEXT, "labels": TAGS}, False),
    "span": (hf.BertForQuestionAnswering, hf.BertConfig, ENCODER, {**TEXT, **SPAN}, True),
    "choice": (hf.BertForMultipleChoice, hf.BertConfig, ENCODER, {**CHOICES, "labels": torch.tensor([1, 0])}, True),
    "two_losses": (hf.BertForPreTraining, hf.BertConfig, ENCODER,
                   {**TEXT, "labels": TAGS, "next_sentence_label": torch.tensor([1, 0])}, True),
    "images": (hf.ViTForImageClassification, hf.ViTConfig, {**SEEN, "num_labels": 3, "problem_type": SEVERAL},
               {**IMAGES, "labels": SETS}, False),
    "routers": (hf.MixtralForCausalLM, hf.MixtralConfig, {**GROUPED, "num_local_experts": 4, **AUXILIARY},
                {**TEXT, "labels": TAGS}, False),
    "scaled_logits": (hf.CohereForCausalLM, hf.CohereConfig, {**WIDE, "num_key_value_heads": 2, "logit_scale": 0.2},
                      {**TEXT, "labels": TAGS}, False),
}  # fmt: skip


@pytest.mark.parametrize("task", first_is_quick(list(TASKS)))
def test_the_loss_of_other_tasks(task: str) -> None:
    kind, config, settings, given, shown = TASKS[task]
    torch.manual_seed(0)
    base = without_dropout(kind(config(**settings)))
    assert_the_base_models(base, given, "apply lora(r=3, alpha=3) to attn.q, attn.v", given if shown else None)


class Scored(nn.Module):
    """A head over hidden states, and a loss of its own making."""

    weights: Tensor

    def __init__(self, loss: Callable[[Scored, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
        self.second = nn.Linear(8, 13, bias=False)
        self.register_buffer("weights", torch.rand(13) + 0.5)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss, logits = self.loss(self, torch.tanh(self.layer(self.tokens(input_ids))), labels)
        return {"loss": loss, "logits": logits}


def weighted(model: Scored, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.head(hidden)
    return F.cross_entropy(logits.view(-1, 13), labels.view(-1), weight=model.weights), logits


def smoothed(model: Scored, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.head(hidden)
    return F.cross_entropy(logits.view(-1, 13), labels.view(-1), label_smoothing=0.1), logits


def likely(model: Scored, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Against probabilities, not classes."""
    logits = model.head(hidden)
    wanted = F.one_hot(labels.clamp(min=0), 13).float() * 0.9 + 0.1 / 13
    return F.cross_entropy(logits.view(-1, 13), wanted.view(-1, 13)), logits


def by_two(model: Scored, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to a head's logits is another's of each token, and no bias."""
    logits = model.head(hidden) + model.second(model.tokens(labels.clamp(min=0)))
    return F.cross_entropy(logits.view(-1, 13), labels.view(-1)), logits


def across(model: Scored, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes are the second dimension, of five, and not the last."""
    logits = model.head(hidden)
    wanted = (labels.clamp(min=0) % 5).repeat(1, 3)[:, :13]
    return F.cross_entropy(logits.view(-1, 5, 13), wanted), logits


@pytest.mark.parametrize("loss", [weighted, smoothed, likely, by_two, across])
def test_a_loss_that_is_not_the_usual(loss: Callable[[Scored, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    ids, labels = torch.randint(13, (2, 5)), torch.randint(1, 13, (2, 5))
    labels[0, -2:] = -100
    given = {"input_ids": ids, "labels": labels}
    assert_the_base_models(Scored(loss), given, 'apply lora(r=3, alpha=3) to "layer"', given)
