"""A tiny model with random weights of any type that transformers knows, by looking at its configuration.

Sizes are told by the words in their names (layers, heads, vocab, …), widths are divided alike, and every group of
changes is tried: one that leaves a model that cannot be built or run is left out. There is no list of types.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sweep.exceptions import EXCEPTIONS

HEADS = {
    "causal": "CAUSAL_LM",
    "masked": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image": "IMAGE_CLASSIFICATION",
    "audio": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech": "SPEECH_SEQ_2_SEQ",
    "image-text": "IMAGE_TEXT_TO_TEXT",
}
LAYERS, WIDTH, INNER, HEAD_COUNT, HEAD_WIDTH, EXPERTS, VOCABULARY, POSITIONS = 2, 32, 48, 4, 8, 4, 160, 128
MOST_PARAMETERS = 40_000_000

Rule = Callable[[str, int], int | None]


class NotBuilt(Exception):
    """transformers itself makes no model of this type that runs here."""


def types_of(head: str) -> dict[str, Any]:
    """The model types of a head -> the class's name, as the installed transformers has them."""
    names: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{HEADS[head]}_MAPPING_NAMES")
    return dict(names)


def class_of(head: str, kind: str) -> type[PreTrainedModel]:
    """The model class of a type under a head."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{HEADS[head]}_MAPPING")
    found = mapping[CONFIG_MAPPING[kind]]
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def tiny_model(head: str, kind: str, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A model in evaluation mode, drawn with seed 0; `options` are values of its configuration to have besides.

    Raises:
        NotBuilt: with what transformers said.
    """
    try:
        model_class, config_class = class_of(head, kind), CONFIG_MAPPING[kind]
    except Exception as error:
        raise NotBuilt(_told(error)) from error
    if isinstance(own := model_class.config_class, type) and own is not config_class:
        config_class = own  # the part of a configuration that this class is of
    wanted = _merged(EXCEPTIONS.get(kind, {}), options or {})
    if head == "causal" and "is_decoder" in inspect.signature(config_class.__init__).parameters:
        wanted.setdefault("is_decoder", True)
    config = _shrunk(config_class, model_class, wanted)
    torch.manual_seed(0)
    try:
        model: PreTrainedModel = model_class(config).eval()
    except Exception as error:
        raise NotBuilt(_told(error)) from error
    _spread(model)
    return model


def _spread(model: PreTrainedModel) -> None:
    """What begins at nothing, or so small that attention is even, would hide what is wrong behind it."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
                noise *= 0.7 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
                parameter.add_(noise)
                if not parameter.isfinite().all():  # torch.empty, which the model leaves to a checkpoint
                    parameter.copy_(noise)


def _shrunk(config_class: Any, model_class: Any, options: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration with all changes that it can bear."""
    try:
        whole = config_class()
    except Exception:
        whole = None  # its defaults contradict themselves; a smaller one may not
    groups = [_layers, _sizes, _vocabulary, _positions, _images, _experts, _quiet, _unset]
    accepted: dict[str, Any] = dict(options)
    changes = [_changes(config_class, whole, group) for group in groups]
    attempts = [_merged(*changes[:-1], accepted), _merged(*changes, accepted)]
    attempts += [_without(attempts[0], path) for path, _ in _leaves(attempts[0])]
    for everything in attempts:
        if _runs(config_class, model_class, everything):
            config: PretrainedConfig = config_class(**everything)
            return _small(model_class, config)
    for change in changes:  # what cannot be borne together: one after another, then name by name
        if _runs(config_class, model_class, tried := _merged(accepted, change, options)):
            accepted = tried
            continue
        for path, value in _leaves(change):
            if _runs(config_class, model_class, tried := _merged(accepted, _nested(path, value), options)):
                accepted = tried
    try:
        config = config_class(**accepted)
    except Exception as error:
        raise NotBuilt(_told(error)) from error
    return _small(model_class, config)


def _small(model_class: Any, config: PretrainedConfig) -> PretrainedConfig:
    count = _count(model_class, config)
    if count is None or count > MOST_PARAMETERS:
        raise NotBuilt(f"is not made small: {count} parameters")
    return config


def _count(model_class: Any, config: Any) -> int | None:
    try:
        with torch.device("meta"):
            return sum(int(p.numel()) for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        return None


def _runs(config_class: Any, model_class: Any, changes: Mapping[str, Any]) -> bool:
    try:
        config = config_class(**copy.deepcopy(dict(changes)))
    except Exception:
        return False
    return _count(model_class, config) is not None


# ---- Configurations ------------------------------------------------------------------------------------------------


def _changes(config_class: Any, whole: Any, group: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a group of rules changes, in a configuration and in those inside it, as nested dicts."""
    if whole is None:
        return {}
    found = group(whole)
    takes = set(inspect.signature(config_class.__init__).parameters)
    found = {name: value for name, value in found.items() if name in takes}
    for name, inner in vars(whole).items():
        if isinstance(inner, PretrainedConfig) and (nested := _changes(type(inner), inner, group)):
            found[name] = {"model_type": inner.model_type, **nested} if inner.model_type else nested
    return found


def _merged(*changes: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for change in changes:
        for name, value in change.items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), dict)
            result[name] = _merged(result[name], value) if both else value
    return result


def _leaves(change: Mapping[str, Any], path: Sequence[str] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in change.items():
        if isinstance(value, Mapping) and name.endswith("config"):
            found += _leaves(value, (*path, name))
        elif name != "model_type":
            found.append(((*path, name), value))
    return found


def _without(change: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    return {
        name: _without(value, rest) if rest and name == first else value
        for name, value in change.items()
        if rest or name != first
    }


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    result: dict[str, Any] = value
    return result


def _whole_numbers(config: Any) -> dict[str, int]:
    return {name: value for name, value in vars(config).items() if type(value) is int}


def _lists(config: Any) -> dict[str, list[Any]]:
    return {name: list(value) for name, value in vars(config).items() if isinstance(value, list | tuple) and value}


def _layers(config: Any) -> dict[str, Any]:
    """Two layers, or one of each kind that the configuration tells apart."""
    found: dict[str, Any] = {}
    deep = re.compile(r"(^|_)(n_layers?|num_layers|layers|num_hidden_layers|depth|num_blocks)$|_layers$|_num_layers$")
    counts = {name: value for name, value in _whole_numbers(config).items() if deep.search(name) and value > LAYERS}
    kinds = {name: value for name, value in _lists(config).items() if value and len(value) in counts.values()}
    by_layer = {name: value for name, value in kinds.items() if re.search("type|kind|layer|pattern|mlp", name)}
    for name, value in counts.items():
        mine = [own for own in by_layer.values() if len(own) == value]
        keep = _one_of_each(mine) if mine else list(range(LAYERS))
        found[name] = len(keep)
        found |= {other: [own[i] for i in keep] for other, own in by_layer.items() if len(own) == value}
    for name, stages in _lists(config).items():
        if re.search("depths|num_block|stage_num|block_repeats", name) and all(type(n) is int for n in stages):
            found[name] = [min(n, LAYERS) for n in stages]
    return found


def _one_of_each(kinds: Sequence[Sequence[Any]]) -> list[int]:
    """The first layer of every combination of kinds, at least two layers and at most four."""
    seen: dict[str, int] = {}
    for place, combination in enumerate(zip(*kinds, strict=True)):
        seen.setdefault(repr(combination), place)
    places = sorted(seen.values())[:4]
    return places if len(places) >= LAYERS else list(range(LAYERS))


SIZES: tuple[tuple[str, Rule], ...] = (
    (r"key_value_heads|kv_heads|num_kv|multi_query_group", lambda _name, _old: HEAD_COUNT // 2),
    (r"(^|_)(num_)?key_heads$|num_k_heads", lambda _name, _old: 2),
    (r"(?<!dim_)heads?$|_heads_|n_head", lambda _name, old: HEAD_COUNT if old > HEAD_COUNT else None),
    (r"rotary_dim$", lambda _name, _old: HEAD_WIDTH),
    (r"head_dim|head_size|d_kv$|d_head|kv_channels|index_head_dim|v_head", lambda _name, _old: HEAD_WIDTH),
    (r"lora_rank|_rank$|time_step_rank|dt_rank", lambda _name, old: 16 if old > 16 else None),
    (r"intermediate|ffn|d_ff|mlp_dim|inner|ff_dim|feed_?forward", lambda _name, old: INNER if old > INNER else None),
    (
        r"adapter_input|hidden|embd|embed|d_model|(^|_)dim$|width|_size_per_layer|proj|channels|units|features|d_rel",
        lambda _name, old: WIDTH if old > WIDTH else None,
    ),
    (r"state_size|d_state|ssm", lambda _name, old: 8 if old > 8 else None),
)  # fmt: skip
NO_SIZE = re.compile(
    r"num_channels|in_channels|token|kernel|stride|window|layers|max_|vocab|chunk|index$|_id$|image_size|patch"
)


def _sizes(config: Any) -> dict[str, Any]:
    """Widths, heads and what lies between them."""
    found: dict[str, Any] = {}
    numbers = _whole_numbers(config)
    expand = numbers.get("expand") or numbers.get("mamba_expand")
    for name, old in numbers.items():
        if NO_SIZE.search(name) and not re.search("head", name):
            continue
        rule = next((rule for pattern, rule in SIZES if re.search(pattern, name)), None)
        new = rule(name, old) if rule else None
        if "key_value_heads" in name and old == numbers.get(name.replace("key_value", "attention")):
            new = HEAD_COUNT
        if expand and re.search(r"d_head$|head_dim$|d_ssm$", name):  # heads of a widened state
            new = WIDTH * expand // (1 if "ssm" in name else HEAD_COUNT)
        if new is not None and new != old and old > 0:
            found[name] = new
    for name, sizes in _lists(config).items():
        whole = all(type(n) is int for n in sizes)
        if whole and re.search("hidden_sizes|embed_dim|conv_dim|tdnn_dim|channels|neck|out_chan|mid_chan", name):
            found[name] = [max(8, 16 * n // max(sizes[0], 1) // 8 * 8) if sizes[0] > 16 else n for n in sizes]
        if whole and name in ("num_attention_heads", "num_heads"):
            found[name] = [min(n, HEAD_COUNT // 2) for n in sizes]
    return found


def _vocabulary(config: Any) -> dict[str, Any]:
    """A small vocabulary, with each special token in it."""
    found: dict[str, Any] = {}
    numbers = _whole_numbers(config)
    for name, old in numbers.items():
        if "vocab" in name and old > VOCABULARY and "offset" not in name:
            found[name] = VOCABULARY
    special = sorted({old for name, old in numbers.items() if _is_token(name) and old >= VOCABULARY - 40})
    places = {old: VOCABULARY - 1 - place for place, old in enumerate(special)}
    found |= {name: places[old] for name, old in numbers.items() if _is_token(name) and old in places}
    missing = [name for name, old in vars(config).items() if old is None]
    if vars(config).get("is_encoder_decoder"):
        found |= {name: 0 for name in ("pad_token_id", "decoder_start_token_id") if name in missing}
    if "image_token_index" in missing:
        found["image_token_index"] = VOCABULARY - 20
    eos = vars(config).get("eos_token_id")
    if isinstance(eos, list):
        found["eos_token_id"] = [min(token, 2) for token in eos][:1]
    return found


def _is_token(name: str) -> bool:
    return bool(re.search(r"(token_id|token_index|_token)$", name)) and not name.startswith("num_")


def _positions(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, old in _whole_numbers(config).items():
        if re.search(r"position_embeddings$|n_positions|max_seq_len|max_source_pos|max_target_pos", name):
            found[name] = min(old, POSITIONS)
    for name, old in vars(config).items():
        if isinstance(old, dict) and ("mrope_section" in old or (name == "rope_parameters" and _has_sections(config))):
            turned = int(HEAD_WIDTH // 2 * old.get("partial_rotary_factor", 1.0))
            found[name] = {**old, "mrope_section": [turned // 4, turned // 4, turned - 2 * (turned // 4)]}
        if name == "attention_window":
            found[name] = [4] * LAYERS if isinstance(old, list) else 4
    return found


def _has_sections(config: Any) -> bool:
    """Whether a model turns positions in three directions by default, in sections that are those of wide heads."""
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return 'get("mrope_section"' in inspect.getsource(modeling)


def _images(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, old in _whole_numbers(config).items():
        if name in ("image_size", "input_size", "resolution") and old > 32:
            found[name] = 32
        if name == "patch_size" and old > 8:
            found[name] = 8
        if name == "window_size" and old > 4:
            found[name] = 16 if hasattr(config, "spatial_merge_size") else 4
        if name in ("mm_tokens_per_image", "latent_query_num"):
            found[name] = 4
    for name, sizes in _lists(config).items():
        if name == "depths" and hasattr(config, "window_size") and type(getattr(config, "image_size", None)) is int:
            found["image_size"] = 4 * 4 * 2 ** (len(sizes) - 1)  # the last stage has a window yet
        if name == "image_size" and all(type(n) is int for n in sizes):
            found[name] = [32 for _ in sizes]
        if name == "patch_size" and all(type(n) is int and n > 8 for n in sizes):
            found[name] = [8 for _ in sizes]
        if name == "image_grid_pinpoints":
            found[name] = [[32, 64], [64, 32]]
        if name.startswith("vision_feature_layer"):
            found[name] = [max(layer, -LAYERS) if layer < 0 else min(layer, LAYERS - 1) for layer in sizes]
    return found


def _experts(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, old in _whole_numbers(config).items():
        if re.search(r"expert", name) and re.search(r"per_tok|topk|top_k|capacity", name):
            found[name] = min(old, 2)
        elif re.search(r"experts$|n_routed|num_local|moe_num", name) and old > EXPERTS:
            found[name] = EXPERTS
        elif re.search(r"^(n_group|topk_group|moe_topk|moe_k)$", name):
            found[name] = min(old, 2 if "group" not in name else 1)
    return found


def _unset(config: Any) -> dict[str, Any]:
    """What a checkpoint's configuration has, and the defaults leave out."""
    usual = {
        "vocab_size": VOCABULARY, "head_dim": HEAD_WIDTH, "num_key_value_heads": HEAD_COUNT,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "num_experts": EXPERTS, "top_k_experts": 2,
        "moe_intermediate_size": INNER, "pad_token_id": 0,
    }  # fmt: skip
    return {name: value for name, value in usual.items() if vars(config).get(name, 0) is None}


def _quiet(config: Any) -> dict[str, Any]:
    """Nothing is dropped out or masked, so that a step in training has one answer."""
    found: dict[str, Any] = {}
    for name, old in vars(config).items():
        if re.search("drop|jitter", name) and isinstance(old, float) and old > 0:
            found[name] = 0.0
        if "drop" in name and isinstance(old, list | tuple) and all(isinstance(rate, float) for rate in old):
            found[name] = [0.0 for _ in old]
        if name == "mask_time_prob" or name == "mask_feature_prob":
            found[name] = 0.0
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
