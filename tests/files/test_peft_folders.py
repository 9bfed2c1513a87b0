"""Folders of HF PEFT in which something does not fit: the option or the key is named, and nothing is loaded.

HF PEFT itself passes by tensors that it has no place for, and starts anew what it has no tensors for.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from hfpeft import shaken
from marks import first_is_quick
from peftc.files.hf_peft.spec import IDLE, NAMING, of_kind
from zoo import ZOO, inputs

TWO = ["q_proj", "v_proj"]
Tensors = dict[str, Tensor]
CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda **given: peft.LoraConfig(**{"r": 4, "target_modules": TWO, **given}),
    "dora": lambda **given: peft.LoraConfig(**{"r": 4, "target_modules": TWO, "use_dora": True, **given}),
    "ia3": lambda **given: peft.IA3Config(
        **{"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], **given}
    ),
    "adalora": lambda **given: peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": TWO, **given}
    ),
    "loha": lambda **given: peft.LoHaConfig(**{"r": 4, "target_modules": TWO, **given}),
    "lokr": lambda **given: peft.LoKrConfig(**{"r": 2, "target_modules": TWO, **given}),
    "vera": lambda **given: peft.VeraConfig(**{"r": 6, "target_modules": TWO, **given}),
    "prompt": lambda **given: peft.PromptTuningConfig(
        **{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **given}
    ),
    "ptuning": lambda **given: peft.PromptEncoderConfig(
        **{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "encoder_hidden_size": 5, **given}
    ),
    "prefix": lambda **given: peft.PrefixTuningConfig(
        **{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **given}
    ),
}  # fmt: skip


def saved(folder: Path, method: str, model: str = "llama", **given: Any) -> Any:
    """HF PEFT's own model, and its folder."""
    torch.manual_seed(0)
    theirs = shaken(peft.get_peft_model(ZOO[model](), CONFIGS[method](**given)))
    theirs.save_pretrained(folder)
    return theirs


def edit(folder: Path, change: dict[str, Any] | Callable[[Tensors], Any]) -> None:
    """Other settings, or other tensors."""
    if isinstance(change, dict):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load(file.read_bytes())
        made = change(tensors) or tensors
        file.write_bytes(safetensors.torch.save({key: tensor.clone().contiguous() for key, tensor in made.items()}))


def refused(folder: Path, words: str, model: str = "llama") -> None:
    with pytest.raises(peftc.PeftcError, match=words) as caught:
        peftc.load_peft(ZOO[model](), folder)
    assert {problem.code for problem in caught.value.diagnostics} == {"bad-artifact"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {method: tmp_path_factory.mktemp(method) for method in CONFIGS}
    for method, folder in made.items():
        saved(folder, method)
    return made


def copied(folder: Path, to: Path) -> Path:
    for file in folder.glob("adapter_*"):
        (to / file.name).write_bytes(file.read_bytes())
    return to


# ---- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_an_option_that_is_not_obeyed_is_refused(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every field that HF PEFT's own config of the method has, and one that a later version might."""
    config = CONFIGS[method]()
    known = set().union(*(cls.obeyed() for cls in of_kind(config.peft_type)))
    fields = {field.name for field in dataclasses.fields(config)} | {"an_idea_of_later"}
    folder = copied(folders[method], tmp_path)
    whole = json.loads((folder / "adapter_config.json").read_text())
    tried = fields - known - IDLE - NAMING
    assert "modules_to_save" in tried | known
    for name in sorted(tried):
        edit(folder, whole | {name: {"a": 1}})
        refused(folder, f"its {name}=.* is none that peftc has")


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("lora", {"init_lora_weights": "corda"}),
        ("lora", {"init_lora_weights": "loftq"}),
        ("dora", {"init_lora_weights": "olora"}),
        ("lora", {"init_lora_weights": "pissa_niter_4"}),
        ("lora", {"kasa_config": {}}),
        ("lora", {"lora_bias": True}),
        ("lora", {"use_qalora": True}),
        ("dora", {"alora_invocation_tokens": [3, 4]}),
        ("lora", {"trainable_token_indices": [3]}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("adalora", {"alpha_pattern": {"q_proj": 64}}),
        ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]}}),
        ("ia3", {"modules_to_save": ["lm_head"]}),
        ("ia3", {"feedforward_modules": None}),
        ("lora", {"peft_type": "POLY"}),
        ("lora", {"peft_type": None}),
        ("lora", {"use_dora": True}),
        ("lora", {"target_modules": None}),
        ("lora", {"target_modules": ["q_proj", "v_proj", "k_proj"]}),
        ("lora", {"target_modules": ["_proj"]}),
        ("prompt", {"num_virtual_tokens": 2}),
        ("prompt", {"num_transformer_submodules": 2}),
        ("prompt", {"task_type": None}),
        ("prompt", {"token_dim": 16}),
        ("prompt", {"modules_to_save": ["lm_head"]}),
        ("ptuning", {"num_virtual_tokens": 4}),
        ("prefix", {"num_layers": 1}),
        ("prefix", {"token_dim": 8}),
        ("prefix", {"task_type": "SEQ_CLS"}),
        ("prefix", {"num_virtual_tokens": 2}),
        ("prefix", {"num_transformer_submodules": 2}),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_is_named(
    method: str, option: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    edit(copied(folders[method], tmp_path), option)
    refused(tmp_path, next(iter(option)))


@pytest.mark.parametrize(
    ("method", "option", "words"),
    first_is_quick(
        [
            ("lora", {"r": 8}, r"lora_A.weight at .* is \(4, 32\), where the settings \(r=8\) say \(8, 32\)"),
            ("lora", {"rank_pattern": {"q_proj": 2}}, r"q_proj is .*r=2"),
            ("loha", {"r": 2}, "hada_w1_a at .*r=2"),
            ("lokr", {"decompose_factor": 8}, "lokr_w1 at .*factor=8"),
            ("adalora", {"init_r": 6}, "lora_E at .*r=6"),
            ("vera", {"r": 3}, "vera_lambda_d at .*r=3"),
            ("prefix", {"num_attention_heads": 4}, "num_attention_heads=4"),
        ]
    ),
)
def test_a_size_that_contradicts_the_tensors_is_named(
    method: str, option: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    edit(copied(folders[method], tmp_path), option)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("method", "option"),
    [("dora", {"use_dora": False}), ("lora", {"target_modules": ["q_proj"]}), ("lora", {"layers_to_transform": [0]}),
     ("lora", {"exclude_modules": ["layers.0.self_attn.q_proj"]}), ("ia3", {"feedforward_modules": ["k_proj"]})],
    ids=str,
)  # fmt: skip
def test_tensors_that_the_options_leave_out_are_refused(
    method: str, option: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    edit(copied(folders[method], tmp_path), option)
    refused(tmp_path, "lora_magnitude_vector|lora_[AB].weight belongs to nothing|_proj .ia3_l.")


# ---- Tensors ---------------------------------------------------------------------------------------------------------

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def renamed(old: str, new: str, part: str = "") -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        key.replace(old, new) if part in key else key: tensor for key, tensor in tensors.items()
    }  # fmt: skip


def more(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("lora", without("layers.0.self_attn.q_proj.lora_A"), "layers.0.self_attn.q_proj .lora_B.weight"),
        ("lora", without("layers.0.self_attn.q_proj"), "no tensors for model.layers.0.self_attn.q_proj"),
        ("lora", lambda tensors: {"x": torch.zeros(1)}, "its x belongs"),
        ("lora", more(FIRST.replace("q_proj", "k_proj") + ".lora_A.weight", 4, 32), "k_proj.lora_A.weight belongs"),
        ("lora", more(f"{FIRST}.ia3_l", 48, 1), "ia3_l"),
        ("lora", more("base_model.model.model.norm.weight", 32), "model.norm.weight is another than the base"),
        ("lora", renamed(".weight", ".other.weight"), "lora_A.other.weight"),
        ("lora", renamed("base_model.model.", ""), "its model.layers.* belongs"),
        ("lora", renamed("base_model.model.", "", "layers.0.self_attn.q_proj"), "its model.layers.* belongs"),
        ("lora", renamed("base_model.model.", "base_model."), "its base_model.model.layers.* belongs"),
        ("ia3", renamed("base_model.model.", ""), "its model.layers.* belongs"),
        ("vera", without("vera_A"), "base_model.vera_A"),
        ("vera", renamed("base_model.vera", "vera"), "base_model.vera_A"),
        ("prompt", renamed("prompt", "base_model.prompt"), "no prompt_embeddings"),
        ("prompt", more("base_model.x", 2), "x is no parameter"),
        ("prefix", more("base_model.x", 2), "base_model.x is no part"),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    method: str, change: Any, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    edit(copied(folders[method], tmp_path), change)
    refused(tmp_path, words)


# ---- What is obeyed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method", "given", "change"),
    first_is_quick(
        [
            ("llama", "dora", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}, None),
            ("llama", "lora", {"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
            ("llama", "lora", {"layers_to_transform": [1], "layers_pattern": "layers"}, None),
            ("llama", "lora", {"target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*\.1\..*"}, None),
            ("llama", "lora", {"bias": "all"}, None),
            ("llama", "lora", {"target_modules": ["lm_head", "q_proj"]}, None),
            ("gpt2", "lora", {"target_modules": ["lm_head"]}, None),
            ("llama", "lora", {}, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()}),
            ("llama", "vera", {}, {"save_projection": False, "projection_prng_key": 9}),
            ("llama", "adalora", {"r": 3, "use_rslora": False}, {"use_rslora": None}),
            ("llama", "ia3", {"feedforward_modules": r".*\.down_proj"}, None),
            ("llama", "prefix", {"prefix_projection": True, "encoder_hidden_size": 5}, None),
        ]
    ),
)
@pytest.mark.filterwarnings("ignore")  # HF PEFT says what it passes by
def test_what_is_obeyed_gives_hf_pefts_outputs(
    model: str, method: str, given: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    saved(tmp_path, method, model, **given)
    if change is not None:
        edit(tmp_path, change)
    base = ZOO[model]().eval()
    batch = inputs(base)
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path).eval()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(**batch).logits, base(**batch).logits, atol=1e-4)


# ---- What is written -------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """Names that end alike, and by letters."""

    def __init__(self, layer: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.block, self.xfc = nn.ModuleDict({"fc": nn.Linear(8, 8)}), nn.Linear(8, 8)
        self.fc: Any = layer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block["fc"](x).relu()
        y: Tensor = self.xfc(self.fc(x).relu())
        return y


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class SpeltOut(nn.Linear):
    """Not its base's forward, and yet what that does."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


class NoLayer(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(x, x, x, need_weights=False)[0])


class Functional(Outer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.xfc(F.linear(x, self.fc.weight).relu())
        return y


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc).relu()


def hooked() -> nn.Module:
    model = Outer()
    model.fc.register_forward_hook(lambda module, given, result: result * 2)
    return model


def tied() -> nn.Module:
    model = Outer()
    model.xfc.weight, model.xfc.bias = model.fc.weight, model.fc.bias
    return model


@pytest.mark.parametrize(
    ("make", "spec", "words"),
    first_is_quick(
        [
            (lambda: Outer(Scaled), 'apply lora(r=2) to "fc"', "fc does more than a linear layer"),
            (hooked, 'apply lora(r=2) to "fc"', "fc does more than a linear layer"),
            (lambda: Outer(NoLayer), 'apply lora(r=2) to "fc"', "fc is a NoLayer"),
            (Attending, 'apply lora(r=2) to "fc.out_proj"', "another part of the model reads the weight"),
            (Functional, 'apply lora(r=2) to "fc"', "another part of the model reads the weight"),
            (tied, 'apply lora(r=2) to "fc"', "another part of the model reads the weight"),
            (Bare, 'apply lora(r=2) to "fc"', "fc"),
            (Outer, 'apply adalora(alpha=4, steps=9) to "fc"\napply adalora(steps=9) to "xfc"', "lora_alpha"),
        ]
    ),
)
def test_what_hf_peft_would_not_apply_is_not_written(make: Any, spec: str, words: str, tmp_path: Path) -> None:
    compiled = peftc.compile(make().eval(), spec, example=torch.randn(2, 3, 8))
    with pytest.raises(peftc.PeftcError, match=words) as caught:
        compiled.save_pretrained(tmp_path / "adapter")
    assert {problem.code for problem in caught.value.diagnostics} == {"cannot-export"}
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("make", "spec"),
    first_is_quick(
        [
            (Outer, 'apply ia3(on=output) to "fc"\napply ia3(on=input) to "block.fc"'),
            (Outer, 'apply ia3(on=input) to "fc"\napply ia3(on=output) to "xfc"'),
            (Outer, 'apply dora(r=2, alpha=3) to "fc"\napply dora(r=3, alpha=50) to "block.fc"'),
            (Outer, 'apply loha(r=2, alpha=3) to "fc"\napply loha(r=3, alpha=50) to "block.fc"'),
            (Outer, 'apply vera(r=3) to "fc"'),
            (lambda: Outer(SpeltOut), 'apply lora(r=2) to "fc"'),
        ]
    ),
)
def test_names_that_end_alike_are_told_apart(make: Any, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 8)
    compiled = shaken(peftc.compile(copy.deepcopy(model), spec, example=x))
    compiled.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), compiled(x), rtol=0, atol=1e-5)
