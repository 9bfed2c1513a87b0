"""HF PEFT's folders of adapters on convolutions, both ways, on models with convolutions of several kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftc
from hfpeft import NEAR, quietly, shaken, tensors_in
from marks import first_is_quick
from peftc.graph.ir import get_attribute
from subjects import Convolved


class Deep(nn.Module):
    """Three dimensions, one of them by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 6, (3, 1, 5), stride=(1, 2, 1), padding=(1, 0, 2)), nn.Conv1d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x).flatten(2)))


def reflected() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))


def resnet() -> nn.Module:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1], "num_labels": 3}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))


def mobilenet() -> nn.Module:
    sizes: dict[str, Any] = {"depth_multiplier": 0.25, "num_labels": 3, "image_size": 32, "tf_padding": False}
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(**sizes))


def speech() -> nn.Module:
    sizes: dict[str, Any] = {
        "conv_dim": (8, 12),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
    }
    config = hf.Wav2Vec2Config(**sizes, feat_extract_norm="layer")
    encoder = hf.models.wav2vec2.modeling_wav2vec2.Wav2Vec2FeatureEncoder(config)
    encoder._freeze_parameters()
    return encoder


MODELS: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "convolved": (Convolved, (2, 4, 6, 5), ["first", "head"]),
    "grouped": (Convolved, (2, 4, 6, 5), ["first", "grouped"]),
    "deep": (Deep, (2, 3, 4, 4, 5), ["first", "second"]),
    "resnet": (resnet, (2, 3, 32, 32), ["convolution"]),
    "mobilenet": (mobilenet, (2, 3, 32, 32), ["expand_1x1.convolution", "reduce_1x1.convolution"]),
    "speech": (speech, (2, 200), ["conv_layers.0.conv", "conv_layers.1.conv"]),
}
ROWS = [
    ("convolved", peft.LoraConfig(r=4, lora_alpha=6), "lora"),
    ("grouped", peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True), "lora"),
    ("convolved", peft.LoraConfig(r=3, use_dora=True), "dora"),
    ("convolved", peft.LoHaConfig(r=3, alpha=5), "loha"),
    ("grouped", peft.LoHaConfig(r=3, use_effective_conv2d=True), "loha"),
    ("grouped", peft.LoKrConfig(r=1), "lokr"),
    ("grouped", peft.LoKrConfig(r=1, use_effective_conv2d=True, decompose_both=True, decompose_factor=2), "lokr"),
    ("speech", peft.LoraConfig(r=4, lora_bias=True), "lora"),
    ("deep", peft.LoraConfig(r=4), "lora"),
    ("deep", peft.LoraConfig(r=4, use_dora=True), "dora"),
    ("resnet", peft.LoraConfig(r=4, use_dora=True), "dora"),
    ("resnet", peft.LoHaConfig(r=2), "loha"),
    ("mobilenet", peft.LoraConfig(r=2), "lora"),
]
# d loss / d w1_a is made of the other factor's core there; finite differences agree with ours (below).
WRONG_THERE = ("hada_w1_a", "hada_w2_a")


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval(), torch.randn(shape)


def example(base: nn.Module, x: Tensor) -> Any:
    return {base.main_input_name: x} if isinstance(base, hf.PreTrainedModel) else (x,)


def answer(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else torch.as_tensor(found[0])


def gradients(compiled: peftc.CompiledModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for binding in compiled.plan.bindings:
        own = {name: get_attribute(compiled, full).grad for name, full in binding.names.items()}
        tensors = binding.method.to_peft(binding.site, own)[1]
        found |= {f"base_model.model.{binding.site.name}.{name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.parametrize(
    ("name", "config", "method"), first_is_quick(ROWS), ids=lambda it: it if isinstance(it, str) else it.peft_type.value
)
def test_both_ways(name: str, config: Any, method: str, tmp_path: Path) -> None:
    base, x = made(name)
    config = copy.deepcopy(config)
    config.target_modules = {*MODELS[name][2]}
    theirs: Any = shaken(quietly(peft.get_peft_model, copy.deepcopy(base), config))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs", example=example(base, x)).eval()
    assert {binding.method.name for binding in ours.plan.bindings} == {method}
    assert ours.plan.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    first, second = answer(theirs, x), answer(ours, x)
    scale = float(first.detach().abs().max())
    torch.testing.assert_close(second, first, rtol=NEAR, atol=NEAR * scale)
    assert not torch.allclose(first, answer(base, x), rtol=0, atol=1e-4 * scale)
    first.square().mean().backward()
    second.square().mean().backward()
    named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = gradients(ours)
    for key, gradient in found.items():
        expected = named.get(key, named.get(f"{key}.weight"))
        assert expected is not None
        if config.peft_type == "LOHA" and config.use_effective_conv2d and key.endswith(WRONG_THERE):
            continue
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2 * NEAR * float(expected.abs().max()))

    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(answer(again, x), first, rtol=NEAR, atol=NEAR * scale)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert {key: value for key, value in after.items() if key in before}.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_the_gradient_of_a_tucker_form_is_that_of_differences() -> None:
    base, x = made("grouped")
    model = peftc.compile(base.double(), "apply loha(r=2, tucker=true) to conv where groups > 1", example=(x.double(),))
    shaken(model)
    answer(model, x.double()).square().mean().backward()
    for tensor in model.trainable_parameters().values():
        assert tensor.grad is not None
        with torch.no_grad():
            sides = []
            for step in (1e-5, -2e-5):
                tensor.view(-1)[0] += step
                sides.append(float(answer(model, x.double()).square().mean()))
            tensor.view(-1)[0] += 1e-5
        # the error of a central difference is the third derivative times 1e-10
        assert float(tensor.grad.view(-1)[0]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("build", "shape", "config", "spec", "reason"),
    [
        (Convolved, (2, 4, 6, 5), peft.LoraConfig(target_modules=["along"]), "lora", "numbers apart (dilation)"),
        (reflected, (2, 3, 6, 6), peft.LoraConfig(target_modules=["0"]), "lora", "pads with reflect"),
        (Convolved, (2, 4, 6, 5), peft.LoKrConfig(target_modules=["along"], r=9), "lokr(r=9)", "other places"),
    ],
)
def test_what_they_compute_otherwise_is_refused_both_ways(
    build: Any, shape: tuple[int, ...], config: Any, spec: str, reason: str, tmp_path: Path
) -> None:
    base, x = build(), torch.randn(shape)
    (place,) = config.target_modules
    quietly(peft.get_peft_model, copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs", example=(x,))
    assert reason in str(raised.value)
    ours = peftc.compile(base, f'apply {spec} to "{place}"', example=(x,))
    with pytest.raises(peftc.PeftcError) as raised:
        ours.save_pretrained(tmp_path / "ours")
    assert reason in str(raised.value)
    assert raised.value.diagnostics[0].code == "cannot-export"


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("apply lora(r=3) to conv", "refused", "multiple of 2"),
        ("apply lora(init=pissa) to conv", "refused", "kernel"),
        ("apply dora to conv", "refused", "grouped"),
        ("apply gated(lora(r=4)) to conv", "refused", "a convolution"),
        ("apply vera to conv", "wrong-site", "linear layers"),
        ("quantize conv with nf4", "cannot-store", "linear layers"),
    ],
)
def test_what_does_not_go_there_says_why(spec: str, code: str, words: str) -> None:
    base, x = made("grouped")
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(base, spec, example=(x,))
    assert raised.value.diagnostics[0].code == code
    assert words in str(raised.value)


def test_a_grouped_lora_is_not_merged() -> None:
    base, x = made("grouped")
    compiled = peftc.compile(base, "apply lora(r=4) to conv", example=(x,))
    with pytest.raises(peftc.PeftcError, match="reads all channels"):
        compiled.merge()
