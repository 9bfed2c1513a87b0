"""What is refused of models and trainings in parts, and what is told of their memory: on one process."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import peftc
from peftc.distributed.fsdp import blocks_alone, refuse
from peftc.distributed.progress import load_progress, save_progress
from peftc.distributed.ranks import by_rank
from training import compiled
from zoo import ZOO


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("apply adalora(r=4, target=2) to attn.q", "adalora cannot be on several processes in parts: its schedule"),
        ("task a { train norm }\ntask b { train bias }", "a spec of several tasks"),
    ],
)
def test_what_changes_whole_tensors_is_refused(spec: str, words: str) -> None:
    plan = peftc.plan(ZOO["gpt2"](), spec)
    with pytest.raises(peftc.PeftcError, match="not-on-parts") as caught:
        refuse(plan)
    assert words in str(caught.value)


class Scaled(nn.Module):
    """A layer whose result is multiplied by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(self.layer(x), self.scale)


def test_a_single_number_that_learns_is_refused() -> None:
    plan = peftc.plan(Scaled(), 'train "scale"', example=torch.randn(2, 6))
    with pytest.raises(peftc.PeftcError, match="scale cannot be on several processes in parts: it is a single number"):
        refuse(plan)


def test_bytes_by_rank() -> None:
    plan = peftc.plan(ZOO["llama"](), "quantize linear except head with nf4\napply lora(r=3) to attn.*")
    whole = plan.memory(2, 8)
    assert by_rank(plan, 4, 2, 8, "adamw", shard=False).each == (whole,) * 4
    found = by_rank(plan, 4, 2, 8, "adamw", shard=True)
    for kind in ("weights", "gradients", "optimizer"):
        assert sum(getattr(memory, kind) for memory in found.each) == getattr(whole, kind)
    assert {memory.activations for memory in found.each} == {whole.activations}
    assert found.each[0].gradients > found.each[3].gradients  # three rows of each A, for four processes
    assert found.gathered == whole.weights  # both blocks, and what is in none
    assert [line.split()[0] for line in found.lines()] == ["rank", "0-2", "3"]
    double = peftc.plan(ZOO["llama"](), "quantize linear except head with nf4(double=true)\napply lora(r=3) to attn.*")
    alone = sum(4 for held in double.held() if not held.shape)  # the mean of each weight's scales
    each = by_rank(double, 4, 2, 8, "adamw", shard=True).each
    assert alone
    assert sum(memory.weights for memory in each) == double.memory(2, 8).weights + 3 * alone


def test_progress_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = compiled("llama", "apply lora(r=2) to attn.q")
    optimizer = torch.optim.AdamW(model.param_groups(1e-3))
    tokens = torch.randint(0, 97, (2, 6))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert len(blocks_alone(model)) == 2
    folder = tmp_path / "progress"
    save_progress(model, optimizer, folder, step=1)
    assert load_progress(model, optimizer, folder) == {"step": 1}

    def refusal() -> str:
        before = {name: tensor.detach().clone() for name, tensor in model.trainable_parameters().items()}
        with pytest.raises(peftc.PeftcError, match="bad-progress") as caught:
            load_progress(model, optimizer, folder)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.trainable_parameters().items())
        return str(caught.value)

    with pytest.raises(peftc.PeftcError, match="something is there already"):
        save_progress(model, optimizer, folder)
    told = json.loads((folder / "progress.json").read_text())
    for key, value, words in (
        ("groups", [], "other groups of parameters"),
        ("groups", 3, "cut short or altered"),
        ("tensors", told["tensors"] | {"model.x": [1]}, "parts of model.x are missing"),
        ("scalars", {"optimizer.x.step": 1.0}, "other parameters learn there"),
    ):
        (folder / "progress.json").write_text(json.dumps(told | {key: value}))
        assert words in refusal()
    (folder / "progress.json").write_text(json.dumps(told))
    (tensors,) = folder.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    refusal()
    tensors.unlink()
    assert "parts of" in refusal()
    (folder / "progress.json").unlink()
    assert "which is written last" in refusal()
