"""Quantising while loading: the same as reading everything first, without everything ever being there."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftc
from checkpoints import write_llama
from paths import ROOT, SUPPORT
from peftc.capture.checkpoints.checkpoint import Checkpoint
from peftc.capture.checkpoints.ondisk import OnDisk
from peftc.capture.checkpoints.references import load_model, opened, parse_reference
from zoo import ENCODER, GROUPED, TOKENS, ZOO

# How a checkpoint differs from the model: prefixes, fused and stacked weights, transposed ones, ties, a fresh head.
MODELS = ("llama", "gpt2", "bert", "t5", "mixtral", "gpt_oss", "gemma2", "qwen2_moe", "vit")
FEW: dict[str, Any] = {**TOKENS}
SMALL: dict[str, Any] = {**ENCODER}
NARROW: dict[str, Any] = {**GROUPED}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """The model in shards of a few tensors; `config` replaces entries of its config file."""
    if dtype is not None:
        model = cast(Any, model).to(dtype)
    model.save_pretrained(folder, max_shard_size="50KB")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def ties(model: nn.Module) -> set[frozenset[str]]:
    names = dict(model.named_parameters(remove_duplicate=False))
    return {frozenset(name for name, other in names.items() if other is one) for one in names.values()}


def matrices(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def check_parts(folder: Path, dtype: str | None = None, least: int = 1) -> tuple[nn.Module, Checkpoint]:
    """Left out and read later, every matrix is what it is in a model that was read as a whole."""
    reference = parse_reference(str(folder))
    torch.manual_seed(0)
    whole, _ = load_model(reference, dtype=dtype)
    after_whole = torch.rand(3)
    torch.manual_seed(0)
    checkpoint = opened(reference, dtype=dtype)
    assert checkpoint is not None
    skeleton = checkpoint.skeleton()
    model, _ = checkpoint.load(without=matrices(skeleton))
    assert torch.equal(after_whole, torch.rand(3))
    mine, shapes = tensors(model), tensors(skeleton)
    left = [name for name, tensor in mine.items() if tensor.is_meta]
    assert len(left) >= least
    names = {name: group for group in ties(skeleton) for name in group}
    for name, tensor in tensors(whole).items():
        there = next((one for one in names.get(name, ()) if one in checkpoint.checkpoint), name)  # of tied ones one is
        read = checkpoint.checkpoint.read(there) if mine[name].is_meta else mine[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read, tensor), name
        fake = shapes[name]
        assert (fake.dtype, fake.shape, fake.device) == (tensor.dtype, tensor.shape, tensor.device), name
    assert ties(whole) == ties(model) == ties(skeleton)
    assert type(whole) is type(model)
    assert whole.training == model.training
    assert getattr(whole, "generation_config", None) == getattr(model, "generation_config", None)
    return model, checkpoint.checkpoint


# --- the checkpoint's parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_what_from_pretrained_makes_it(name: str, tmp_path: Path) -> None:
    check_parts(saved(ZOO[name](), tmp_path, torch.bfloat16), least=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ZOO) - set(MODELS)))
def test_every_weight_of_other_models(name: str, tmp_path: Path) -> None:
    check_parts(saved(ZOO[name](), tmp_path))


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_another_precision(stored: str, asked: str, tmp_path: Path) -> None:
    """T5 keeps some weights in fp32 when the rest is in fp16."""
    model, _ = check_parts(saved(ZOO["t5"](), tmp_path, getattr(torch, stored)), dtype=asked)
    kept = {tensor.dtype for tensor in tensors(model).values() if tensor.is_floating_point()}
    assert (torch.float32 in kept) == (asked != "bfloat16")


def test_names_without_the_prefix(tmp_path: Path) -> None:
    model = hf.GPT2Model(hf.GPT2Config(**FEW, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    check_parts(saved(model, tmp_path, architectures=["GPT2LMHeadModel"]), least=8)


def test_names_with_a_prefix_too_many(tmp_path: Path) -> None:
    check_parts(saved(ZOO["llama"](), tmp_path, architectures=["LlamaModel"]), least=8)


def test_a_fresh_head_is_drawn_as_ever(tmp_path: Path) -> None:
    model = hf.BertModel(hf.BertConfig(**SMALL))
    loaded, checkpoint = check_parts(saved(model, tmp_path, architectures=["BertForSequenceClassification"]))
    assert "classifier.weight" not in checkpoint
    assert not tensors(loaded)["classifier.weight"].is_meta


@pytest.mark.parametrize("equal", [True, False])
def test_both_sides_of_a_tie_are_there(equal: bool, tmp_path: Path) -> None:
    """Tied are only weights that are the same."""
    saved(hf.LlamaForCausalLM(hf.LlamaConfig(**NARROW, tie_word_embeddings=True)), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    embedding = load_file(tmp_path / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embedding + (not equal)}, tmp_path / "head.safetensors", {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = check_parts(tmp_path)
    assert (frozenset({"lm_head.weight", "model.embed_tokens.weight"}) in ties(model)) == equal


def test_a_checkpoint_that_changes_meanwhile(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    saved(ZOO["llama"](), tmp_path)
    found = opened(parse_reference(str(tmp_path)))
    assert found is not None
    checkpoint = found.checkpoint
    before = checkpoint.read(name)
    tensor = checkpoint.tensors[name]
    assert isinstance(tensor, OnDisk)
    file = tensor.file
    stored = load_file(file)
    save_file(stored | {name: stored[name] + 1}, file, {"format": "pt"})
    with pytest.raises(peftc.PeftcError, match="other numbers than before"):
        checkpoint.read(name)
    save_file(stored, file, {"format": "pt"})
    assert torch.equal(checkpoint.read(name), before)
    file.unlink()
    with pytest.raises(peftc.PeftcError, match=r"cannot read model.layers.0.self_attn.q_proj.weight"):
        checkpoint.read(name)


# --- compiling -------------------------------------------------------------------------------------------------------

CompiledModules = tuple[peftc.CompiledModule, peftc.CompiledModule]
SPEC = "quantize linear except head with nf4(double=true)\napply lora(r=3) to attn.q, attn.v\n"
PARTS = "quantize linear except head with fp4\napply lora(r=3, init=pissa) to attn.q, attn.v\n"
EXPERTS = "quantize expert, attn.* with int8\napply lora(r=2) to attn.q, expert\n"


def same(one: peftc.CompiledModule, other: peftc.CompiledModule) -> None:
    """Bit for bit, and in the same code."""
    mine, theirs = tensors(one), tensors(other)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.device == theirs[name].device, name
        assert torch.equal(tensor, theirs[name]), name
    assert one.code == other.code
    assert {name: str(graph) for name, graph in one.history.items()} == {
        name: str(graph) for name, graph in other.history.items()
    }


def seeded(model: Any, spec: str) -> peftc.CompiledModule:
    torch.manual_seed(5)
    return peftc.compile(model, spec)


def both_ways(name: str, spec: str, folder: Path) -> tuple[str, PreTrainedModel, CompiledModules]:
    """The folder of a checkpoint, the model that is in it, and what is compiled from the one and from the other."""
    path = str(saved(ZOO[name](), folder, torch.bfloat16))
    base = cast(PreTrainedModel, load_model(parse_reference(path))[0])
    return path, base, (seeded(base, spec), seeded(path, spec))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        pytest.param(name, spec, id=f"{name}-{words}")
        for words, spec, names in (
            ("lora", SPEC, ("gpt2", "bert", "t5", "gemma2")),
            ("pissa", PARTS, ("llama",)),
            ("experts", EXPERTS, ("mixtral",)),
        )
        for name in names
    ],
)
def test_the_same_as_reading_everything_first(name: str, spec: str, tmp_path: Path) -> None:
    _, _, (whole, parts) = both_ways(name, spec, tmp_path)
    same(whole, parts)
    assert {name for name, tensor in tensors(parts.base).items() if tensor.is_meta} == set(parts.plan.packed)
    merged, again = whole.merge(), parts.merge()
    assert type(merged) is type(again)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.slow
def test_artifacts_go_both_ways(tmp_path: Path) -> None:
    _, base, (whole, parts) = both_ways("llama", SPEC, tmp_path / "model")
    same(whole, parts)
    whole.save(tmp_path / "whole")
    parts.save(tmp_path / "parts")
    assert (tmp_path / "whole/peftc.json").read_text() == (tmp_path / "parts/peftc.json").read_text()
    same(peftc.load(tmp_path / "whole"), parts)
    same(peftc.load(tmp_path / "parts", base), whole)


@pytest.mark.slow
def test_relora_reads_what_it_adds_to_again(tmp_path: Path) -> None:
    spec = "quantize attn.* with nf4\napply relora(r=2, every=2) to attn.q"
    _, _, (whole, parts) = both_ways("llama", spec, tmp_path)
    for compiled in (whole, parts):
        torch.manual_seed(6)
        optimizer = torch.optim.SGD(compiled.param_groups(0.5))
        compiled.follow(optimizer)
        for _ in range(3):
            tokens = torch.arange(10).view(2, 5)
            compiled(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same(whole, parts)


def unreadable(_self: OnDisk, _where: Any) -> Tensor:
    raise AssertionError("a weight was read")


@pytest.mark.slow
def test_what_is_wrong_with_a_spec_is_known_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(ZOO["llama"](), tmp_path)
    monkeypatch.setattr(OnDisk, "__getitem__", unreadable)
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile(folder, SPEC + "require trainable <= 1")
    assert [problem.code for problem in raised.value.diagnostics] == ["over-budget"]


@pytest.mark.slow
def test_an_artifact_on_another_checkpoint(tmp_path: Path) -> None:
    """A quantised weight has other numbers, which is known only when all have been read."""
    folder = saved(ZOO["llama"](), tmp_path / "model")
    peftc.compile(folder, SPEC).save(tmp_path / "artifact")
    file = next(
        path for path in sorted(folder.glob("*.safetensors")) if any("q_proj" in key for key in load_file(path))
    )
    stored = load_file(file)
    name = next(key for key in stored if "q_proj" in key)
    save_file(stored | {name: stored[name] * 2}, file, {"format": "pt"})
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.load(tmp_path / "artifact")
    assert [problem.code for problem in raised.value.diagnostics] == ["wrong-base"]


@pytest.mark.slow
def test_what_has_to_be_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pickled weights, as transformers reads them, and a model that runs on calibration batches."""
    folder = saved(ZOO["llama"](), tmp_path)
    expected = seeded(folder, SPEC)
    monkeypatch.setenv("PEFTC_DEBUG", "1")
    eva = SPEC.replace("r=3", "r=3, init=eva")
    tokens = torch.arange(10).view(2, 5)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    compiled = peftc.compile(folder, eva, calibration=[batch])
    assert compiled.plan.captured.checkpoint is None
    assert "is read as a whole" in capsys.readouterr().err
    weights = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    same(seeded(folder, SPEC), expected)
    assert "is read as a whole" in capsys.readouterr().err


@pytest.mark.slow
def test_a_copy_shares_what_is_left_on_disk(tmp_path: Path) -> None:
    compiled = seeded(saved(ZOO["llama"](), tmp_path), SPEC)
    same(copy.deepcopy(compiled), compiled)


# --- memory ----------------------------------------------------------------------------------------------------------

BILLION_AND_A_HALF = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 31, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
QLORA = "quantize linear with nf4\napply lora(r=8) to attn.q, attn.v"


def measured(folder: Path, spec: str) -> dict[str, float]:
    """In a process of its own, which is what is measured."""
    script = SUPPORT / "checkpoints.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(folder), spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process's memory")
def test_peak_memory_of_a_billion_and_a_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 1.3 times the packed model and its largest tensor, above what the process had before."""
    count = write_llama(tmp_path, **BILLION_AND_A_HALF)
    assert count > 1.5e9
    found = measured(tmp_path, QLORA)
    limit = found["compiled"] + found["largest"]
    with capsys.disabled():
        print(
            f"\n{count:,} parameters, {mebibytes(found['dense'])} of bf16: compiled in {found['seconds']:.0f} s "
            f"with a peak of {mebibytes(found['peak'])}, {found['peak'] / limit:.2f} times the packed model "
            f"({mebibytes(found['compiled'])}) and its largest tensor ({mebibytes(found['largest'])})"
        )
    assert found["peak"] <= 1.3 * limit
