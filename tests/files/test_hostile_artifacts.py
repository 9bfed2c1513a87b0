"""Artifacts and adapters that others made: files that are none, tensors that do not fit though their checksums do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftc
from peftc.driver.calibration import read_batches
from peftc.files.hf_peft import folder as peft_folder
from peftc.files.hf_peft.places.layers import unfit
from peftc.protocol.site import Projection

BASE = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
EXAMPLE = torch.ones(2, 6)
SPEC = 'apply lora(r=2) to "0"\napply far(keep=0.5, select=norm) to "2"\ntrain "0.bias"'
TENSORS, MANIFEST = "adapter.safetensors", "peftc.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "artifact"
    peftc.compile(BASE, SPEC, example=EXAMPLE).save(folder)
    return folder


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    for name in (TENSORS, MANIFEST):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.load(folder, BASE)
    assert [problem.code for problem in raised.value.diagnostics] == ["bad-artifact"]
    return str(raised.value)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 42)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_large_header(path: Path) -> None:
    path.write_bytes((99_999_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 100_000_000)


def whole_but_huge(path: Path) -> None:
    """Every byte of four terabytes is some tensor's."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 42))


@pytest.mark.parametrize("spoil", [fifo, sparse, endless, a_folder])
@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_files_that_are_none(artifact: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(artifact / name)
    assert name in refused(artifact)


@pytest.mark.parametrize("spoil", [a_large_header, whole_but_huge])
def test_tensors_beyond_the_memory(artifact: Path, spoil: Callable[[Path], None]) -> None:
    spoil(artifact / TENSORS)
    assert TENSORS in refused(artifact)


def rewritten(artifact: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The artifact with other tensors, and with checksums that fit."""
    state = load_file(artifact / TENSORS)
    change(state)
    save_file(state, artifact / TENSORS)
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["checksum"]
    manifest["tensors"] = hashlib.sha256((artifact / TENSORS).read_bytes()).hexdigest()
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    return artifact


def test_tensors_that_fit(artifact: Path) -> None:
    assert peftc.load(rewritten(artifact, lambda state: None), BASE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["0.lora.A", "0.bias", "2.far.index"])
def test_tensors_of_another_dtype(artifact: Path, name: str, dtype: torch.dtype) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = state[name].to(dtype) if state[name].dtype != dtype else state[name].to(torch.int32)

    assert name in refused(rewritten(artifact, change))


@pytest.mark.parametrize("index", [-1, 4, 1 << 62])
def test_indices_out_of_range(artifact: Path, index: int) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["2.far.index"][0] = index

    assert "index out of range" in refused(rewritten(artifact, change))


# --- HF PEFT's folders, and other files -------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [fifo, sparse, endless, a_folder])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_adapters_that_are_no_files(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    spoil(tmp_path / name)
    with pytest.raises(peftc.PeftcError, match="bad-artifact"):
        peftc.load_peft(BASE, tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, "[1]", '{"lora_alpha": [1]}'])
def test_adapters_with_odd_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(peftc.PeftcError, match="bad-artifact"):
        peftc.load_peft(BASE, tmp_path)


def adapter(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def obeyed(folder: Path) -> dict[str, Tensor]:
    found = peft_folder.read(BASE, folder)
    return found.state(peftc.plan(BASE, found.spec, example=EXAMPLE))


def adapter_refused(folder: Path) -> str:
    with pytest.raises(peftc.PeftcError) as raised:
        obeyed(folder)
    assert [problem.code for problem in raised.value.diagnostics] == ["bad-artifact"]
    return str(raised.value)


LORA = {"base_model.model.0.lora_A.weight": torch.ones(2, 6), "base_model.model.0.lora_B.weight": torch.ones(6, 2)}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "(" * 3000 + "0" + ")" * 3000},
        {"target_modules": ["0"], "rank_pattern": {"(" * 3000 + "0" + ")" * 3000: 2}},
        {"target_modules": ["0"], "rank_pattern": [2]},
        {"target_modules": ["0"], "r": float("inf")},
        {"target_modules": "0" * 200_000},
    ],
)
def test_settings_that_cannot_be_obeyed(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter_refused(adapter(tmp_path, LORA, peft_type="LORA", **settings))


@pytest.mark.parametrize("count", [10, 20_000])
def test_making_patterns_takes_its_time(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftc.files.hf_peft.names.SECONDS", 0.5)
    patterns = {f"no_such_layer_{number}": 3 for number in range(count)}
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["0"], "rank_pattern": patterns}
    folder = adapter(tmp_path, LORA, **settings)
    if count > 10:
        assert "takes too long" in adapter_refused(folder)
    else:
        assert obeyed(folder)


@pytest.mark.parametrize(
    ("layers", "width", "shape"),
    [(-1, -8, (2, 16)), (0, 8, (2, 0)), (1_000_000, 0, (2, 0)), (1_000_000, 1, (0, 2_000_000)), (1, -1, (2, 2))],
)
def test_prefixes_of_absurd_sizes(tmp_path: Path, layers: int, width: int, shape: tuple[int, int]) -> None:
    sizes = {"num_layers": layers, "token_dim": width, "num_attention_heads": 2, "num_virtual_tokens": shape[0]}
    kind = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
    adapter_refused(adapter(tmp_path, {"prompt_embeddings": torch.ones(shape)}, **kind, **sizes))


@pytest.mark.parametrize("pattern", [None, {"0.lora_E": [True, True]}])
def test_a_rank_beyond_the_tensors(tmp_path: Path, pattern: Any) -> None:
    """It is compared before anything is made in its size: that would take terabytes."""
    shapes = {"lora_A": (2, 6), "lora_B": (6, 2), "lora_E": (2, 1)}
    tensors = {f"base_model.model.0.{name}": torch.ones(shape) for name, shape in shapes.items()}
    settings = {"init_r": 1 << 42, "target_modules": ["0"], "total_step": 9, "rank_pattern": pattern}
    adapter_refused(adapter(tmp_path, tensors, peft_type="ADALORA", **settings))


@pytest.mark.parametrize("spoil", [fifo, sparse, endless, a_folder])
def test_batches_that_are_no_file(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "batches.safetensors")
    spoil(tmp_path / "batches.safetensors")
    with pytest.raises(peftc.PeftcError, match="bad-calibration"):
        read_batches(tmp_path / "batches.safetensors")


class Picky(nn.Linear):
    """It wants batches of sequences."""

    def forward(self, input: Tensor) -> Tensor:
        batch, _, width = input.shape
        return super().forward(input.reshape(batch, -1, width))


class SpeltOut(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


def projection(model: nn.Module) -> Projection:
    (site,) = (site for site in peftc.sites(model, example=torch.ones(2, 3, 6)) if isinstance(site, Projection))
    return site


@pytest.mark.parametrize(("kind", "fits"), [(Picky, False), (SpeltOut, True)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_of_a_class_of_their_own(kind: type[nn.Linear], fits: bool, device: str) -> None:
    """On the meta device as well, where what is read from a checkpoint later stands until then."""
    model = nn.Sequential(kind(6, 6))
    site = projection(model)
    assert (unfit(model.to(device), site) is None) is fits


def test_names_that_take_too_long_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = peftc.compile(BASE, 'apply lora(r=2) to "0"\napply lora(r=3) to "2"', example=EXAMPLE)
    monkeypatch.setattr("peftc.files.hf_peft.names.SECONDS", 0.0)
    with pytest.raises(peftc.PeftcError, match="cannot-export"):
        compiled.save_pretrained(tmp_path)


# --- around a compile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_what_is_switched_on_around_a_compile(around: Callable[[], torch.inference_mode], saved: Path) -> None:
    with around():
        compiled = peftc.compile(BASE, SPEC, example=EXAMPLE)
        loaded = peftc.load(saved, BASE)
        assert peftc.plan(BASE, SPEC, example=EXAMPLE).trainable
    for module in (compiled, loaded):
        module(EXAMPLE).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


def test_a_rank_beyond_the_memory() -> None:
    with pytest.raises(peftc.PeftcError, match="no-memory"):
        peftc.compile(BASE, 'apply lora(r=1000000000000) to "0"', example=EXAMPLE)


@pytest.mark.parametrize("method", ["vera(r=2)", "prefix", "lora(r=2)", "prompt(length=2)", "said"])
def test_a_method_on_nothing(method: str) -> None:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(BASE, f"apply {method} to (linear except linear)", example=EXAMPLE)
    assert {problem.code for problem in raised.value.diagnostics} <= {"no-match", "takes-no-target"}
