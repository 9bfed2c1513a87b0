"""Kernels on a GPU equal their definitions on the CPU, in value and in gradient; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kernelcases import F32, agree_values, normal, subjects
from peftc.kernels.dequantize import dequantize_4bit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _results(op: Any, arguments: tuple[Any, ...], device: str) -> list[Tensor]:
    """Outputs with gradients, and the gradients of everything that learns, on the CPU."""

    def there(leaf: Any) -> Any:
        return leaf.detach().to(device).requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    flat = [there(leaf) for leaf in pytree.tree_leaves(arguments)]
    result = op(*pytree.tree_unflatten(flat, pytree.tree_structure(arguments)))
    outputs = [result] if isinstance(result, Tensor) else [one for one in result if one.requires_grad]
    loss = sum((one.float() * normal(*one.shape, seed=7).to(device)).sum() for one in outputs)
    assert isinstance(loss, Tensor)
    learned = [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [one.detach().cpu() for one in (*outputs, *torch.autograd.grad(loss, learned))]


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(subjects(F32)))
def test_cuda_equals_cpu(name: str, dtype: torch.dtype) -> None:
    op, arguments = subjects(dtype)[name]
    agree_values(_results(op, arguments, "cuda"), _results(op, arguments, "cpu"))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_masks_are_those_of_the_cpu(p: float) -> None:
    x, seed = normal(300, 577), torch.tensor(-12345)
    ours = torch.ops.peftc.seeded_dropout(x.cuda(), seed.cuda(), p, 1)
    assert torch.equal(ours.cpu(), torch.ops.peftc.seeded_dropout(x, seed, p, 1))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_four_bits_are_decoded_bit_for_bit(dtype: torch.dtype) -> None:
    packed, absmax = torch.randint(256, (90 * 32, 1), dtype=torch.uint8), normal(90).abs()
    ours, theirs = (
        dequantize_4bit(packed.to(device), absmax.to(device), None, None, "nf4", 64, (45, 128), dtype).cpu()
        for device in ("cuda", "cpu")
    )
    assert torch.equal(ours, theirs)


def test_dora_with_a_length_of_0() -> None:
    """All as on the CPU, but that length's own gradient, which is not read off the output there and counts as 0."""
    op, arguments = subjects(F32)["dora_linear"]
    length = arguments[5][0]
    length.data[0] = 0
    learned = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    place = next(index for index, leaf in enumerate(learned) if leaf is length) - len(learned)
    ours, theirs = _results(op, arguments, "cuda"), _results(op, arguments, "cpu")
    assert ours[place][0] == 0
    theirs[place][0] = 0
    agree_values(ours, theirs)
