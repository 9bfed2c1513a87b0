"""HF PEFT's rules of names, held to HF PEFT's own functions on every module of a model."""

from __future__ import annotations

import time
from typing import Any

import peft
import pytest
from peft.tuners.ia3.model import IA3Model
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key

from peftc.files.hf_peft import names as hf_names
from peftc.files.hf_peft.names import FEEDFORWARD, Names, key_for, saying
from zoo import ZOO

CHOICES: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "whole": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "letters": {"target_modules": ["_proj", "proj"]},
    "nothing": {"target_modules": []},
    "containers": {"target_modules": ["self_attn", "1"]},
    "pattern": {"target_modules": r".*layers\.(0|1)\.self_attn\.(q|k)_proj"},
    "alternatives": {"target_modules": r"model\.layers\.0\.mlp\.up_proj|lm_head"},
    "half a name": {"target_modules": r"q_proj"},
    "flags": {"target_modules": r"(?i).*\.Q_PROJ"},
    "dots": {"target_modules": "model.layers.0.self_attn.q.proj"},
    "all linear": {"target_modules": "all-linear"},
    "shouted": {"target_modules": "All-Linear"},
    "less ends": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "less a pattern": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "less of all": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "a layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "the first": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers of": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers of others": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "layers of none": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "a whole name in layers": {"target_modules": ["model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=list(CHOICES))
def test_the_same_modules_are_chosen(choice: dict[str, Any], name: str) -> None:
    model = ZOO[name]()
    config = _maybe_include_all_linear_layers(peft.LoraConfig(**choice), model)
    found = {key: check_target_module_exists(config, key) for key, _ in model.named_modules() if key}
    expected = {key for key, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)}
    assert Names(model, choice).modules() == expected


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
        {r"layers\.\d\..*q_proj": 2},
        {"proj": 2, "_proj": 3, ".*_proj": 4},
        {"^model.layers.1.*": 2, "^q_proj": 3, "mlp.up_proj": 5},
        {key_for("model.layers.1.self_attn.q_proj"): 2, "q_proj|k_proj": 4},
    ],
    ids=str,
)
def test_a_pattern_means_the_same_modules(pattern: dict[str, int]) -> None:
    model = ZOO["llama"]()
    names = Names(model, {"r": 8, "rank_pattern": pattern})
    for name, _ in model.named_modules():
        own = names.settings(name, {"r": "rank_pattern"})["r"]
        assert own == pattern.get(get_pattern_key([*pattern], name), 8)


@pytest.mark.parametrize("inner", [["down_proj"], ["proj"], [], r".*\.down_proj", r"down_proj"], ids=str)
def test_the_same_modules_are_feed_forward(inner: Any) -> None:
    model = ZOO["llama"]()
    names = Names(model, {FEEDFORWARD: inner})
    config = peft.IA3Config(target_modules=r".*")
    config.feedforward_modules = inner
    for name, _ in model.named_modules():
        assert names.settings(name, {})[FEEDFORWARD] is IA3Model._check_target_module_feedforward(config, name)


@pytest.mark.parametrize("by_letters", [False, True])
def test_what_is_said_means_these_modules_alone(by_letters: bool) -> None:
    """Of the names of a model each by itself, and all that end alike."""
    model = ZOO["bert"]()
    every = [name for name, _ in model.named_modules() if name]
    for wanted in ([name] for name in every):
        said = saying(model, wanted, by_letters=by_letters)
        if by_letters:
            names = Names(model, {FEEDFORWARD: said})
            assert [name for name in every if names.settings(name, {})[FEEDFORWARD]] == wanted
        else:
            assert sorted(Names(model, {"target_modules": said}).modules()) == wanted


def test_all_matches_together_have_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each of them: there are as many as modules."""
    monkeypatch.setattr(hf_names, "SECONDS", 0.05)
    names = Names(ZOO["llama"](), {"target_modules": "(.*)" * 9})
    names._clock.timed(lambda *_, **__: time.sleep(0.06), "")
    with pytest.raises(TimeoutError):
        names.modules()
