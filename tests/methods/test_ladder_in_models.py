"""A ladder in its model: no gradient enters a block, no token sees the future, and how the compiler takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import peftc
from autograd import saved_bytes
from ladders import QUICK, SPEC, base_of, compiled, per_model
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- No gradient through the backbone ----------------------------------------------------------------------------


@per_model((*QUICK, "bart"))
def test_no_gradient_enters_a_block(name: str) -> None:
    """Not even where every weight of the model asks for one; what stands above the ladder would get its own."""
    module = compiled(name)
    frozen = {key: tensor for key, tensor in module.named_parameters() if not tensor.requires_grad}
    for tensor in frozen.values():
        tensor.requires_grad_()
    try:
        module(**inputs(module.base)).loss.backward()
        # a block is one autograd function, whose ladder has a gradient: it says zero of what has none
        reached = {key for key, tensor in frozen.items() if tensor.grad is not None and tensor.grad.any()}
    finally:
        for tensor in frozen.values():  # of a module that other tests take, too
            tensor.requires_grad_(False).grad = None
    assert not any(key.startswith(tuple(f"{path}." for path in module.plan.sites.blocks)) for key in reached)
    assert reached


@per_model(("llama", "gpt2", "bert"))
def test_it_keeps_a_fraction_of_what_lora_keeps(name: str) -> None:
    """Bytes for the backward pass, counted: nothing of the blocks but the hidden states between them.

    Less than what LoRA keeps that learns fewer parameters, even of two small blocks under a head that both keep: 0.35
    to 0.52 of it.
    """
    ladder = compiled(name, "apply ladder(size=8) to block")
    lora = compiled(name, "apply lora(r=1) to attn.*, mlp.*")
    learning, fewer = ladder.plan.trainable, lora.plan.trainable
    assert fewer < learning
    kept, more = saved_bytes(ladder), saved_bytes(lora)
    assert kept < 0.6 * more


# ---- Causality and padding ---------------------------------------------------------------------------------------


@per_model(("llama", "gpt2"))
def test_no_token_sees_the_future(name: str) -> None:
    module = compiled(name)
    batch = inputs(module.base)
    with torch.no_grad():
        before = module(**batch).logits
        batch["input_ids"][:, 4] = batch["input_ids"][:, 4] % 50 + 10
        after = module(**batch).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@per_model(("t5",))
def test_no_decoder_token_sees_the_future_and_none_the_encoders_padding(name: str) -> None:
    module = compiled(name)
    batch = inputs(module.base)
    batch["attention_mask"][:, -2:] = 0
    with torch.no_grad():
        before = module(**batch).logits
        padded = {**batch, "input_ids": batch["input_ids"].index_fill(1, torch.tensor([5, 6]), 13)}
        # the masked scores are -inf or the least float: what they weigh is exactly nothing
        torch.testing.assert_close(module(**padded).logits, before, rtol=0, atol=1e-6)
        later = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([5]), 13)}
        after = module(**later).logits
    assert torch.equal(before[:, :6], after[:, :6])  # the decoder reads labels shifted by one
    assert not torch.allclose(before[:, 6:], after[:, 6:])


# ---- Inside the compiler -----------------------------------------------------------------------------------------


def deep_llama(layers: int) -> PreTrainedModel:
    model = ZOO["llama"]()
    config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": layers})
    torch.manual_seed(0)
    built: PreTrainedModel = type(model)(config)
    return built


@pytest.mark.xdist_group("llama")
def test_blocks_between_the_ends_are_equal() -> None:
    """What FSDP and `torch.compile` want: one signature and one body, the carried value among them."""
    module = peftc.compile(deep_llama(4), SPEC)
    shapes = []
    for path in module.plan.sites.blocks:
        block = module.get_submodule(path)
        assert isinstance(block, fx.GraphModule)
        targets = [str(node.target) for node in block.graph.nodes if node.op not in ("placeholder", "output")]
        output = next(iter(block.graph.find_nodes(op="output"))).args[0]
        leaving = len(output) if isinstance(output, tuple) else 1
        shapes.append((len(block.graph.find_nodes(op="placeholder")), leaving, targets))
    first, one, other, last = shapes
    assert one == other
    assert (first[0], first[1]) == (one[0] - 1, 2)
    assert (last[0], last[1]) == (one[0], 1)


@per_model(("llama", "t5"))
def test_a_base_in_half_precision(name: str) -> None:
    """The side network computes and learns in fp32; what it adds is in the base's precision."""
    base = ZOO[name]().bfloat16()
    module = peftc.compile(base, SPEC)
    module.logits_in_training = True
    assert {tensor.dtype for tensor in module.trainable_parameters().values()} == {torch.float32}
    result = module(**inputs(base))
    assert result.logits.dtype == torch.bfloat16
    result.loss.backward()
    assert all(tensor.grad is not None for tensor in module.trainable_parameters().values())


@per_model(("llama", "t5"))
def test_dropout_follows_the_mode(name: str) -> None:
    """Its own, and for a decoder also that of the attention it borrows."""
    module = compiled(name, "apply ladder(dropout=0.5) to block")
    batch = inputs(module.base)
    with torch.no_grad():
        assert torch.equal(module(**batch).loss, module(**batch).loss)
        module.train()
        assert not torch.equal(module(**batch).loss, module(**batch).loss)


@pytest.mark.xdist_group("llama")
def test_what_stands_above_a_ladder_may_learn_too() -> None:
    module = compiled("llama", f"{SPEC}\napply lora(r=2) to head")
    module(**inputs(base_of("llama"))).loss.backward()
    assert all(tensor.grad is not None for tensor in module.trainable_parameters().values())


@pytest.mark.xdist_group("llama")
def test_it_does_not_merge_and_says_why() -> None:
    with pytest.raises(peftc.PeftcError, match="a network of its own beside the model"):
        compiled("llama").merge()


class Halving(nn.Module):
    """Each block halves its width: no residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Linear(width, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.as_tensor(self.narrow(x)))


def test_blocks_without_a_residual_stream_are_refused() -> None:
    model = nn.Sequential(Halving(16), Halving(8))
    with pytest.raises(peftc.PeftcError, match="no hidden state runs through it"):
        peftc.plan(model, "apply ladder(size=2) to block", example=torch.zeros(2, 3, 16))


@per_model(("llama", "t5"))
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    module = compiled(name)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    batch = inputs(module.base)
    result = fast(**batch)
    result.loss.backward()
    torch.testing.assert_close(result.logits, module(**batch).logits, rtol=1e-5, atol=1e-5)
    assert all(tensor.grad is not None for tensor in module.trainable_parameters().values())
