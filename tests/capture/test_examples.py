"""Examples that are made for what models see and hear, and graphs of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Siglip2Config,
    Siglip2ForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import peftc
from peftc.capture.examples.known import known
from peftc.capture.inputs import example_inputs

SMALL: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = "apply lora(r=4) to linear"
IMAGE = 90


def vision(**more: Any) -> dict[str, Any]:
    return {**SMALL, "image_size": 16, "patch_size": 8, **more}


def clip() -> PreTrainedModel:
    torch.manual_seed(0)
    model = CLIPForImageClassification(CLIPConfig(vision_config=vision(), text_config=SMALL))
    return cast(PreTrainedModel, model.eval())


def siglip() -> PreTrainedModel:
    torch.manual_seed(0)
    patches: Any = {**SMALL, "patch_size": 8, "num_patches": 16}
    model = Siglip2ForImageClassification(Siglip2Config(vision_config=patches, text_config=SMALL))
    return cast(PreTrainedModel, model.eval())


def heard(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    strides: Any = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (40, 8), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(**SMALL, **strides, vocab_size=20, pad_token_id=0,
                            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0)  # fmt: skip
    return cast(PreTrainedModel, kind(config).eval())


def whisper() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: Any = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(vocab_size=60, num_mel_bins=10, max_source_positions=12, d_model=32, encoder_ffn_dim=48,
                           decoder_ffn_dim=48, **sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3,
                           decoder_start_token_id=2)  # fmt: skip
    return cast(PreTrainedModel, WhisperForConditionalGeneration(config).eval())


def text(**more: Any) -> dict[str, Any]:
    return {**SMALL, "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, **more}


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    parts: Any = {
        "text_config": LlamaConfig(**text()),
        "vision_config": {"model_type": "clip_vision_model", **vision()},
    }
    config = LlavaConfig(**parts, image_token_index=IMAGE, vision_feature_layer=-1)
    return cast(PreTrainedModel, LlavaForConditionalGeneration(config).eval())


def qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(text_config=text(rope_parameters=rope), vision_config=tower, image_token_id=IMAGE,
                           video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)  # fmt: skip
    return cast(PreTrainedModel, Qwen2VLForConditionalGeneration(config).eval())


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in example_inputs(model).kwargs.items()}


def agrees(compiled: Any, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        found, wanted = compiled(**given), model(**given)
    assert found.logits.shape == wanted.logits.shape
    assert torch.allclose(found.logits, wanted.logits, atol=1e-5)
    assert torch.allclose(found.loss, wanted.loss, atol=1e-5)


def test_sizes_are_read_where_a_configuration_keeps_them() -> None:
    assert shapes(clip()) == {"pixel_values": (2, 3, 16, 16), "labels": (2,)}


def test_patches_come_with_a_mask_and_their_grid_is_a_constant() -> None:
    example = example_inputs(siglip())
    assert example.kwargs["pixel_values"].shape == (2, 16, 192)
    assert example.kwargs["pixel_attention_mask"].shape == (2, 16)
    assert example.constants["spatial_shapes"].tolist() == [[4, 4], [4, 4]]


def test_a_sound_has_a_label_a_row() -> None:
    assert shapes(heard(Wav2Vec2ForSequenceClassification)) == {"input_values": (2, 16000), "labels": (2,)}


@pytest.mark.slow
def test_what_is_said_is_compiled_without_its_loss() -> None:
    """A CTC loss goes by the numbers of its labels."""
    model = heard(Wav2Vec2ForCTC)
    assert shapes(model) == {"input_values": (2, 16000)}
    compiled = peftc.compile(model, LORA).eval()
    waves = torch.randn(3, 16000)
    with torch.no_grad():
        assert torch.allclose(compiled(input_values=waves).logits, model(waves).logits, atol=1e-5)


def test_frames_are_as_many_as_an_encoder_has_positions_for() -> None:
    assert shapes(whisper()) == {"input_features": (2, 10, 24), "labels": (2, 9)}


def test_as_many_tokens_as_the_model_makes_of_an_image() -> None:
    example = example_inputs(llava())
    assert example.kwargs["pixel_values"].shape == (2, 3, 16, 16)
    assert (example.kwargs["input_ids"] == IMAGE).sum(1).tolist() == [4, 4]


def test_patches_in_a_row_have_positions_of_rows_and_columns() -> None:
    model = qwen()
    example = example_inputs(model)
    grid = example.constants["image_grid_thw"]
    tokens = example.kwargs["input_ids"]
    assert example.kwargs["pixel_values"].shape[0] == grid.prod(1).sum()
    assert (tokens == IMAGE).sum() == grid.prod(1).sum() // 4
    kinds = (tokens == IMAGE).int()
    assert torch.equal(example.kwargs["position_ids"], model.model.get_rope_index(tokens, kinds, grid)[0])
    assert "mm_token_type_ids" not in example.kwargs


def test_a_decoder_is_given_its_tokens_where_it_does_not_make_them_of_labels() -> None:
    config = FSMTConfig(
        d_model=16, src_vocab_size=40, tgt_vocab_size=40, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, langs=["en", "de"],
    )  # fmt: skip
    model = FSMTForConditionalGeneration(config)
    given = example_inputs(model).kwargs
    assert given["decoder_input_ids"].shape == given["labels"].shape != given["input_ids"].shape


def test_what_was_tried_is_said() -> None:
    class Deaf(Wav2Vec2ForSequenceClassification):
        def forward(self, input_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            raise ValueError("only whispers")

    with pytest.raises(peftc.PeftcError, match=r"input_values \[2, 16000\]: ValueError: only whispers") as caught:
        example_inputs(heard(Deaf))
    assert caught.value.diagnostics[0].code == "needs-example"


def test_what_the_user_gives_is_taken() -> None:
    example = example_inputs(
        siglip(), {"pixel_values": torch.ones(3, 4, 192), "spatial_shapes": torch.tensor([[2, 2]] * 3)}
    )
    assert example.kwargs.keys() == {"pixel_values"}
    assert example.constants["spatial_shapes"].tolist() == [[2, 2]] * 3


def test_numbers_that_are_constants_are_computed_with() -> None:
    sizes = torch.tensor([2, 3])

    class Cut(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
            parts = x.split((ends[1:] - ends[:-1]).tolist())
            return torch.cat([part.sum(0, keepdim=True) for part in parts])

    x = torch.randn(5, 2)
    with known({"sizes": sizes}):
        program = torch.export.export(Cut(), (x,), strict=False)
    assert torch.allclose(program.module()(x), Cut()(x))


def test_a_constant_is_not_written_behind_a_graph() -> None:
    sizes = torch.tensor([2.0, 3.0])

    class Written(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = sizes * 1
            y = x * own
            own.mul_(2)
            return y

    with known({"sizes": sizes}), pytest.raises(RuntimeError, match="written after it was used"):
        torch.export.export(Written(), (torch.randn(2),), strict=False)


@pytest.mark.parametrize("make", [clip, whisper])
def test_a_graph_of_what_is_seen_or_heard(make: Any) -> None:
    model = make()
    compiled = peftc.compile(model, LORA).eval()
    given = example_inputs(model).kwargs
    agrees(compiled, model, {name: torch.cat([value, value[:1]]) for name, value in given.items()})


def test_another_grid_has_a_graph_of_its_own(tmp_path: Path) -> None:
    model = siglip()
    compiled = peftc.compile(model, LORA).eval()
    labels = torch.tensor([1, 0])
    for rows, columns in ((4, 4), (2, 4)):
        pixels = torch.randn(2, rows * columns, 192)
        sizes = {"spatial_shapes": torch.tensor([[rows, columns]] * 2)}
        mask = {"pixel_attention_mask": torch.ones(2, rows * columns, dtype=torch.long)}
        agrees(compiled, model, {"pixel_values": pixels, **mask, **sizes, "labels": labels})
    with pytest.raises(TypeError, match="needs spatial_shapes"):
        compiled(pixel_values=torch.randn(2, 16, 192), pixel_attention_mask=torch.ones(2, 16, dtype=torch.long))
    compiled.save(tmp_path)
    again = peftc.load(tmp_path, siglip()).eval()
    assert again.plan.captured.example.constants["spatial_shapes"].tolist() == [[4, 4], [4, 4]]


@pytest.mark.slow
def test_a_model_that_sees_and_reads() -> None:
    model = llava()
    compiled = peftc.compile(model, LORA).eval()
    given = example_inputs(model).kwargs
    longer = torch.cat([given["input_ids"], torch.tensor([[5, 6], [7, 8]])], 1)
    texts = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "labels": longer}
    agrees(compiled, model, {**texts, "pixel_values": torch.randn(2, 3, 16, 16)})


@pytest.mark.slow
def test_a_call_as_a_processor_makes_it() -> None:
    model = qwen()
    compiled = peftc.compile(model, LORA).eval()
    for rows in (4, 8):
        image = [IMAGE] * (rows * rows // 4)
        tokens = torch.tensor([[5, 92, *image, 93, 7, 8], [6, 92, *image, 93, 9, 8]])
        given = {
            "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens,
            "mm_token_type_ids": (tokens == IMAGE).int(), "image_grid_thw": torch.tensor([[1, rows, rows]] * 2),
            "pixel_values": torch.randn(2 * rows * rows, 96),
        }  # fmt: skip
        agrees(compiled, model, given)
