"""The memory table: parameters exactly, activations as autograd itself keeps them."""

from __future__ import annotations

import pytest
import torch

import peftc
from autograd import BATCH, SEQ, saved_bytes, saving
from marks import first_is_quick
from peftc.planning.memory import formatted_bytes
from subjects import Convolved
from zoo import ZOO


@pytest.mark.parametrize(
    "spec",
    first_is_quick(
        ["apply lora(r=4) to attn.*, mlp.*", 'train "**"', "apply ladder to block", "apply lora(r=4) to embed"]
    ),
)
@pytest.mark.parametrize("name", first_is_quick(["llama", "opt", "bert", "gpt2", "mixtral"]))
def test_activations_are_what_autograd_keeps(name: str, spec: str) -> None:
    """Within a tenth of the measured bytes: small operations round, and a copy here and there is a view.

    In eval mode, since the CPU's dropout keeps a float an element where an accelerator's keeps a byte.
    """
    compiled = peftc.compile(ZOO[name](), spec)
    compiled.eval()
    assert compiled.plan.memory(BATCH, SEQ).activations == pytest.approx(saved_bytes(compiled), rel=0.1)


@pytest.mark.parametrize(
    "call",
    [
        "lora(r=2)",
        "loha(r=2)",
        "loha(r=2, tucker=true)",
        "loha(r=1, tucker=true)",
        "lokr(r=2)",
        "lokr(r=1)",
        "lokr(r=1, tucker=true)",
        "lokr(r=1, decompose_both=true, factor=3)",
    ],
)
def test_at_convolutions_it_is_all_that_autograd_keeps(call: str) -> None:
    """Kernels that are made of factors, too, whatever the batch; what the caller gives is the caller's."""
    x = torch.randn(3, 4, 6, 5)
    compiled = peftc.compile(Convolved(), f"apply {call} to conv", example=(x,)).eval()
    with saving(compiled, x) as kept:
        compiled(x)
    assert compiled.plan.memory(3, 6).activations == sum(kept.values())


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
