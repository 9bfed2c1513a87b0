"""Compiled models of other libraries against eager PyTorch: outputs, gradients, merged, saved and read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
import peftc
from dense import LORA, answer, call, differ, expected, in_float64, of_three, outputs, shaken
from foreign import FACTORIES, PACKAGES, images
from marks import first_is_quick
from peftc.graph.ir import get_attribute

ALL = f"apply {LORA} to linear"
NORMS = f"{ALL}\ntrain norm"
PROJECTIONS = f"apply {LORA} to attn.*, mlp.*\ntrain bias"
CONVOLUTIONS = f"apply {LORA} to linear\ntrain conv, norm"

SPECS = {
    "encoder": (NORMS,),
    "lstm": (ALL,),
    "gru": (ALL,),
    "translator": (NORMS, PROJECTIONS),
    "reader": (NORMS, f"apply {LORA} to attn.*, head"),
    "timm_vit": (NORMS, PROJECTIONS),
    "timm_convnext": (CONVOLUTIONS, f"apply {LORA} to mlp.*"),
    "timm_convnext_of_convolutions": (CONVOLUTIONS,),
    "timm_swin": (NORMS, PROJECTIONS),
    "timm_swin_v2": (NORMS,),
    "timm_efficientnet": (CONVOLUTIONS,),
    "torchvision_resnet": (CONVOLUTIONS,),
    "torchvision_vit": (NORMS, PROJECTIONS),
    "torchvision_swin_v2": (NORMS,),
    "torchvision_convnext": (CONVOLUTIONS, PROJECTIONS.replace("attn.*, ", "")),
    "torchvision_mobilenet": (CONVOLUTIONS,),
    "diffusers_unet": (CONVOLUTIONS, PROJECTIONS),
    "diffusers_dit": (ALL, PROJECTIONS),
    "diffusers_sd3": (ALL, PROJECTIONS),
    "diffusers_flux": (NORMS, PROJECTIONS),
    "open_clip": (NORMS, PROJECTIONS),
}
SIZES = {
    "timm_convnext": 96,
    "timm_efficientnet": 64,
    "torchvision_resnet": 64,
    "torchvision_convnext": 64,
    "torchvision_mobilenet": 64,
}


@pytest.fixture(autouse=True)
def one_way_of_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's encoder layers compute in another order in eval() without gradients."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)


def made(name: str) -> tuple[nn.Module, Any]:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    model, given = FACTORIES[name]()
    return in_float64(model.eval(), given)


@pytest.mark.parametrize(("name", "spec"), first_is_quick([(name, spec) for name in SPECS for spec in SPECS[name]]))
def test_it_is_the_eager_model_with_other_weights(name: str, spec: str, tmp_path: Path) -> None:
    base, given = made(name)
    compiled = peftc.compile(base, spec, example=given).eval()
    with torch.no_grad():
        assert differ(outputs(call(compiled, given)), outputs(call(base, given))) < 1e-13
    shaken(compiled)
    three = of_three(given)
    mine, wanted = answer(compiled, three), expected(base, compiled, three)
    assert differ(mine.outputs, wanted.outputs) < 1e-11
    assert mine.gradients.keys() == wanted.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.gradients.values())
    for parameter, gradient in wanted.gradients.items():
        assert float((mine.gradients[parameter] - gradient).abs().max()) < 1e-11 * largest, parameter
    merged = compiled.merge().eval()
    assert type(merged) is type(base)
    compiled.save(tmp_path / "saved")
    loaded = peftc.load(tmp_path / "saved", base).eval()
    with torch.no_grad():
        assert differ(outputs(call(merged, three)), wanted.outputs) < 1e-11
        assert differ(outputs(call(loaded, three)), mine.outputs) == 0


@pytest.mark.parametrize("name", SIZES)
def test_images_of_other_sizes(name: str) -> None:
    base, given = made(name)
    compiled = peftc.compile(base, f"apply {LORA} to linear", example=given).eval()
    with torch.no_grad():
        larger = images(SIZES[name], batch=3).double()
        assert differ(outputs(compiled(larger)), outputs(base(larger))) < 1e-12


@pytest.mark.parametrize("method", ["dora(r=2)", "ia3(on=output)", "loha(r=2)", "vera(r=4)", "far(keep=30%)", "lokr"])
@pytest.mark.parametrize("target", ['"**.multihead_attn.in_proj_weight"', "cross.attn.k"])
def test_methods_on_rows_that_are_multiplied_by_alone(method: str, target: str) -> None:
    """On all rows, of which each product has some; and on some of the rows of one of the products."""
    base, given = made("translator")
    compiled = peftc.compile(base, f"apply {method} to {target}", example=given).eval()
    shaken(compiled)
    with torch.no_grad():
        found = outputs(call(compiled, given))
        assert differ(found, outputs(call(compiled.merge().eval(), given))) < 1e-11
        assert differ(found, outputs(call(base, given))) > 1e-5


ADAPTED = {  # the role, the site, the module whose output is the sublayer's
    "translator": ("mlp", "transformer.encoder.layers.1.mlp", "transformer.encoder.layers.1.linear2"),
    "timm_convnext": ("mlp", "stages.1.blocks.1.mlp", "stages.1.blocks.1.mlp"),
    "timm_swin": ("attn", "layers.1.blocks.0.attn", "layers.1.blocks.0.attn"),
    "torchvision_swin_v2": ("mlp", "features.3.1.mlp", "features.3.1.norm2"),
    "diffusers_unet": ("cross.attn", *["mid_block.attentions.0.transformer_blocks.0.attn2"] * 2),
    "diffusers_dit": ("mlp", "transformer_blocks.1.ff.net", "transformer_blocks.1.ff"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_stands_behind_its_sublayer(name: str) -> None:
    """Over its features, where channels stand in front of an image's grid, too."""
    base, given = made(name)
    role, site, path = ADAPTED[name]
    compiled = peftc.compile(base, f"apply adapter(size=3, activation=gelu) to {role}", example=given).eval()
    shaken(compiled)
    (binding,) = (each for each in compiled.plan.bindings if each.site.name == site)
    state = {part: get_attribute(compiled, full).detach() for part, full in binding.names.items()}

    def beside(_module: nn.Module, _given: Any, h: Tensor) -> Tensor:
        down = F.gelu(F.linear(h, state["down"], state["down_bias"]))
        return h + F.linear(down, state["up"], state["up_bias"])

    with torch.no_grad():
        for other in compiled.plan.bindings:
            for part in ("up", "up_bias") if other is not binding else ():
                get_attribute(compiled, other.names[part]).zero_()
        hook = base.get_submodule(path).register_forward_hook(beside)
        wanted = outputs(call(base, given))
        hook.remove()
        found = outputs(call(compiled, given))
        assert differ(found, wanted) < 1e-11
        assert differ(found, outputs(call(base, given))) > 1e-4


@pytest.mark.slow
def test_the_encoder_of_a_sentence_transformer() -> None:
    """It is compiled by itself, and put back in its place."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(models.minilm_dir()), device="cpu")
    texts = ["A cat sleeps on the sofa.", "Interest rates rose again.", "Hi"]
    before = torch.from_numpy(model.encode(texts))
    compiled = peftc.compile(model[0].model, f"apply {LORA} to attn.q, attn.v")
    model[0].model = compiled
    assert torch.equal(torch.from_numpy(model.encode(texts)), before)
    shaken(compiled)
    moved = torch.from_numpy(model.encode(texts))
    assert differ([moved], [before]) > 1e-2
    model[0].model = compiled.merge()
    assert differ([torch.from_numpy(model.encode(texts))], [moved]) < 1e-4
