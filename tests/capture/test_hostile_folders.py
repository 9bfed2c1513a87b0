"""Folders of models made to hang the reader, to fill the memory, to read what is elsewhere, or to run code."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.capture.capture import capture
from peftc.capture.checkpoints import untrusted
from peftc.capture.checkpoints.references import load_model, opened, parse_reference
from peftc.capture.inputs import example_inputs
from peftc.cli import main

CONFIG: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
TERABYTE = 1 << 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model in two files."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "model", max_shard_size="6KB")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    """Why the model is not read, in the same words whether as a whole or weight by weight."""
    said = []
    readers: tuple[Callable[..., Any], ...] = (load_model, opened)
    for read in readers:
        with pytest.raises(peftc.PeftcError) as raised:
            read(parse_reference(str(folder)))
        assert [problem.code for problem in raised.value.diagnostics] == ["bad-reference"]
        said.append(str(raised.value))
    assert said[0] == said[1]
    return said[0]


def configured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_sound_folder(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    checkpoint = opened(parse_reference(str(folder)))
    assert checkpoint is not None
    model, _ = load_model(parse_reference(str(folder)))
    assert {*model.state_dict()} == {*checkpoint.model.state_dict()}


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(TERABYTE)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def nested(path: Path) -> None:
    path.write_text('{"a":' * 100_000)


def a_list(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("spoil", [fifo, sparse, endless, nested, a_list])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_what_is_no_json_of_a_sensible_size(folder: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(folder / name)
    assert name in refused(folder)


@pytest.mark.parametrize("spoil", [fifo, endless])
def test_weights_that_are_no_file(folder: Path, spoil: Callable[[Path], None]) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    spoil(path)
    assert path.name in refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"\x02", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 9) + b'{"a":[]}}']
)
def test_weights_with_a_bad_header(folder: Path, text: bytes) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(text)
    assert "header" in refused(folder)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "a/../../elsewhere.safetensors", "{outside}", "/dev/zero"]
)
def test_an_index_that_points_outside(folder: Path, name: str) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.embed_tokens.weight"]
    (folder / first).rename(outside)
    index["weight_map"] = {
        key: name.format(outside=outside) if file == first else file for key, file in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))
    assert "not in the folder" in refused(folder)


def test_an_index_that_nobody_reads(folder: Path) -> None:
    """Its shards may be elsewhere; those that are read may not."""
    stray = {"metadata": {}, "weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(stray))
    assert opened(parse_reference(str(folder)))
    assert load_model(parse_reference(str(folder)))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert load_model(parse_reference(str(folder)), meta=True)
    assert "model-00001" in refused(folder)


@pytest.mark.parametrize("dtype", ["fp32", "int8", "auto", "torch.float32"])
def test_a_precision_that_is_none(folder: Path, dtype: str) -> None:
    for ask in (peftc.plan, peftc.compile):
        with pytest.raises(peftc.PeftcError, match="unknown-precision") as raised:
            ask(str(folder), "apply lora to attn.q", dtype=dtype)
        assert "float32, float16, bfloat16, float64" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_precision_that_save_writes(folder: Path, dtype: torch.dtype) -> None:
    base: Any = load_model(parse_reference(str(folder)))[0].to(dtype)
    base.save_pretrained(folder)
    peftc.compile(str(folder), "apply lora(r=2) to attn.q").save(folder.parent / "artifact")
    assert next(peftc.load(folder.parent / "artifact").base.parameters()).dtype == dtype


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": -1},
        {"text_config": {"num_layers": 10**6}},
        {"depths": [2, 10**6]},
        {"num_labels": 10**9},
        {"hidden_size": 10**30},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"pad_token_id": 10**9},
        {"dtype": "no_such_type"},
        {"quantization_config": []},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
def test_absurd_settings(folder: Path, changes: dict[str, Any]) -> None:
    """Whatever exception that ends in, within transformers."""
    refused(configured(folder, **changes))


def test_random_weights_beyond_the_memory(folder: Path) -> None:
    with pytest.raises(peftc.PeftcError, match="more than the memory of this machine"):
        load_model(parse_reference(str(configured(folder, vocab_size=10**12))), random_weights=True)


def test_modules_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a setting is called that counts them."""
    monkeypatch.setattr(untrusted, "MOST_MODULES", 10)
    assert "more than 10 modules" in refused(folder)
    nn.Sequential(*(nn.Identity() for _ in range(20)))  # outside of the reader nothing is counted


@pytest.mark.parametrize("name", ["LlamaConfig", "PreTrainedModel", "GPT2LMHeadModel", "AutoModel", "os"])
def test_a_class_that_is_not_the_model_s(folder: Path, name: str) -> None:
    """The config's own class is taken."""
    model, _ = load_model(parse_reference(str(configured(folder, architectures=[name]))))
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"\x80\x02.", b"PK\x03\x04" + b"\0" * 99])
def test_a_damaged_pickle(folder: Path, content: bytes) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(peftc.PeftcError, match="bad-reference"):
        load_model(parse_reference(str(folder)))


@pytest.mark.parametrize("rest", [b"", b"\0" * 100, struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 99])
def test_a_damaged_gguf(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + rest)
    with pytest.raises(peftc.PeftcError, match="bad-reference"):
        load_model(parse_reference(str(tmp_path / "model.gguf")), meta=True)


def test_an_adapter_beside_the_model(folder: Path) -> None:
    """It could name another base model, anywhere."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere/model"}))
    assert "load_peft" in refused(folder)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "no body/\1", "a\0b.json", "", "~", "x.py", "x.py:make"])
def test_references_that_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(peftc.PeftcError, match="bad-reference"):
        load_model(parse_reference(name), meta=True)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def make():\n    raise KeyError('x')", "KeyError: 'x' (line 2)"),
        ("def make(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero (line 1)"),
        ("def make(size): pass", "TypeError"),
        ("def make(): return 1, 2, 3", "returned tuple"),
        ("def make(): return None", "returned NoneType"),
    ],
)
def test_a_factory_that_fails(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(peftc.PeftcError) as raised:
        load_model(parse_reference(f"{tmp_path / 'own.py'}:make"))
    assert says in str(raised.value)


# --- code ---------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path({marks!r}) / "ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a class of its own, whose code leaves a mark; nobody may be asked whether it should."""
    (folder / "own.py").write_text(CODE.format(marks=str(folder.parent)))
    configured(
        folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    )

    def ask(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def test_code_in_a_folder_does_not_run(with_code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "custom code" in refused(with_code)
    assert "--trust-remote-code" in refused(with_code)
    assert main(["plan", str(with_code / "spec.peft"), str(with_code)]) == 1
    for ask in (peftc.plan, peftc.compile):
        with pytest.raises(peftc.PeftcError, match="custom code"):
            ask(str(with_code), "apply lora to attn.q")
    with pytest.raises(peftc.PeftcError, match="custom code"):
        peftc.sites(str(with_code))
    assert not (with_code.parent / "ran").exists()


def test_code_in_a_folder_runs_by_the_user_s_word(with_code: Path) -> None:
    reference = parse_reference(str(with_code), trust_remote_code=True)
    bare = parse_reference(str(with_code / "config.json"), trust_remote_code=True)
    for model in (load_model(reference)[0], load_model(reference, meta=True)[0], load_model(bare, meta=True)[0]):
        assert type(model).__name__ == "OwnModel"
    checkpoint = opened(reference)
    assert checkpoint is not None
    assert type(checkpoint.model).__name__ == "OwnModel"
    assert (with_code.parent / "ran").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_a_hub_are_code(folder: Path, name: str) -> None:
    assert "--trust-remote-code" in refused(configured(folder, **{name: "somebody/kernel"}))


@pytest.mark.parametrize("command", ["compile", "plan", "sites", "show", "merge", "bench"])
def test_help_says_what_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--trust-remote-code" in text
    assert "path/to/file.py:factory, which runs that file" in text


# --- what is switched on around a compile ------------------------------------------------------------------------


def test_a_model_made_for_inference() -> None:
    with torch.inference_mode():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    with pytest.raises(peftc.PeftcError, match="made-for-inference"):
        capture(model, example_inputs(model))


def test_integers_are_no_weights(folder: Path) -> None:
    """Where nothing says what packed them."""
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(peftc.PeftcError, match="I32"):
        opened(parse_reference(str(folder)))
