"""Methods that move in a part of all weights: SAID's random subspace, FISH's mask, DiffPruning's gated difference."""

from __future__ import annotations

import copy
import importlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftc
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from peftc.protocol.site import Linear
from peftc.rewrite.weights import dense_weight
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

transform: Any = importlib.import_module(methods()["said"].__module__)
seeds = st.integers(0, 2**31 - 1)


def walsh(bits: int) -> Tensor:
    """Sylvester's recursive definition: H_0 = [1], H_k = [[H, H], [H, -H]] of H = H_(k-1)."""
    if bits == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    half = walsh(bits - 1)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def dense(seed: int, size: int, dim: int) -> Tensor:
    """P, [size, dim], as a product of matrices: Le et al.'s H G S H B, of the length that Aghajanyan et al. give it."""
    bits = max(1, math.ceil(math.log2(max(size, dim))))
    place, drawn = torch.arange(2**bits), torch.tensor([seed])
    b = torch.diag(1.0 - 2 * (transform._noise(place, drawn, 0) % 2)).double()
    s = torch.eye(2**bits, dtype=torch.float64)[transform._permuted(place, drawn, bits)]
    g = torch.diag(transform._gaussian(place, drawn))
    h = walsh(bits)
    length = math.sqrt(2**bits) * g.norm() * math.sqrt(size / 2**bits)
    p: Tensor = (h @ g @ s @ h @ b)[:size, :dim] / length
    return p


# ---- The transform -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(12))
def test_hadamard_is_the_recursive_one(bits: int) -> None:
    """In several steps of 32 by 32 where there are more than five bits."""
    x = torch.randn(2**bits, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform.hadamard(x, bits), walsh(bits) @ x, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(seed=seeds, size=st.integers(1, 300), dim=st.integers(1, 40))
def test_fastfood_is_the_product_of_its_matrices(seed: int, size: int, dim: int) -> None:
    theta = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    actual = transform.fastfood(theta, torch.tensor([seed]), size)
    assert actual.shape == (size,)
    torch.testing.assert_close(actual, dense(seed, size, dim) @ theta, rtol=1e-10, atol=1e-12)


@given(seed=seeds, bits=st.integers(1, 12))
def test_a_permutation_is_one(seed: int, bits: int) -> None:
    place = torch.arange(2**bits)
    assert torch.equal(transform._permuted(place, torch.tensor([seed]), bits).sort().values, place)


def test_a_permutation_sends_a_place_anywhere() -> None:
    """Over 1600 seeds, 100 to each of 16 places, and five deviations of 10."""
    for start in (0, 1, 15):
        ends = torch.tensor(
            [transform._permuted(torch.arange(16), torch.tensor([seed]), 4)[start] for seed in range(1600)]
        )
        assert (torch.bincount(ends, minlength=16) - 100).abs().max() < 5 * 10


def test_the_gaussian_noise_is_gaussian() -> None:
    """65536 draws: the mean has a deviation of 1/256, the variance one of √2/256, each bounded by five of them.

    Kolmogorov's statistic is above 1.95/√n once in a thousand times; the seeds are fixed.
    """
    n = 2**16
    for seed in (0, 1, 12345):
        drawn = transform._gaussian(torch.arange(n), torch.tensor([seed]))
        assert abs(drawn.mean()) < 5 / 256
        assert abs(drawn.var() - 1) < 5 * math.sqrt(2) / 256
        expected = torch.special.ndtr(drawn.sort().values)
        assert (expected - torch.arange(n) / n).abs().max() < 1.95 / 256
        neighbours = (drawn[1:] * drawn[:-1]).mean()
        assert abs(neighbours) < 5 / 256


def test_signs_are_even_and_streams_are_apart() -> None:
    place, n = torch.arange(2**16), 2**16
    signs = [1.0 - 2 * (transform._noise(place, torch.tensor([seed]), 0) & 1) for seed in range(4)]
    for index, one in enumerate(signs):
        assert abs(one.mean()) < 5 / math.sqrt(n)
        for other in signs[:index]:
            assert abs((one * other).mean()) < 5 / math.sqrt(n)
    gauss = transform._gaussian(place, torch.tensor([0]))
    assert abs((signs[0] * gauss).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("size", "dim"), [(1024, 24), (700, 24)])
def test_columns_are_nearly_orthonormal(size: int, dim: int) -> None:
    """A column of a full P has length 1, since H and H/√N keep lengths; that of a cut one, and inner products of two,
    have a deviation of about √(2/size). Six of them."""
    for seed in range(3):
        p = torch.stack([transform.fastfood(row, torch.tensor([seed]), size) for row in torch.eye(dim).double()], 1)
        gram = p.t() @ p
        if size == 1024:
            torch.testing.assert_close(gram.diag(), torch.ones(dim).double(), rtol=0, atol=1e-9)
        assert (gram - torch.eye(dim)).abs().max() < 6 * math.sqrt(2 / size)


@pytest.mark.parametrize(("size", "dim"), [(4096, 100), (1536, 100), (2560, 7), (30, 500)])
def test_p_keeps_lengths(size: int, dim: int) -> None:
    """To five deviations of √(2/size). Where theta is longer than the weight, of its mean square over seeds: a part of
    it cannot be seen, the deviation of 40 is √(2/(40 size))."""
    theta = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    ratios = torch.tensor([transform.fastfood(theta, torch.tensor([s]), size).norm() / theta.norm() for s in range(40)])
    assert abs(ratios.square().mean() - 1) < 5 * math.sqrt(2 / (40 * size))
    assert (ratios.square() - 1).abs().max() < 5 * math.sqrt(2 / size)


GOLDEN = [-1.531103, 3.527845, -0.66553, -0.023714, -2.717762, 1.047339]
ORDER = [4, 1, 7, 6, 0, 5, 3, 2]


def test_numbers_that_every_process_must_make() -> None:
    """P is in no artifact: another P would be another model."""
    made = transform.fastfood(torch.arange(1.0, 6.0), torch.tensor([20201222]), 6)
    torch.testing.assert_close(made, torch.tensor(GOLDEN), rtol=0, atol=1e-5)
    assert transform._permuted(torch.arange(8), torch.tensor([7]), 3).tolist() == ORDER


# ---- SAID in a model -----------------------------------------------------------------------------------------------

SAID = "apply said(dim=20) to attn.q, mlp.up"


@cache
def said() -> peftc.CompiledModule:
    """gpt2's q is a slice of a fused, transposed weight; theta and the lengths are made random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        compiled = peftc.compile(ZOO["gpt2"](), SAID)
        with torch.no_grad():
            for parameter in compiled.trainable_parameters().values():
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return compiled.eval()


def places(compiled: peftc.CompiledModule) -> list[tuple[Linear, dict[str, Tensor]]]:
    found = []
    for binding in compiled.plan.bindings:
        assert isinstance(binding.site, Linear)
        found.append((binding.site, {name: get_attribute(compiled, full) for name, full in binding.names.items()}))
    return found


def test_theta_is_common_and_every_weight_has_a_seed_of_its_own() -> None:
    found = places(said())
    assert len(found) == 4
    assert len({id(state["theta"]) for _, state in found}) == 1
    assert len({int(state["seed"]) for _, state in found}) == 4
    assert said().plan.trainable == 20 + 4


def test_gradients_are_those_of_the_dense_weights_through_p() -> None:
    """theta: the sum over weights of length Pᵀ dL/dW; a length: <P theta, dL/dW>."""
    compiled = said()
    batch = inputs(compiled.base)
    compiled.zero_grad()
    compiled(**batch).loss.backward()

    plain = compiled.merge().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(**batch).loss.backward()
    expected = torch.zeros(20, dtype=torch.float64)
    for site, state in places(compiled):
        gradient = get_attribute(plain, site.weight).grad
        flat = dense_weight(gradient, site).double().flatten()
        p = dense(int(state["seed"]), len(flat), 20)
        expected += state["length"].item() * (p.t() @ flat)
        own = (p @ state["theta"].detach().double()) @ flat
        torch.testing.assert_close(state["length"].grad.double(), own.reshape(1), rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]
        changed = get_attribute(plain, site.weight) - get_attribute(compiled.base, site.weight)
        delta = state["length"].item() * (p @ state["theta"].detach().double())
        found = dense_weight(changed, site).double().flatten()
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)  # fp32's rounding of 0.3
    theta = places(compiled)[0][1]["theta"]
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_p_is_in_no_artifact_and_comes_back_the_same(tmp_path: Path) -> None:
    compiled = said()
    compiled.save(tmp_path / "said")
    # theta, four lengths and four seeds: 128 bytes, the rest is their names
    assert (tmp_path / "said" / "adapter.safetensors").stat().st_size < 1500
    torch.manual_seed(99)
    loaded = peftc.load(tmp_path / "said", compiled.base).eval()
    batch = inputs(compiled.base)
    assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)


def test_a_copy_in_double_precision_computes_the_same() -> None:
    """P is made in the precision of theta, from the same integers."""
    compiled = said()
    batch = inputs(compiled.base)
    for site, state in places(compiled):
        method = compiled.plan.bindings[0].method
        twice = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        torch.testing.assert_close(method.delta(site, **state).double(), method.delta(site, **twice), rtol=0, atol=1e-5)
    assert torch.equal(copy.deepcopy(compiled)(**batch).logits, compiled(**batch).logits)


# ---- Masks ---------------------------------------------------------------------------------------------------------


class Site:
    """As much of a linear site as a `delta` asks of one."""

    n_in, n_out = 5, 7


@given(seed=seeds, kept=st.integers(1, 35))
def test_fish_puts_each_value_at_its_place(seed: int, kept: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values, chosen = torch.randn(kept, generator=random), torch.randperm(35, generator=random)[:kept]
    expected = torch.zeros(7, 5)
    for value, place in zip(values, chosen.tolist(), strict=True):
        expected[place // 5, place % 5] = value
    state = {"values": values, "places": chosen}
    assert torch.equal(methods()["fish"](keep=0.5).delta(Site(), **state), expected)


@given(seed=seeds, pruned=st.booleans())
def test_diff_pruning_gates_its_difference_until_it_is_cut(seed: int, pruned: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    w, alpha = torch.randn(7, 5, generator=random), 3 * torch.randn(7, 5, generator=random)
    mask = (torch.rand(7, 5, generator=random) < 0.5).float() if pruned else torch.ones(7, 5)
    state = {"w": w, "alpha": alpha, "mask": mask, "pruned": torch.tensor([float(pruned)])}
    gates = [min(1.0, max(0.0, 3 / (1 + math.exp(-a)) - 1.5)) for a in alpha.flatten().tolist()]
    gate = torch.ones(7, 5) if pruned else torch.tensor(gates).reshape(7, 5)
    actual = methods()["diff_pruning"]().delta(Site(), **state)
    torch.testing.assert_close(actual, w * gate * mask, rtol=1e-5, atol=1e-6)
