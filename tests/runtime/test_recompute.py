"""Blocks that are computed again because a trainer asks for it, after the compile: equal numbers, fewer bytes kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from marks import first_is_quick
from peftc.bench.saved_bytes import saved_bytes
from training import LORA, compiled, randomise, rows, trainer
from zoo import ZOO, inputs

SPECS = {
    "lora": LORA,
    "dropout": "apply lora(r=4, dropout=0.3) to attn.*, mlp.*",
    "quantised": "quantize linear except head with nf4(double=true)\napply lora(r=4) to attn.q, attn.v",
    "prefix": "apply prefix(length=3) to attn",
    "tasks": "task a { apply lora(r=2) to attn.q }\ntask b { apply dora(r=2) to mlp.up }",
}
FIRST = "apply lora(r=4) to attn.q\ncheckpoint block in layers[:1]"


def drawn(name: str, spec: str) -> peftc.CompiledModule:
    """A compiled model whose adapters do something."""
    model = compiled(name, spec)
    randomise(model)
    return model


def step(model: peftc.CompiledModule) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of what learns, of one draw of dropout."""
    model.zero_grad()
    torch.manual_seed(3)
    loss: Tensor = model(**inputs(model.base)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model: peftc.CompiledModule, call: dict[str, Any] | None = None) -> int:
    """Bytes that a training step holds between its passes, less what is there anyway."""
    call = inputs(model.base) if call is None else call
    given = (value for value in call.values() if isinstance(value, Tensor))
    return saved_bytes(lambda: model(**call).loss, [*model.parameters(), *model.buffers(), *given])


def assert_equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2", "bert", "t5", "vit"]))
def test_a_step_is_the_same_and_keeps_less(name: str, spec: str) -> None:
    model = drawn(name, SPECS[spec])
    before, much = step(model), kept(model)
    assert not model.is_activation_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_equal(before, step(model))
    assert kept(model) < 0.7 * much
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert kept(model) == much


def test_it_is_what_the_spec_says_with_checkpoint() -> None:
    said, asked = drawn("llama", f"{LORA}\ncheckpoint block"), drawn("llama", LORA)
    asked.activation_checkpointing_enable()
    assert kept(asked) == kept(said)
    assert_equal(step(asked), step(said))


def test_a_spec_that_says_which_blocks_has_its_way() -> None:
    model = drawn("llama", FIRST)
    first = kept(model)
    assert model.is_activation_checkpointing
    for change in (model.activation_checkpointing_enable, model.activation_checkpointing_disable):
        change()
        assert kept(model) == first
        assert model.is_activation_checkpointing


def test_every_so_many_blocks() -> None:
    model, said = drawn("llama", "apply lora(r=4) to attn.q"), drawn("llama", FIRST)
    model.gradient_checkpointing_enable({"every_n_layers": 2, "use_reentrant": True})
    assert kept(model) == kept(said)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept(model) < kept(said)


def test_graphs_for_other_inputs_and_tasks_do_so_too() -> None:
    model = drawn("llama", SPECS["tasks"])
    batch = inputs(model.base)
    longer = {**batch, "position_ids": torch.arange(7).expand(2, 7)}
    calls: list[Any] = [batch, longer, {**batch, "tasks": ["a", "b"]}]
    much = [kept(model, call) for call in calls]
    model.activation_checkpointing_enable()
    less = [kept(model, call) for call in calls]
    assert all(few < 0.8 * many for few, many in zip(less, much, strict=True))


def test_a_copy_does_what_its_model_does(tmp_path: Path) -> None:
    model = drawn("llama", LORA)
    much = kept(model)
    model.activation_checkpointing_enable()
    twin = copy.deepcopy(model)
    assert twin.is_activation_checkpointing
    assert kept(twin) == kept(model) < much
    twin.activation_checkpointing_disable()
    assert kept(twin) == much > kept(model)
    model.save(tmp_path)  # what a training step keeps is no part of an adapter
    assert kept(peftc.load(tmp_path, model.base)) == much


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": True}, "offload"),
        ({"every_n_layers": 0}, "every_n_layers is 0"),
        ({"activation_checkpointing_kwargs": {"context_fn": print}}, "context_fn"),
        ({"activation_checkpointing_kwargs": {"reentrant": False}}, "reentrant is no option"),
    ],
)
def test_what_is_asked_beyond_that_is_refused(options: dict[str, Any], words: str) -> None:
    model = drawn("llama", LORA)
    with pytest.raises(peftc.PeftcError, match=rf"error\[cannot-recompute\].*{words}"):
        model.activation_checkpointing_enable(**options)
    assert not model.is_activation_checkpointing


def test_a_graph_that_runs_as_it_is_written_is_refused() -> None:
    with pytest.raises(peftc.PeftcError, match=r"error\[cannot-recompute\].*fuse=False"):
        peftc.compile(ZOO["llama"](), LORA, fuse=False).gradient_checkpointing_enable()


@pytest.mark.parametrize("spec", ["lora", "dropout"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_trainer_trains_as_without(spec: str, tmp_path: Path) -> None:
    found = []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        torch.manual_seed(0)
        run = trainer(drawn("llama", SPECS[spec]), tmp_path, rows(9, 20), steps=4, lr=1e-2, **settings)
        run.train()
        found.append(run.losses)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
