"""Capture: the graph computes what the model computes, at any size, in training and in evaluation; or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from marks import first_is_quick
from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from tiny import Tagger
from zoo import ZOO, inputs

pytestmark = pytest.mark.captures

FROZEN = "apply lora(r=2) to linear except expert"  # B = 0: an identity


@pytest.mark.parametrize(
    "name", first_is_quick(["gpt2", "t5", "llama", "gemma2", "bloom", "falcon", "bert", "deberta_v2", "vit"])
)
def test_the_compiled_model_computes_what_the_base_does(name: str) -> None:
    """Bit for bit in train mode, dropout included (same seed), and in eval mode, at sizes it was not captured with.

    Only for T5 does torch.export's own program differ from eager, by 1.4e-6 here, before peftc touches it.
    """
    near = 5e-6 if name == "t5" else 0
    model = ZOO[name]()
    compiled = peftc.compile(model, FROZEN, fuse=False)
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


@pytest.mark.parametrize("by_name", [True, False])
def test_one_tensor_for_two_inputs_leaves_them_two(by_name: bool) -> None:
    model, ids = Tagger(), torch.ones(2, 5, dtype=torch.long)
    example = {"input_ids": ids, "labels": ids} if by_name else (ids, ids)
    compiled = peftc.compile(model, FROZEN, example=example)
    tokens, labels = torch.randint(11, (3, 4)), torch.randint(5, (3, 4))
    found, expected = compiled(tokens, labels), model(tokens, labels)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0, atol=1e-6)


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


@pytest.mark.slow
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
    compiled = peftc.compile(model, FROZEN, fuse=False)
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


class Through(nn.Module):
    """A forward given as a function of its one linear layer."""

    def __init__(self, run: Callable[[nn.Linear, torch.Tensor], torch.Tensor], n_in: int = 6, n_out: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(n_in, n_out)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.layer, x)


def written_through_a_view(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    y.unsqueeze(-1).add_(1.0)
    y.reshape(-1).mul_(2.0)
    return y


def test_a_write_through_a_view_is_kept() -> None:
    model = Through(written_through_a_view)
    x = torch.randn(3, 6)
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=x)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def random_in_training(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    return y * (torch.rand(x.shape[0], 1) > 0.5) if layer.training else y


def test_a_branch_on_training_that_draws_numbers_is_refused() -> None:
    """The trace would draw them in eval() too."""
    with pytest.raises(peftc.PeftcError, match="stays-random"):
        peftc.compile(Through(random_in_training), "apply lora(r=2) to linear", example=torch.randn(3, 6))


def test_the_dropout_of_a_recurrent_layer_follows_eval() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 5, num_layers=2, dropout=0.5, batch_first=True)
            self.out = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.out(self.cell(x)[0])
            return result

    model = Recurrent()
    x = torch.randn(2, 4, 6)
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=x)
    model.eval()
    compiled.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)  # a product's sums in another order


def tied_autoencoder(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(layer(x)) @ layer.weight


def test_a_weight_applied_in_two_ways_is_refused() -> None:
    with pytest.raises(peftc.PeftcError, match="applied in two ways"):
        peftc.compile(Through(tied_autoencoder, 6, 4), "apply lora(r=2) to linear", example=torch.randn(3, 6))


def test_scaled_products_are_no_plain_linear_layers() -> None:
    def scaled(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(layer.bias, x, layer.weight, beta=2, alpha=0.5)

    with pytest.raises(peftc.PeftcError, match="no-match"):
        peftc.compile(Through(scaled), "apply lora(r=2) to linear", example=torch.randn(3, 6))


def test_a_weight_without_a_module_of_its_own() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    compiled = peftc.compile(Raw(), "apply lora(r=2) to linear", example=torch.randn(3, 6))
    assert set(compiled.trainable_parameters()) == {"lora_w.A", "lora_w.B"}


@pytest.mark.slow
def test_inside_another_module_state_dicts_keep_to_themselves() -> None:
    compiled = peftc.compile(ZOO["llama"](), "apply lora(r=2) to attn.q")
    whole = nn.ModuleDict({"other": nn.Linear(2, 2), "inner": compiled})
    names = set(whole.state_dict())
    assert {"other.weight", "other.bias"} < names
    assert len(names) == 2 + len(compiled.state_dict())
    assert not whole.load_state_dict(whole.state_dict()).missing_keys
    with pytest.raises(RuntimeError, match=r"lora\.A"):
        whole.load_state_dict({"other.weight": torch.zeros(2, 2), "other.bias": torch.zeros(2)})


@pytest.mark.slow
def test_a_tied_model_loads_its_own_state_without_a_missing_key() -> None:
    compiled = peftc.compile(ZOO["gpt2"](), "apply lora(r=2) to attn.o")
    result = compiled.load_state_dict(compiled.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.slow
def test_a_call_without_labels_sees_new_parameters() -> None:
    compiled = peftc.compile(ZOO["llama"](), "train norm")
    compiled.eval()
    ids = torch.randint(3, 90, (2, 5))
    compiled(ids)
    state = {name: tensor + 1 for name, tensor in compiled.state_dict().items()}
    compiled.load_state_dict(state, assign=True)
    torch.testing.assert_close(compiled(ids).logits, compiled(ids, labels=ids).logits, rtol=0, atol=0)


class _Named(nn.Module):
    """Parts called as what peftc writes down of them: timm's and MPT's `blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.encoder.path = nn.ModuleList([nn.Linear(6, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.get_submodule("encoder.blocks").children():
            x = block(x)
        result: torch.Tensor = self.get_submodule("encoder.path.0")(x)
        return result


def test_parts_may_be_called_anything() -> None:
    torch.manual_seed(0)
    model, x = _Named(), torch.randn(4, 6)
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=x)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)  # a product's sums in another order
