"""AdaLoRA's schedule: step by step as in HF PEFT, by hand and under a Trainer, and over a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import peftc
from peftc.graph.ir import get_attribute
from training import gradients_by_their_names
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

SITES = 4  # q_proj and down_proj of two layers
SETTINGS = {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 8, "deltaT": 3, "total_step": 30}
SPEC = "apply adalora(r=4, target=2, warmup=5, final=8, interval=3{}) to attn.q, mlp.down"


def tensors(compiled: peftc.CompiledModule, name: str) -> dict[str, Tensor]:
    """One tensor of each site."""
    return {b.site.name: get_attribute(compiled, b.names[name]).detach() for b in compiled.plan.bindings}


def learn(compiled: peftc.CompiledModule, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    compiled.train()
    optimizer.zero_grad()
    loss: Tensor = compiled(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("changes", [{}, {"tinit": 0, "tfinal": 0}, {"deltaT": 1, "beta1": 0.5, "beta2": 0.9}], ids=str)
def test_thirty_steps_as_in_hf_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    """From the same state and the same gradients: the same triplets cut at each step, bit for bit the same values."""
    torch.manual_seed(0)
    settings = {**SETTINGS, **changes}
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **settings)
    theirs: Any = peft.get_peft_model(ZOO["llama"](), config)
    theirs.save_pretrained(tmp_path)
    compiled = peftc.load_peft(ZOO["llama"](), tmp_path)
    own = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.05)
    optimizers = optimizer, torch.optim.AdamW(own.values(), lr=0.05)
    compiled.follow(optimizer)
    batch = inputs(ZOO["llama"]())
    budgets = set()
    for step in range(1, 31):
        learn(compiled, optimizer, batch)
        for name, gradient in gradients_by_their_names(compiled).items():
            own[f"base_model.model.{name}.default"].grad = gradient
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step)
        for site, values in tensors(compiled, "E").items():
            assert torch.equal(values, own[f"base_model.model.{site}.lora_E.default"]), (step, site)
        pattern = theirs.peft_config["default"].rank_pattern
        for site, kept in tensors(compiled, "kept").items():
            assert kept[:, 0].tolist() == (pattern[f"{site}.lora_E.default"] if pattern else [True] * 4)
        budgets.add(sum(int(kept.sum()) for kept in tensors(compiled, "kept").values()))
    assert len(budgets) > 3, "the budget fell in several cuts"
    assert min(budgets) == 2 * SITES


def test_the_schedule_leaves_the_target_and_the_loss_falls() -> None:
    torch.manual_seed(0)
    compiled = peftc.compile(ZOO["llama"](), SPEC.format(", steps=30"))
    batch = inputs(ZOO["llama"]())
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.02)
    follower = compiled.follow(optimizer)
    losses = [learn(compiled, optimizer, batch) for _ in range(30)]
    left = [int((values != 0).sum()) for values in tensors(compiled, "E").values()]
    assert sum(left) == 2 * SITES
    assert losses[-1] < losses[0]
    assert not any("peftc_sensitivity" in state for state in optimizer.state.values()), "no longer needed at the end"
    follower.remove()
    learn(compiled, optimizer, batch)
    assert sum(int((values != 0).sum()) for values in tensors(compiled, "E").values()) > 2 * SITES


def test_the_penalty_makes_p_and_q_orthogonal() -> None:
    torch.manual_seed(0)
    compiled = peftc.compile(ZOO["llama"](), "apply adalora(r=4, target=4, orthogonality=1) to attn.q, mlp.down")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.02, weight_decay=0)
    batch = inputs(ZOO["llama"]())
    for _ in range(60):
        learn(compiled, optimizer, batch)
    for q in tensors(compiled, "Q").values():
        assert (q @ q.T - torch.eye(4)).norm() < 0.5  # from 2, the norm of the identity


def test_training_goes_on_from_a_checkpoint() -> None:
    """The optimiser's state dict holds what the importance is smoothed from."""

    def fresh() -> tuple[peftc.CompiledModule, torch.optim.Optimizer]:
        torch.manual_seed(0)
        compiled = peftc.compile(ZOO["llama"](), SPEC.format(", steps=30"))
        return compiled, torch.optim.AdamW(compiled.parameters(), lr=0.02)

    batch = inputs(ZOO["llama"]())
    whole, optimizer = fresh()
    whole.follow(optimizer)
    for step in range(20):
        if step == 10:
            again, second = fresh()
            again.load_state_dict(whole.state_dict())
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        learn(whole, optimizer, batch)
    again.follow(second, step=10)
    for _ in range(10):
        learn(again, second, batch)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # as of a folder of their own
def test_hf_peft_reads_what_is_left(tmp_path: Path) -> None:
    """Their folder has only the triplets that stay, and says which those are; both ways."""
    torch.manual_seed(0)
    compiled = peftc.compile(ZOO["llama"](), SPEC.format(", steps=20"))
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.05)
    compiled.follow(optimizer)
    batch = inputs(ZOO["llama"]())
    for _ in range(20):
        learn(compiled, optimizer, batch)
    compiled.eval().save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(ZOO["llama"](), str(tmp_path))
    theirs.eval()
    batch.pop("labels")  # with these HF PEFT's asks for the adapter that trains, and of one that is read none does
    expected = compiled(**batch).logits
    torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    shapes = [p.shape[0] for name, p in theirs.named_parameters() if "lora_E" in name]
    assert sum(shapes) == 2 * SITES
    back = peftc.load_peft(ZOO["llama"](), tmp_path).eval()
    torch.testing.assert_close(back(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert {k: v.tolist() for k, v in tensors(back, "kept").items()} == {
        k: v.tolist() for k, v in tensors(compiled, "kept").items()
    }


def test_a_trainer_knows_the_number_of_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = peftc.compile(ZOO["llama"](), SPEC.format(""))
    batch = inputs(ZOO["llama"]())
    rows = [{name: tensor[index % 2] for name, tensor in batch.items()} for index in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=18, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        learning_rate=0.02, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=compiled, args=arguments, train_dataset=rows, callbacks=[compiled.callback()]).train()
    assert sum(int((values != 0).sum()) for values in tensors(compiled, "E").values()) == 2 * SITES


def test_without_a_trainer_the_number_of_steps_must_be_given() -> None:
    compiled = peftc.compile(ZOO["llama"](), SPEC.format(""))
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.02)
    with pytest.raises(peftc.PeftcError, match="bad-schedule"):
        compiled.follow(optimizer)
    with pytest.raises(peftc.PeftcError, match="leave none of 10 steps"):
        compiled.follow(optimizer, total=10)
    compiled.follow(optimizer, total=20)
    learn(compiled, optimizer, inputs(ZOO["llama"]()))
