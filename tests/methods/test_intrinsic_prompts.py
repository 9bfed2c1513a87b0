"""Intrinsic prompt tuning: its two phases, its decoder against the formula, and the files between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

import peftc
from promptcases import NEAR, by_hand, compiled, padded
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

SUBSPACE = "apply ipt(length=4, dim=3, hidden=16, learn=decoder, tasks=2)"


def task_batch(answer: int) -> dict[str, Tensor]:
    """A small task: whatever is asked, say one word."""
    batch = inputs(ZOO["llama"](), 4, 6)
    batch["labels"] = torch.full_like(batch["input_ids"], answer)
    return batch


def trained(module: peftc.CompiledModule, steps: int, batch: Callable[[int], dict[str, Tensor]]) -> float:
    optimizer = torch.optim.Adam(module.param_groups(lr=3e-2))
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(**batch(step)).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def learn_subspace(folder: Path) -> peftc.CompiledModule:
    torch.manual_seed(0)
    module = peftc.compile(ZOO["llama"](), SUBSPACE)
    task = module.get_buffer("sequence.ipt.task")

    def batch(step: int) -> dict[str, Tensor]:
        task.copy_(F.one_hot(torch.tensor(step % 2), 2))
        return task_batch((10, 20)[step % 2])

    trained(module, 120, batch)
    module.save(folder)
    return module


def test_intrinsic_prompt_tuning_in_two_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three numbers in a subspace that two tasks were learned in do more than three numbers in a random one."""
    first = learn_subspace(tmp_path / "subspace")
    monkeypatch.chdir(tmp_path)
    losses = {}
    for where, more in (("learned", ', decoder="subspace"'), ("random", "")):
        torch.manual_seed(1)
        module = peftc.compile(ZOO["llama"](), f"apply ipt(length=4, dim=3, hidden=16{more})")
        assert list(module.trainable_parameters()) == ["sequence.ipt.z"]
        assert module.plan.trainable == 3
        if more:
            assert torch.equal(
                module.get_buffer("sequence.ipt.decoder.2.weight"), first.get_parameter("sequence.ipt.decoder.2.weight")
            )
        frozen = module.get_buffer("sequence.ipt.decoder.0.weight").clone()
        losses[where] = trained(module, 40, lambda _step: task_batch(20))
        assert torch.equal(module.get_buffer("sequence.ipt.decoder.0.weight"), frozen)
    assert losses["learned"] < losses["random"] - 0.2


def test_a_prompt_is_decoded_by_the_papers_formula() -> None:
    ours, model = (
        compiled("llama", "apply ipt(length=4, dim=3, hidden=16, learn=decoder, tasks=2)"),
        ZOO["llama"]().eval(),
    )
    state = {name.removeprefix("sequence.ipt."): tensor for name, tensor in ours.state_dict().items()}
    for task in (0, 1):
        ours.get_buffer("sequence.ipt.task").copy_(F.one_hot(torch.tensor(task), 2))
        z = state["z"][task]
        inner = [torch.tanh((state["decoder.0.weight"][j] * z).sum() + state["decoder.0.bias"][j]) for j in range(16)]
        flat = state["decoder.2.weight"] @ torch.stack(inner) + state["decoder.2.bias"]
        prompt = torch.stack([flat[32 * i : 32 * (i + 1)] for i in range(4)])
        batch = padded(model, "left")
        with torch.no_grad():
            torch.testing.assert_close(ours(**batch).loss, by_hand(model, prompt, batch).loss, rtol=NEAR, atol=NEAR)


def test_a_saved_second_phase_needs_the_first_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peftc.compile(ZOO["llama"](), SUBSPACE).save(tmp_path / "subspace")
    monkeypatch.chdir(tmp_path)
    module = peftc.compile(ZOO["llama"](), 'apply ipt(length=4, dim=3, hidden=16, decoder="subspace")').eval()
    module.save(tmp_path / "adapter")
    monkeypatch.chdir("/")
    loaded = peftc.load(tmp_path / "adapter", ZOO["llama"]()).eval()
    batch = inputs(ZOO["llama"]())
    assert torch.equal(loaded(**batch).logits, module(**batch).logits)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("missing", "there is no file missing"),
        ("../outside.safetensors", "lies outside"),
        ("link.safetensors", "lies outside"),
        ("text.safetensors", "is no safetensors file"),
        ("other.safetensors", "it has no tensor sequence.ipt.decoder.0.weight"),
        ("shape.safetensors", r"\[2, 2\], and \[16, 3\] is needed"),
        (".", "there is no file adapter.safetensors"),
    ],
)
def test_a_file_that_no_decoder_comes_out_of(file: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "text.safetensors").write_text("no tensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    safetensors.torch.save_file({"sequence.ipt.decoder.0.weight": torch.zeros(2, 2)}, folder / "shape.safetensors")
    spec = folder / "phase2.peft"
    spec.write_text(f'apply ipt(length=4, dim=3, hidden=16, decoder="{file}")\n')
    with pytest.raises(peftc.PeftcError, match=reason) as raised:
        peftc.compile(ZOO["llama"](), spec)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["bad-state-file"]
