"""All weights at once, in a random subspace of a few dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # the odd constants of splitmix64
RADIX = 5  # a Walsh-Hadamard transform is done 32 by 32: a few products instead of many sums


@method
class SAID(WeightMethod):
    """One vector for the whole model, spread over every weight by a Fastfood transform, times a learned length each.

    The transform P is made from a seed whenever it is needed and is never stored. `dim` counts the vector; each weight
    adds its length (in the paper these are taken out of the dimension).
    """

    name = "said"
    formula = "W + lambda_W P theta, P = H G S H B a Fastfood transform, theta [dim] common to all weights"
    indivisible = "its vector belongs to all its weights together"
    paper = "Aghajanyan et al. 2020, arXiv:2012.13255; Le et al. 2013 (Fastfood)"

    dim: int = param(1000, "dimension of the subspace", min=1)

    def state(self, site: Linear) -> dict[str, State]:
        return {
            "length": State((1,), torch.nn.init.ones_),
            "seed": State((1,), _random_seed, trainable=False, dtype=torch.int64),
        }

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        return {"theta": State((self.dim,))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, length: Tensor, seed: Tensor, theta: Tensor) -> Tensor:
        change = self.delta(site, length=length, seed=seed, theta=theta)
        branch: Tensor = F.linear(x.to(change.dtype), change)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        spread = fastfood(state["theta"], state["seed"], site.n_out * site.n_in)
        change: Tensor = state["length"] * spread.reshape(site.n_out, site.n_in)
        return change


def fastfood(theta: Tensor, seed: Tensor, size: int) -> Tensor:
    """P theta, [size], of about theta's own length: H G S H B on theta padded to a power of two.

    B: random signs; S: a random permutation; G: Gaussian; H: the Walsh-Hadamard transform.
    """
    bits = max(1, math.ceil(math.log2(max(size, len(theta)))))
    place = torch.arange(2**bits, device=theta.device)
    signs = 1 - 2 * (_noise(place, seed, 0) & 1).to(theta.dtype)
    gauss = _gaussian(place, seed).to(theta.dtype)
    mixed = hadamard(F.pad(theta, (0, 2**bits - len(theta))) * signs, bits)
    spread = hadamard(mixed[_permuted(place, seed, bits)] * gauss, bits)
    scaled: Tensor = spread[:size] / (2 ** (bits / 2) * gauss.norm() * math.sqrt(size / 2**bits))
    return scaled


def hadamard(x: Tensor, bits: int) -> Tensor:
    """The Walsh-Hadamard transform of x [2^bits], without its factor 2^(-bits/2)."""
    for start in range(0, bits, RADIX):
        step = min(RADIX, bits - start)
        x = torch.matmul(_matrix(step, x), x.reshape(2 ** (bits - start - step), 2**step, 2**start)).flatten()
    return x


def _matrix(bits: int, like: Tensor) -> Tensor:
    made = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    for _ in range(bits):
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _noise(place: Tensor, seed: Tensor, stream: int) -> Tensor:
    """63 random bits for each place, by splitmix64: a function of seed, stream and place alone."""
    x = (place + 1) * MIX[0] + (seed + stream) * MIX[1]
    for shift, factor in ((30, MIX[1]), (27, MIX[2])):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return (x ^ (x >> 31)) & (1 << 63) - 1


def _gaussian(place: Tensor, seed: Tensor) -> Tensor:
    """Box and Muller's, out of 24 bits each for the angle and the radius."""
    first, second = ((_noise(place, seed, stream) >> 39).double() + 0.5 for stream in (1, 2))
    return torch.sqrt(-2 * torch.log(first / 2**24)) * torch.cos(2 * math.pi * second / 2**24)


def _permuted(place: Tensor, seed: Tensor, bits: int) -> Tensor:
    """A permutation of 0 … 2^bits - 1: odd factors and shifted sums, each of which can be undone."""
    for stream in (3, 4, 5):
        factor = _noise(torch.zeros_like(place[:1]), seed, stream) | 1
        place = (place * factor + (factor >> 20)) & (1 << bits) - 1
        place = place ^ (place >> max(1, bits // 2))
    return place


def _random_seed(seed: Tensor) -> Tensor:
    return seed.random_(2**31)
