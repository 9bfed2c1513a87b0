"""Capture: the graph computes what the model computes, at any size, in training and in evaluation; or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftc
from peftc.capture import capture
from peftc.inputs import example_inputs
from zoo import ZOO, inputs

FROZEN = "apply lora(r=2) to linear except expert"  # B = 0: an identity


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "falcon", "bert", "deberta_v2", "t5", "vit"])
def test_the_compiled_model_computes_what_the_base_does(name: str) -> None:
    """Bit for bit in train mode, dropout included (same seed), and in eval mode, at sizes it was not captured with.

    Only for T5 does torch.export's own program differ from eager, by 1.4e-6 here, before peftc touches it.
    """
    near = 5e-6 if name == "t5" else 0
    model = ZOO[name]()
    compiled = peftc.compile(model, FROZEN)
    batch = inputs(model)
    for training in (True, False):
        model.train(training)
        compiled.train(training)
        torch.manual_seed(1)
        expected = model(**batch)
        torch.manual_seed(1)
        found = compiled(**batch)
        assert type(found) is type(expected)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=near)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=near)


def test_capture_leaves_the_model_as_it_was() -> None:
    model: Any = ZOO["bert"]()
    model.eval()
    model.classifier.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.config.to_dict()
    capture(model, example_inputs(model))
    assert "forward" not in model.__dict__
    assert not model.training
    assert model.classifier.training
    assert model.config.to_dict() == settings
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_frozen_parameters_are_the_models_own_memory() -> None:
    model = ZOO["llama"]()
    compiled = peftc.compile(model, FROZEN)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    frozen = {parameter.data_ptr() for parameter in compiled.parameters() if not parameter.requires_grad}
    assert frozen <= own


def test_tied_weights_stay_one_tensor() -> None:
    model = ZOO["gpt2"]()
    compiled = peftc.compile(model, "train embed, head")
    names = [name for name, parameter in compiled.named_parameters() if parameter.requires_grad]
    assert len(names) == 2  # the tied one and the positions
    compiled(**inputs(model)).loss.backward()
    merged: Any = compiled.merge()
    assert merged.lm_head.weight is merged.transformer.wte.weight


class Net(nn.Module):
    """Convolution, batch norm, dropout, linear: no attention, no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(image)))
        result: torch.Tensor = self.out(self.drop(hidden.mean((2, 3))))
        return result


def test_a_plain_convolutional_net() -> None:
    model = Net()
    assert model.norm.running_mean is not None
    model.norm.running_mean.uniform_()
    compiled = peftc.compile(model, "apply lora(r=2) to linear\ntrain norm, conv", example=torch.randn(1, 3, 8, 8))
    statistics = model.norm.running_mean.clone()
    images = torch.randn(7, 3, 8, 8)
    compiled.train()(images).sum().backward()
    assert torch.equal(model.norm.running_mean, statistics), "a frozen batch norm keeps its statistics"
    assert {name for name, p in compiled.named_parameters() if p.grad is not None} == set(
        compiled.trainable_parameters()
    )
    model.eval()
    compiled.eval()
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "example", [torch.randn(2, 10), (torch.randn(1, 10),), {"x": torch.randn(3, 10)}], ids=["tensor", "tuple", "dict"]
)
def test_a_plain_mlp_takes_its_example_in_any_form(example: object) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layers(x)
            return result

    model = Mlp()
    compiled = peftc.compile(model, 'apply lora(r=2) to "layers.0"', example=example)
    x = torch.randn(5, 10)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(compiled(x=x), model(x), rtol=0, atol=0)


def test_a_plain_module_needs_an_example() -> None:
    with pytest.raises(peftc.PeftcError, match="needs-example"):
        peftc.compile(nn.Linear(3, 4), "apply lora to linear")


class Branching(nn.Module):
    """A branch on a value, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = self.layer(x)
        return x


def test_a_model_that_cannot_be_exported_is_told_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(peftc.PeftcError) as caught:
        peftc.compile(Branching(), "apply lora to linear", example=torch.randn(2, 3))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "cannot-capture"
    assert "if x.sum() > 0:" in str(diagnostic)
    assert "test_capture.py" in str(diagnostic)
    assert "torch.where" in str(diagnostic)
    assert capfd.readouterr().err == "", "torch's own log says it a second time"


def test_calling_conventions() -> None:
    model = ZOO["llama"]()
    compiled = peftc.compile(model, FROZEN)
    ids = torch.randint(3, 90, (3, 5))
    compiled.eval()
    model.eval()
    expected = model(input_ids=ids).logits
    for found in (compiled(ids), compiled(input_ids=ids), compiled(ids, use_cache=False, return_dict=True)):
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="no input pixel_values"):
        compiled(ids, pixel_values=ids)
    with pytest.raises(TypeError, match="needs input_ids"):
        compiled(labels=ids)
    with pytest.raises(TypeError, match="no input output_attentions"):
        compiled(ids, output_attentions=True)
