"""Small models of other libraries than transformers, and of torch's own layers, each with an example of its inputs.

No layer that may be wide is as wide as the images are: a search that takes a grid for features shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = dict[str, Any] | tuple[Tensor, ...]
Made = tuple[nn.Module, Example]

FACTORIES: dict[str, Callable[[], Made]] = {}
PACKAGES: dict[str, str] = {}  # the one that a model is from; torch's own are from none


def of(package: str | None = None) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Registers a factory, whose random numbers are the same each time."""

    def register(build: Callable[[], Made]) -> Callable[[], Made]:
        def seeded() -> Made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return build()

        FACTORIES[build.__name__] = seeded
        if package is not None:
            PACKAGES[build.__name__] = package
        return seeded

    return register


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(length: int, count: int = 50) -> Tensor:
    return torch.randint(1, count, (2, length))


# torch's own


class Classifier(nn.Module):
    """Tokens, something over them, and a head."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 16), body, nn.Linear(width, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Any = self.body(self.embed(input_ids))
        return torch.as_tensor(self.head(found[0] if isinstance(found, tuple) else found))


@of()
def encoder() -> Made:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
    return Classifier(nn.TransformerEncoder(layer, 2), 16), (tokens(7),)


@of()
def lstm() -> Made:
    return Classifier(nn.LSTM(16, 12, 2, batch_first=True, dropout=0.1, bidirectional=True), 24), (tokens(7),)


@of()
def gru() -> Made:
    return Classifier(nn.GRU(16, 12, 2, batch_first=True), 12), (tokens(7),)


class Translator(nn.Module):
    """torch's whole transformer: queries, and keys with values, are made by rows of one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, 16), nn.Embedding(40, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 24, batch_first=True, dropout=0.0)
        self.out = nn.Linear(16, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        later = torch.full((target.shape[1], target.shape[1]), float("-inf")).triu(1)
        made = self.transformer(self.source(source), self.target(target), tgt_mask=later, tgt_is_causal=True)
        return torch.as_tensor(self.out(made))


@of()
def translator() -> Made:
    return Translator(), {"source": tokens(7), "target": tokens(6, 40)}


class Reader(nn.Module):
    """Two inputs, three outputs in containers: what it makes of x, and where it looked."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.cross = nn.MultiheadAttention(16, 2, kdim=10, vdim=10, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, memory: Tensor) -> dict[str, Any]:
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        found, weights = self.cross(x, memory, memory)
        return {"logits": self.head(x + found), "seen": (weights, [found])}


@of()
def reader() -> Made:
    return Reader(), {"x": torch.randn(2, 6, 16), "memory": torch.randn(2, 5, 10)}


# timm


@of("timm")
def timm_vit() -> Made:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, num_classes=5), (images(32),)


def convnext(name: str) -> Made:
    import timm

    sizes = {"depths": (1, 2, 1, 1), "dims": (8, 12, 20, 24), "num_classes": 5, "drop_path_rate": 0.2}
    return timm.create_model(name, ls_init_value=0.5, **sizes), (images(64),)


@of("timm")
def timm_convnext() -> Made:
    return convnext("convnext_tiny")


@of("timm")
def timm_convnext_of_convolutions() -> Made:
    return convnext("convnext_atto")


def swin(name: str) -> Made:
    import timm

    sizes = {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (2, 4, 2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model(name, num_classes=5, **sizes), (images(32),)


@of("timm")
def timm_swin() -> Made:
    return swin("swin_tiny_patch4_window7_224")


@of("timm")
def timm_swin_v2() -> Made:
    return swin("swinv2_tiny_window8_256")


@of("timm")
def timm_efficientnet() -> Made:
    import timm

    return timm.create_model("efficientnet_b0", num_classes=5, drop_path_rate=0.1), (images(32),)


# torchvision


@of("torchvision")
def torchvision_resnet() -> Made:
    from torchvision.models import resnet18

    return resnet18(num_classes=5), (images(32),)


@of("torchvision")
def torchvision_vit() -> Made:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=5), (images(32),)


@of("torchvision")
def torchvision_swin_v2() -> Made:
    from torchvision.models import swin_transformer as of_swin

    block, merging = of_swin.SwinTransformerBlockV2, of_swin.PatchMergingV2
    sizes = [[4, 4], 24, [1, 2], [2, 4], [4, 4]]
    return of_swin.SwinTransformer(*sizes, num_classes=5, block=block, downsample_layer=merging), (images(32),)


@of("torchvision")
def torchvision_convnext() -> Made:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=5), (images(40),)


@of("torchvision")
def torchvision_mobilenet() -> Made:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=5, width_mult=0.5), (images(32),)


# diffusers


@of("diffusers")
def diffusers_unet() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5])}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 7, 24)}


@of("diffusers")
def diffusers_dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # of labels, which it drops by hand
            module.dropout_prob = 0.0
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5])}
    return model, {**given, "class_labels": torch.tensor([1, 2])}


@of("diffusers")
def diffusers_sd3() -> Made:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=20, caption_projection_dim=24, pooled_projection_dim=28, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 20)}
    return model, {**given, "pooled_projections": torch.randn(2, 28), "timestep": torch.tensor([3.0, 5.0])}


@of("diffusers")
def diffusers_flux() -> Made:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=28, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 9, 4), "encoder_hidden_states": torch.randn(2, 7, 20)}
    ids = {"img_ids": torch.randn(9, 3), "txt_ids": torch.zeros(7, 3)}
    return model, {**given, **ids, "pooled_projections": torch.randn(2, 28), "timestep": torch.tensor([0.3, 0.5])}


# open_clip


@of("open_clip")
def open_clip() -> Made:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=24, head_width=8, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=9, vocab_size=50, width=24, heads=3, layers=2)
    return CLIP(20, vision, text), {"image": images(32), "text": tokens(9)}
