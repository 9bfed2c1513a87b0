"""Tiny models of every architecture the compiler is tested on, and where their sites are.

The tables below were written from the modelling code: they are the tests' oracle, and the only place of the
project that knows an architecture's module names. `test_sites.py` also checks their rows by experiment.

Shapes are chosen so that swapped features or a wrong split show: where a config allows it, the heads together
are 48 wide on a hidden size of 32, keys and values have fewer heads than queries, the MLP is 48 or 80 wide.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCABULARY = 97
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
GROUPED = {**WIDE, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 12}
ROUTED = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}
ENCODER = {**WIDE, "max_position_embeddings": 64}
DEBERTA = {
    **ENCODER,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "problem_type": "single_label_classification",
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
BART = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def _seeded(model: Any, config: Any, **settings: Any) -> Callable[[], PreTrainedModel]:
    """A factory of `model(config(**settings))` with seed 0; the caller's random state stays as it was."""

    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built: PreTrainedModel = model(config(**settings))
            built.float()
            return built

    return build


ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _seeded(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED),
    "mistral": _seeded(hf.MistralForCausalLM, hf.MistralConfig, **GROUPED, sliding_window=4),
    "qwen2": _seeded(hf.Qwen2ForCausalLM, hf.Qwen2Config, **GROUPED),
    "qwen3": _seeded(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED),
    "gemma2": _seeded(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GROUPED, sliding_window=4),
    "gemma3": _seeded(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        **GROUPED,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": _seeded(hf.PhiForCausalLM, hf.PhiConfig, **GROUPED),
    "phi3": _seeded(hf.Phi3ForCausalLM, hf.Phi3Config, **GROUPED),
    "gpt2": _seeded(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        **TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        n_positions=64,
    ),
    "gpt_neox": _seeded(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **WIDE),
    "opt": _seeded(
        hf.OPTForCausalLM,
        hf.OPTConfig,
        **{**SIZES, "pad_token_id": 1, "bos_token_id": 2},
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "bloom": _seeded(hf.BloomForCausalLM, hf.BloomConfig, **TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _seeded(hf.FalconForCausalLM, hf.FalconConfig, **SIZES, ffn_hidden_size=48),
    "falcon_new": _seeded(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        **SIZES,
        ffn_hidden_size=48,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "mixtral": _seeded(hf.MixtralForCausalLM, hf.MixtralConfig, **GROUPED, num_local_experts=4),
    # a dense expert beside the stacked ones, with a gate of its own
    "qwen2_moe": _seeded(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        **{**WIDE, "num_key_value_heads": 2},
        **ROUTED,
        shared_expert_intermediate_size=48,
    ),
    "qwen3_moe": _seeded(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, **GROUPED, **ROUTED),
    # queries, keys and values are two linear layers behind their common input; keys are written in parts
    "deepseek_v3": _seeded(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        **WIDE,
        q_lora_rank=20,
        kv_lora_rank=28,
        qk_nope_head_dim=12,
        qk_rope_head_dim=4,
        v_head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
    ),
    # stored transposed, with biases, gate and up interleaved
    "gpt_oss": _seeded(hf.GptOssForCausalLM, hf.GptOssConfig, **GROUPED, num_local_experts=4, sliding_window=4),
    # every expert computes every token, and the router's weights make most of it zero
    "llama4": _seeded(
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=1,
    ),
    "bert": _seeded(hf.BertForSequenceClassification, hf.BertConfig, **ENCODER),
    "roberta": _seeded(hf.RobertaForMaskedLM, hf.RobertaConfig, **ENCODER),
    "distilbert": _seeded(
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        **TOKENS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
    ),
    "deberta_v2": _seeded(hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, **DEBERTA, share_att_key=True),
    "deberta_v2_unshared": _seeded(
        hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, **DEBERTA, share_att_key=False
    ),
    "modernbert": _seeded(
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        **{**WIDE, "intermediate_size": 80},
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
    "t5": _seeded(hf.T5ForConditionalGeneration, hf.T5Config, **T5),
    "t5_gated": _seeded(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        **T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bart": _seeded(hf.BartForConditionalGeneration, hf.BartConfig, **BART),
    "vit": _seeded(
        hf.ViTForImageClassification,
        hf.ViTConfig,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=3,
    ),
}


def inputs(model: Any, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Random arguments of the model's forward, labels included (9 of them for an encoder-decoder model)."""
    name = type(model).__name__
    random = torch.Generator().manual_seed(1)

    def tokens(columns: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (batch, columns), generator=random)

    if "Image" in name:
        pixels = torch.randn(batch, 3, 32, 32, generator=random)
        return {"pixel_values": pixels, "labels": torch.arange(batch) % 3}
    ids = tokens(length)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "SequenceClassification" in name:
        return {**arguments, "labels": torch.arange(batch) % 2}
    return {**arguments, "labels": tokens(9 if model.config.is_encoder_decoder else length)}


Roles = dict[str, list[str]]


def _attention(block: str, q: str, k: str, v: str, o: str, kind: str = "self") -> Roles:
    """Both roles of each projection: `attn.q`, and `self.attn.q` or `cross.attn.q`."""
    modules = {"attn.q": q, "attn.k": k, "attn.v": v, "attn.o": o}
    plain = {role: [f"{block}.{module}"] for role, module in modules.items()}
    return plain | {f"{kind}.{role}": names for role, names in plain.items()}


def _mlp(block: str, up: str, down: str, gate: str | None = None) -> Roles:
    roles = {"mlp.up": [f"{block}.{up}"], "mlp.down": [f"{block}.{down}"]}
    return roles if gate is None else roles | {"mlp.gate": [f"{block}.{gate}"]}


def _union(*parts: Roles) -> Roles:
    roles: Roles = {}
    for part in parts:
        for role, names in part.items():
            roles[role] = roles.get(role, []) + names
    return roles


def _llama(block: str = "model.layers.0") -> Roles:
    return _union(
        _attention(f"{block}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        _mlp(f"{block}.mlp", "up_proj", "down_proj", "gate_proj"),
    )


def _moe(mlp: str = "mlp", shared: str | None = None) -> Roles:
    block = "model.layers.0"
    return _union(
        _attention(f"{block}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        _mlp(f"{block}.{mlp}.experts", "gate_up_proj[up]", "down_proj", "gate_up_proj[gate]"),
        _mlp(f"{block}.{mlp}.{shared}", "up_proj", "down_proj", "gate_proj") if shared else {},
    )


def _fused(block: str, qkv: str, o: str) -> Roles:
    """An attention whose query, key and value are slices of one weight."""
    return _attention(block, f"{qkv}[q]", f"{qkv}[k]", f"{qkv}[v]", o)


def _neox(block: str, attention: str) -> Roles:
    return _union(
        _fused(f"{block}.{attention}", "query_key_value", "dense"),
        _mlp(f"{block}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    )


def _bert(block: str, query: str = "query", key: str = "key", value: str = "value") -> Roles:
    return _union(
        _attention(f"{block}.attention", f"self.{query}", f"self.{key}", f"self.{value}", "output.dense"),
        _mlp(block, "intermediate.dense", "output.dense"),
    )


def _bart(block: str, *, cross: bool = False) -> Roles:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    parts = [_attention(f"{block}.self_attn", *names), _mlp(block, "fc1", "fc2")]
    if cross:
        parts.append(_attention(f"{block}.encoder_attn", *names, kind="cross"))
    return _union(*parts)


def _t5(*, gated: bool) -> Roles:
    encoder, decoder = "encoder.block.0.layer", "decoder.block.0.layer"
    mlp = ("wi_1", "wo", "wi_0") if gated else ("wi", "wo")
    return _union(
        _attention(f"{encoder}.0.SelfAttention", "q", "k", "v", "o"),
        _mlp(f"{encoder}.1.DenseReluDense", *mlp),
        _attention(f"{decoder}.0.SelfAttention", "q", "k", "v", "o"),
        _attention(f"{decoder}.1.EncDecAttention", "q", "k", "v", "o", kind="cross"),
        _mlp(f"{decoder}.2.DenseReluDense", *mlp),
    )


EXPECTED: dict[str, Roles] = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma2": _llama(),
    "gemma3": _llama(),
    "phi": _union(
        _attention("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        _mlp("model.layers.0.mlp", "fc1", "fc2"),
    ),
    "phi3": _union(
        _fused("model.layers.0.self_attn", "qkv_proj", "o_proj"),
        _mlp("model.layers.0.mlp", "gate_up_proj[up]", "down_proj", "gate_up_proj[gate]"),
    ),
    "gpt2": _union(
        _fused("transformer.h.0.attn", "c_attn", "c_proj"),
        _mlp("transformer.h.0.mlp", "c_fc", "c_proj"),
    ),
    "gpt_neox": _neox("gpt_neox.layers.0", "attention"),
    "opt": _bart("model.decoder.layers.0"),
    "bloom": _neox("transformer.h.0", "self_attention"),
    "falcon": _neox("transformer.h.0", "self_attention"),
    "falcon_new": _neox("transformer.h.0", "self_attention"),
    "mixtral": _moe(),
    "qwen2_moe": _moe(shared="shared_expert"),
    "qwen3_moe": _moe(),
    "deepseek_v3": _union(
        _attention("model.layers.0.self_attn", "q_b_proj", "kv_b_proj[k]", "kv_b_proj[v]", "o_proj"),
        _mlp("model.layers.0.mlp.experts", "gate_up_proj[up]", "down_proj", "gate_up_proj[gate]"),
        _mlp("model.layers.0.mlp.shared_experts", "up_proj", "down_proj", "gate_proj"),
    ),
    "gpt_oss": _moe(),
    "llama4": _moe("feed_forward", shared="shared_expert"),
    "bert": _bert("bert.encoder.layer.0"),
    "roberta": _bert("roberta.encoder.layer.0"),
    "distilbert": _union(
        _attention("distilbert.transformer.layer.0.attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        _mlp("distilbert.transformer.layer.0.ffn", "lin1", "lin2"),
    ),
    "deberta_v2": _bert("deberta.encoder.layer.0", "query_proj", "key_proj", "value_proj"),
    # pos_query_proj and pos_key_proj project relative positions, not tokens: linears with no attention role
    "deberta_v2_unshared": _bert("deberta.encoder.layer.0", "query_proj", "key_proj", "value_proj"),
    # ModernBERT's forward calls the half it does *not* activate "gate"; the role follows the activation
    "modernbert": _union(
        _fused("model.layers.0.attn", "Wqkv", "Wo"),
        _mlp("model.layers.0.mlp", "Wi[up]", "Wo", "Wi[gate]"),
    ),
    "t5": _t5(gated=False),
    "t5_gated": _t5(gated=True),
    "bart": _union(_bart("model.encoder.layers.0"), _bart("model.decoder.layers.0", cross=True)),
    "vit": _union(
        _attention("vit.layers.0.attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        _mlp("vit.layers.0.mlp", "fc1", "fc2"),
    ),
}


def _slices(weight: str, **parts: Iterable[int]) -> dict[str, list[int]]:
    return {f"{weight}[{part}]": list(rows) for part, rows in parts.items()}


def _interleaved(weight: str, heads: int, width: int, queries: int = 1) -> dict[str, list[int]]:
    """Rows of a weight that holds, `heads` times over, `queries` query heads, one key and one value head."""
    size = (queries + 2) * width
    starts = range(0, heads * size, size)

    def rows(first: int, last: int) -> list[int]:
        return [start + row for start in starts for row in range(first * width, last * width)]

    return _slices(weight, q=rows(0, queries), k=rows(queries, queries + 1), v=rows(queries + 1, queries + 2))


# Output features of the fused weight that are the site's, ascending; for stacked experts, within each expert.
FUSED_ROWS: dict[str, dict[str, list[int]]] = {
    "phi3": {
        **_slices("model.layers.0.self_attn.qkv_proj", q=range(48), k=range(48, 72), v=range(72, 96)),
        **_slices("model.layers.0.mlp.gate_up_proj", gate=range(80), up=range(80, 160)),
    },
    "gpt2": _slices("transformer.h.0.attn.c_attn", q=range(32), k=range(32, 64), v=range(64, 96)),
    "gpt_neox": _interleaved("gpt_neox.layers.0.attention.query_key_value", heads=4, width=8),
    "bloom": _interleaved("transformer.h.0.self_attention.query_key_value", heads=4, width=8),
    "falcon": _interleaved("transformer.h.0.self_attention.query_key_value", heads=1, width=8, queries=4),
    "falcon_new": _interleaved("transformer.h.0.self_attention.query_key_value", heads=2, width=8, queries=2),
    "mixtral": _slices("model.layers.0.mlp.experts.gate_up_proj", gate=range(80), up=range(80, 160)),
    "qwen2_moe": _slices("model.layers.0.mlp.experts.gate_up_proj", gate=range(24), up=range(24, 48)),
    "qwen3_moe": _slices("model.layers.0.mlp.experts.gate_up_proj", gate=range(24), up=range(24, 48)),
    "deepseek_v3": {
        **_slices("model.layers.0.mlp.experts.gate_up_proj", gate=range(24), up=range(24, 48)),
        **_slices(
            "model.layers.0.self_attn.kv_b_proj",
            k=[row for row in range(80) if row % 20 < 12],
            v=[row for row in range(80) if row % 20 >= 12],
        ),
    },
    "gpt_oss": _slices("model.layers.0.mlp.experts.gate_up_proj", gate=range(0, 160, 2), up=range(1, 160, 2)),
    "llama4": _slices("model.layers.0.feed_forward.experts.gate_up_proj", gate=range(80), up=range(80, 160)),
    "modernbert": {
        **_slices("model.layers.0.attn.Wqkv", q=range(32), k=range(32, 64), v=range(64, 96)),
        **_slices("model.layers.0.mlp.Wi", gate=range(80), up=range(80, 160)),
    },
}
