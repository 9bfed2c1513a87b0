"""NF4's numbers are bitsandbytes', and LoRA's start from what rounding to them loses is LoftQ's algorithm."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import peftc
from marks import first_is_quick
from peftc.graph.ir import get_attribute
from peftc.kernels.dequantize import LEVELS
from peftc.protocol.fourbit import rounded
from peftc.protocol.method import methods
from peftc.protocol.site import Linear
from zoo import ZOO, inputs

torch.set_num_threads(1)
nf4_rounded = partial(rounded, levels="nf4")


@pytest.mark.parametrize("shape", [(48, 64), (24, 128), (5, 7), (32, 48), (3, 66)], ids=str)
def test_rounding_is_bitsandbytes(shape: tuple[int, int]) -> None:
    """Its packed numbers, decoded by the table: its own decoder on the CPU is wrong below 64 columns (0.50.2)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()].long()
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(nf4_rounded(weight), (torch.tensor(LEVELS["nf4"])[codes] * scales).view(shape))


def test_zeros_and_extremes_round_to_themselves() -> None:
    block = torch.tensor([0.0, 3.0, -3.0, *[0.0] * 61])
    assert torch.equal(nf4_rounded(block), block)
    assert torch.equal(nf4_rounded(torch.zeros(3, 50)), torch.zeros(3, 50))


def papers_algorithm(weight: Tensor, rank: int, steps: int) -> tuple[Tensor, Tensor]:
    """Q and the low-rank product after `steps` turns, by dense matrices."""
    product = torch.zeros_like(weight)
    for _ in range(steps):
        rounded = nf4_rounded(weight - product)
        left, singular, right = torch.linalg.svd(weight - rounded)
        product = torch.stack([singular[i] * torch.outer(left[:, i], right[i]) for i in range(rank)]).sum(0)
    return rounded, product


@pytest.mark.parametrize("steps", [1, 4])
def test_the_start_is_the_papers(steps: int) -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    method = methods()["lora"](r=5, alpha=12, init="loftq", loftq_iterations=steps)
    site = Linear("layer", "layer", frozenset(), n_in=80, n_out=48)
    state = {name: spec.init(torch.empty(spec.shape)) for name, spec in method.state(site).items()}
    method.initialise(site, weight, state)
    rounded, product = papers_algorithm(weight, 5, steps)
    # an entry between two of the sixteen values may round either way after another order of sums: none does here
    torch.testing.assert_close(method.prepare(site, weight, state), rounded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.delta(site, **state), product, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2"]))
def test_it_loses_less_than_rounding_alone(name: str) -> None:
    base = ZOO[name]()
    model = peftc.compile(base, "apply lora(r=8, init=loftq) to attn.q, mlp.down").eval()
    for binding in model.plan.bindings:
        site = binding.site
        assert isinstance(site, Linear)
        stored = get_attribute(base, site.weight)
        weight = (stored.t() if site.transposed else stored)[: site.n_out].detach()
        state = {key: get_attribute(model, full).detach() for key, full in binding.names.items()}
        kept = binding.method.prepare(site, weight, state) + binding.method.delta(site, **state)
        assert (weight - kept).norm() < 0.8 * (weight - nf4_rounded(weight)).norm()
    batch = inputs(base)
    with torch.no_grad():
        torch.testing.assert_close(model.merge().eval()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
