"""What the defaults of a type lack or contradict, so that transformers makes no model of them, or no small one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


EXCEPTIONS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 100} | {f"IMGIMG{_letters(n)}Z": 101 + n for n in range(32)}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "emu3": {"vocabulary_map": {"<image>": 100} | {f"<|visual token {n:06d}|>": 101 + n for n in range(32)}},
    "instructblipvideo": {"video_token_index": 140},
    "pp_formulanet": {"vision_config": {"post_conv_in_channels": 32}},  # what its neck makes
    "qwen2_5_omni_thinker": {"vision_start_token_id": 150, "audio_start_token_id": 151},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 150, "audio_start_token_id": 151},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 0},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},  # a part that has none, and None
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},  # None
    "textnet": {"stem_out_channels": 16},  # what the first stage of 16 takes
    "hgnet_v2": {  # each stage takes what the one before it makes
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 32, 64, 128],
        "stage_mid_channels": [8, 16, 16, 32],
        "stage_out_channels": [32, 64, 128, 256],
        "hidden_sizes": [32, 64, 128, 256],
    },
}


def _states_and_actions(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a robot sees, reads and is; the noise, which the model would draw anew in each call, is given."""
    config: Any = model.config
    size = config.vlm_config.vision_config.image_size
    images = (size // config.vlm_config.vision_config.patch_size) ** 2
    ids = torch.tensor([[config.vlm_config.image_token_id] * images + [5, 6, 7, 8, 9, 10]]).repeat(2, 1)
    actions = (2, config.chunk_size, config.max_action_dim)
    return {
        "state": torch.randn(2, config.max_state_dim),
        "noise": torch.randn(actions),
        "timestep": torch.rand(2),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "actions": torch.randn(actions),
    }


# Inputs of names that transformers has for one type alone, which nobody can guess.
EXAMPLES: dict[str, Callable[[PreTrainedModel], dict[str, Tensor]]] = {"pi0": _states_and_actions}
