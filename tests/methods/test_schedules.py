"""Who drives methods that act while a model trains: a Trainer, stopped and resumed, and loops by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftc
from scheduled import RELORA, adamw, batch, compiled, copies, equal, train

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- Trainer -------------------------------------------------------------------------------------------------------


class Recorder(Trainer):
    """Keeps the loss of every step at full precision; the log rounds it."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        assert isinstance(loss, Tensor)
        self.losses.append(loss.item())
        return loss


class Interrupt(TrainerCallback):
    """Ends the process, as it were, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULED = """
apply relora(r=2, every=2, warmup=1) to attn.q, attn.v
apply diff_pruning(prune=4, sparsity=0.1, l0=1e-5) to mlp.up
"""


def trainer(model: peftc.CompiledModule, folder: Path, *callbacks: TrainerCallback) -> Recorder:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, learning_rate=1e-2, disable_tqdm=True, use_cpu=True, save_steps=3,
        dataloader_pin_memory=False, logging_strategy="no", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, seed=1, save_strategy="steps",
    )  # fmt: skip
    texts = [{"input_ids": row, "labels": row} for step in range(15) for row in batch(step)["input_ids"].tolist()]
    made = Recorder(model, arguments, train_dataset=texts, callbacks=[model.callback(), *callbacks])
    made.losses = []
    return made


def test_trainer_resumes_a_schedule_bit_for_bit(tmp_path: Path) -> None:
    whole = compiled("gpt2", SCHEDULED)
    uninterrupted = trainer(whole, tmp_path / "whole")
    uninterrupted.train()
    assert not uninterrupted.optimizer.optimizer._optimizer_step_post_hooks, "the callback has let go"  # type: ignore[union-attr]
    acted = [tensor.any() for name, tensor in whole.state_dict().items() if name.endswith(("merged", "pruned"))]
    assert len(acted) == 2 * 3
    assert all(acted)

    stopped = trainer(compiled("gpt2", SCHEDULED), tmp_path / "stopped", Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = compiled("gpt2", SCHEDULED)
    resumed = trainer(again, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert resumed.losses == uninterrupted.losses[6:], "two batches a step"
    equal(again, whole)


def test_a_callback_that_was_cut_short_does_not_act_twice() -> None:
    model = compiled("gpt2", RELORA)
    callback, optimizer = model.callback(), adamw(model)

    class State:
        global_step, max_steps = 0, 10

    for _ in range(2):  # the second training begins though the first has not ended
        callback.on_train_begin(None, State(), None, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    callback.on_train_end(None, State(), None)
    callback.on_train_end(None, State(), None)
    assert not optimizer._optimizer_step_post_hooks


# ---- Loops by hand -------------------------------------------------------------------------------------------------


def test_a_step_of_several_backward_passes_is_one_step() -> None:
    """Two halves of the loss of the same batch add up to it, dropout's draws included."""
    whole, halves = compiled("llama", RELORA), compiled("llama", RELORA)
    for model, parts in ((whole, 1), (halves, 2)):
        optimizer = adamw(model)
        follower = model.follow(optimizer)
        for step in range(1, 5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            for _ in range(parts):
                (model(**batch(step)).loss / parts).backward()
            optimizer.step()
        assert follower.step == 4
    assert all(state["merged"].any() for state in copies(halves))
    equal(halves, whole, 1e-6)


TWO = """
apply relora(r=2, every=2, warmup=1) to attn.q
apply relora(r=2, every=3, warmup=1) to mlp.down
"""


def test_two_optimisers_drive_what_each_of_them_trains() -> None:
    one, two = compiled("llama", TWO), compiled("llama", TWO)
    together = adamw(one)
    one.follow(together)
    down = [parameter for name, parameter in two.trainable_parameters().items() if "mlp" in name]
    rest = [parameter for name, parameter in two.trainable_parameters().items() if "mlp" not in name]
    apart = [AdamW(members, lr=1e-2, weight_decay=0.1) for members in (rest, down)]
    followers = [two.follow(optimizer) for optimizer in apart]
    assert [{binding.site.name[-6:] for binding, _ in f.statements[0]} for f in followers] == [{"q_proj"}, {"n_proj"}]
    for step in range(1, 6):
        train(one, together, range(step, step + 1))
        torch.manual_seed(step)
        loss = two(**batch(step)).loss
        for optimizer in apart:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in apart:
            optimizer.step()
    equal(two, one)


def test_what_no_longer_follows_does_nothing() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    follower = model.follow(optimizer)
    train(model, optimizer, range(1, 3))
    follower.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, range(3, 5))
    assert not any(state["merged"].any() for state in copies(model))
