"""`peftc bench`: its variants compute the same, its rows say what they are, its command ends as it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig

import peftc
from marks import by_inductor
from peftc.bench.agreement import Behaviour, differences
from peftc.bench.batches import batch_for
from peftc.bench.bench import Bench, Measured, bench
from peftc.bench.table import bench_table
from peftc.bench.variants import FLOOR, FUSED, HF_PEFT, ONE_LIBRARY, PLAIN, Variant, floor, hf_peft, shared_copy
from peftc.cli import main
from peftc.show.screen import rendered
from zoo import ZOO

LORA = "apply lora(r=4, alpha=8) to attn.*"


def gradients(model: nn.Module, run: Any) -> dict[str, Tensor]:
    """What each module's output receives in the backward pass of `run(model)`, by its name."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: found.setdefault(name, gradient))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    run(model).backward()
    return found


# --- variants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_the_floors_backward_reaches_the_embeddings(name: str) -> None:
    model = ZOO[name]()
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    variant = floor(model)
    assert variant.module is not None
    _, arguments = batch_for(model, None, 2, 9)
    found = gradients(variant.module, lambda module: module(**arguments).loss)
    embeddings = [key for key in found if "embed" in key]
    assert embeddings
    assert all(found[key].any() for key in embeddings)
    assert variant.trainable() == {}
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_the_floor_of_a_plain_module_reaches_its_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    variant = floor(model)
    loss = variant.step(((torch.ones(5, 3),), {}))
    assert loss.requires_grad
    torch.testing.assert_close(loss.detach(), model(torch.ones(5, 3)).square().mean().detach(), rtol=0, atol=0)


def test_a_shared_copy_is_over_the_same_memory_and_changes_nothing() -> None:
    model = ZOO["t5"]()  # its embeddings are tied
    copied = shared_copy(model)
    pairs = list(zip(model.named_parameters(), copied.named_parameters(), strict=True))
    assert all(name == other and p.data_ptr() == q.data_ptr() for (name, p), (other, q) in pairs)
    assert all(p.requires_grad and not q.requires_grad for (_, p), (_, q) in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [LORA, "apply dora(r=4) to attn.q", "apply loha(r=2) to mlp.*"])
def test_hf_pefts_variant_computes_the_same(spec: str) -> None:
    model = ZOO["llama"]()
    found = bench(model, spec, seq=16, repeats=1)
    ours, theirs = found.row(FUSED), found.row(HF_PEFT)
    assert ours is not None
    assert theirs is not None
    assert found.agrees, [row.note for row in found.rows]
    assert theirs.trainable == ours.trainable
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
    assert theirs.gradient == pytest.approx(ours.gradient, rel=1e-4)


def test_a_missing_variant_says_why() -> None:
    model = ZOO["gpt2"]()
    variant = hf_peft(model, peftc.compile(model, "apply lora(r=2) to attn.q"))
    assert variant.module is None
    assert "a part of one" in variant.missing


# --- agreement ---------------------------------------------------------------------------------------------------


def seen(loss: float = 2.0, norm: float = 1.0, trainable: int = 2, gradient: float = 1.0) -> Behaviour:
    return Behaviour(loss, norm, trainable, {"a": torch.tensor([gradient, 0.5])}, torch.float32)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (seen(), None),
        (seen(loss=2.00001), None),
        (seen(loss=2.0001), "loss is"),
        (seen(loss=float("nan")), "loss is"),
        (seen(norm=1.01), "gradient norm is"),
        (seen(norm=1.01, trainable=3), None),
        (seen(gradient=1.01), "the gradient of a is off by 1.0e-02"),
        (replace(seen(loss=2.01, norm=1.01), dtype=torch.bfloat16, gradients={}), None),
    ],
)
def test_what_differs_is_said(other: Behaviour, complaint: str | None) -> None:
    found = differences({FLOOR: seen(loss=9.0), PLAIN: seen(), FUSED: other})
    assert (complaint is None and not found) or (found.keys() == {FUSED} and complaint in found[FUSED])  # type: ignore[operator]


# --- the run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_measures_every_variant() -> None:
    model = ZOO["llama"]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = bench(model, "apply lora(r=4, dropout=0.1) to attn.*, mlp.*", batch=3, seq=8, repeats=1)
    assert [row.name for row in found.rows] == [FLOOR, FUSED, ONE_LIBRARY, PLAIN, HF_PEFT]
    assert (found.batch, found.seq, found.dtype, found.device) == (3, 8, "float32", "cpu")
    assert found.agrees, [row.note for row in found.rows]  # dropout off, for that
    for row in found.rows:
        assert row.seconds
        assert row.saved
        assert row.peak
        assert row.flops
        assert row.peak > row.saved
    base, fused, one_library, plain, theirs = found.rows
    assert (one_library.saved, one_library.flops) == (fused.saved, fused.flops)
    assert base.trainable == 0
    assert fused.trainable == plain.trainable == theirs.trainable
    assert plain.flops == theirs.flops  # HF PEFT's order of products is the best there is
    assert found.ratio(base, "seconds") == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_module_with_an_example_is_measured_on_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = bench(model, "apply lora(r=2) to linear", example=torch.ones(6, 3), repeats=1)
    assert (found.batch, found.seq) == (6, 0)
    assert found.agrees
    base = found.row(FLOOR)
    assert base is not None
    assert base.flops == 2 * 2 * 6 * (3 * 4 + 4 * 2)


def test_the_table_says_what_is_missing_and_what_differs() -> None:
    rows = (
        Measured(FLOOR, seconds=2.0, saved=1000, peak=2000, flops=10**9, loss=1.0),
        Measured(FUSED, seconds=1.0, saved=500, peak=1000, flops=10**9, loss=1.5, note="loss is 1.5", agrees=False),
        Measured(HF_PEFT, note="peft is not installed"),
    )
    text = rendered(bench_table(Bench("Model", "spec", 2, 8, "float32", "cpu", 1, 3, rows)))
    assert "1.0000 s" in text
    assert "0.50" in text
    assert "peftc: loss is 1.5" in text
    assert "HF PEFT: peft is not installed" in text


@pytest.mark.slow
@by_inductor
def test_torch_compile_takes_the_compiled_modules_and_the_floor_whole() -> None:
    found = bench(ZOO["llama"](), LORA, seq=16, repeats=1, with_torch_compile=True)
    rows = [row for row in found.rows if row.name.startswith("torch.compile")]
    assert [row.name for row in rows] == [f"torch.compile of {name}" for name in (FLOOR, FUSED, PLAIN, HF_PEFT)]
    assert found.agrees, [row.note for row in found.rows]
    assert all(row.seconds and row.saved for row in rows[:3]), [row.note for row in rows]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_hf_pefts_lora_saves_what_it_saved_before() -> None:
    """SmolLM2, batch 2 × 128: 1.31 of the floor's bytes, counted once by another program."""
    from models import smollm2

    found = bench(smollm2(), "apply lora(r=16, alpha=32) to attn.*, mlp.*", repeats=1)
    assert found.agrees, [row.note for row in found.rows]
    theirs = found.row(HF_PEFT)
    assert theirs is not None
    assert found.ratio(theirs, "saved") == pytest.approx(1.31, abs=0.005)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=97, **settings).save_pretrained(tmp_path)  # type: ignore[arg-type]
    return tmp_path / "config.json"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "lora.peft"
    path.write_text(LORA)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_the_command_prints_data(config: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "bench", spec, config, "--random-weights", "--json", "--repeats", 1, "--batch", 1, "--seq", 8
    )
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert data["agrees"]
    assert (data["batch"], data["seq"]) == (1, 8)
    assert [row["name"] for row in data["rows"]] == [FLOOR, FUSED, ONE_LIBRARY, PLAIN, HF_PEFT]
    assert data["rows"][0]["ratio"] == {"seconds": 1, "saved": 1, "peak": 1, "flops": 1}


def test_a_disagreement_ends_with_one(
    config: Path, spec: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        Measured(FLOOR, seconds=1.0),
        Measured(FUSED, seconds=1.0, note="loss is 0, of the plain graph 1", agrees=False),
    )
    found = Bench("Model", "spec", 2, 8, "float32", "cpu", 1, 1, rows)
    monkeypatch.setattr("peftc.bench.bench.bench", lambda *_, **__: found)
    status, out, _ = run(capsys, "bench", spec, config, "--random-weights", "--repeats", 1, "--seq", 8)
    assert status == 1
    assert "peftc: loss is 0, of the plain graph 1" in out


def test_a_batch_that_does_not_fit_the_model_is_said(
    tmp_path: Path, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=16).save_pretrained(tmp_path)
    status, out, err = run(capsys, "bench", spec, tmp_path / "config.json", "--random-weights", "--seq", 17)
    assert (status, out) == (1, "")
    assert "error[cannot-measure]" in err
    assert "2 × 17" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said(config: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "bench", spec, config, "--random-weights", "--device", "cuda")
    assert status == 1
    assert "error[no-device]" in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(config: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "bench", spec, config, "--random-weights", "--json", "--repeats", 2, "--device", "cuda"
    )
    assert (status, err) == (0, "")
    assert all(row["seconds"] and row["peak"] for row in json.loads(out)["rows"])


def test_loss_without_labels_is_the_mean_square() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(Variant("a", model).loss(((x,), {})), model(x).square().mean())
