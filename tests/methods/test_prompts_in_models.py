"""Prompts among what else is there: a model's positions, other prompts, adapted blocks, memory, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import peftc
from promptcases import LENGTH, NEAR, PROMPT, by_hand, compiled, padded
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- Positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 64), ("bert", 64), ("opt", 64), ("roberta", 63)])
def test_a_prompt_takes_its_share_of_the_positions(name: str, positions: int) -> None:
    """The table of GPT-2 and BERT starts at the first row; OPT's has two rows more, and RoBERTa's leaves one out."""
    ours, model = compiled(name, f"apply prompt(length={LENGTH})"), ZOO[name]()
    room = positions - LENGTH
    with torch.no_grad():
        ours(**inputs(model, 2, room))
        with pytest.raises(peftc.PeftcError, match=f"{room + 1} tokens, .* leaves positions for {room}") as raised:
            ours(**inputs(model, 2, room + 1))
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["no-room"]


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_computed_positions_never_end(name: str) -> None:
    with torch.no_grad():
        compiled(name, f"apply prompt(length={LENGTH})")(**inputs(ZOO[name](), 2, 150))


# ---- Together with others --------------------------------------------------------------------------------------------


def test_prompts_stand_in_file_order_and_share_the_input() -> None:
    """Each stands in front of the one before it; each block is still a module of its own."""
    model = ZOO["llama"]().eval()
    ours = peftc.compile(model, "apply prompt(length=3)\napply ptuning(length=4, encoder=mlp, hidden=6)").eval()
    assert all(isinstance(ours.get_submodule(f"model.layers.{layer}"), fx.GraphModule) for layer in (0, 1))
    batch = padded(model, "left")
    state = {name.removeprefix("sequence.ptuning."): tensor for name, tensor in ours.state_dict().items()}
    inner = state["embedding.weight"]
    for place in (0, 2, 4):
        inner = F.linear(
            inner.relu() if place else inner, state[f"mlp_head.{place}.weight"], state[f"mlp_head.{place}.bias"]
        )
    prompt = torch.cat([inner, ours.get_parameter(PROMPT)])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).loss, by_hand(model, prompt, batch).loss, rtol=NEAR, atol=NEAR)


def test_a_prompt_over_adapted_blocks() -> None:
    """With random branches in the blocks: a prompt of the embeddings of tokens is those tokens in front."""
    rest = "apply lora(r=2) to attn.q, mlp.down\napply adapter(size=4) to mlp\ntrain norm"
    model = ZOO["llama"]().eval()
    ours = peftc.compile(model, f"apply prompt(length={LENGTH})\n{rest}").eval()
    plain = peftc.compile(model, rest).eval()
    random = torch.Generator().manual_seed(0)
    tokens = torch.arange(10, 10 + LENGTH)
    with torch.no_grad():
        for parameter in ours.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        ours.get_parameter(PROMPT).copy_(model.get_input_embeddings()(tokens))
    plain.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name != PROMPT})
    batch = padded(model, "left")
    in_front = {
        "input_ids": torch.cat([tokens.expand(3, -1), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(3, LENGTH, dtype=torch.long), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full((3, LENGTH), -100), batch["labels"]], 1),
    }
    mine, other = ours(**batch), plain(**in_front)
    mine.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(mine.loss, other.loss, rtol=NEAR, atol=NEAR)
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=NEAR, atol=NEAR)


def test_memory_counts_the_prompt() -> None:
    """The activations of a sequence of 96 with a prompt of 32 are those of a sequence of 128."""
    model = ZOO["llama"]()
    short, long = (peftc.plan(model, f"apply prompt(length={length})") for length in (1, 32))
    assert long.memory(2, 96).activations == short.memory(2, 127).activations
    assert long.memory(2, 96).activations > short.memory(2, 96).activations > 0


def test_copies_are_independent() -> None:
    """A copied module keeps its own prompt, and still knows how long its input may be."""
    ours = compiled("gpt2", f"apply prompt(length={LENGTH})")
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.get_parameter(PROMPT).zero_()
    assert ours.get_parameter(PROMPT).abs().max() > 0
    with pytest.raises(peftc.PeftcError, match="leaves positions"):
        other(**inputs(ZOO["gpt2"](), 2, 64))
