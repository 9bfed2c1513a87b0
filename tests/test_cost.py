"""The memory table: parameters exactly, activations as autograd itself keeps them."""

from __future__ import annotations

import pytest
import torch

import peftc
from marks import first_is_quick
from peftc.cost import formatted_bytes
from peftc.module import CompiledModule
from zoo import ZOO

BATCH, SEQ = 4, 32


def saved_bytes(compiled: CompiledModule) -> int:
    """The unique storages of the autograd graph, without parameters and buffers."""
    ids = torch.randint(3, 90, (BATCH, SEQ))
    labels = (
        ids if "ForCausalLM" in compiled.plan.sites.model or "LMHead" in compiled.plan.sites.model else ids[:, 0] % 2
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in (*compiled.parameters(), *compiled.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    "spec", first_is_quick(["apply lora(r=4) to attn.*, mlp.*", 'train "**"', "apply ladder to block"])
)
@pytest.mark.parametrize("name", first_is_quick(["llama", "opt", "bert", "gpt2", "mixtral"]))
def test_activations_are_what_autograd_keeps(name: str, spec: str) -> None:
    """Within a tenth of the measured bytes: small operations round, and a copy here and there is a view.

    In eval mode, since the CPU's dropout keeps a float an element where an accelerator's keeps a byte.
    """
    compiled = peftc.compile(ZOO[name](), spec)
    compiled.eval()
    assert compiled.plan.memory(BATCH, SEQ).activations == pytest.approx(saved_bytes(compiled), rel=0.1)


def test_weights_gradients_and_optimiser_state_are_exact() -> None:
    plan = peftc.plan(ZOO["llama"](), "apply lora(r=4) to attn.q, attn.v\ntrain norm")
    memory = plan.memory(optimizer="adamw")
    assert memory.weights == 4 * plan.total  # the trained norms are the base's own parameters
    assert memory.gradients == 4 * plan.trainable
    assert memory.optimizer == 8 * plan.trainable
    assert plan.memory(optimizer="sgd").optimizer == 0
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_activations_grow_with_the_batch() -> None:
    plan = peftc.plan(ZOO["llama"](), "apply lora(r=4) to attn.q, attn.v")
    one, four = (plan.memory(batch, 64).activations for batch in (1, 4))
    assert 3.9 < four / one <= 4


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2_631_516_160, "2.63 GB"), (3e12, "3.00 TB")]
)
def test_sizes_are_written_in_decimal_units(size: float, text: str) -> None:
    assert formatted_bytes(size) == text
