"""What a step of few tokens runs in place of what was captured: the same numbers, and fewer operations."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

import peftc
from peftc.kernels import dora_linear, lora_linear, rms_norm
from peftc.kernels.common.fused4 import there_is
from peftc.kernels.dequantize import dequantize_4bit, dequantize_int8
from peftc.optimise.decoding.attention import attended, seen
from peftc.optimise.decoding.branches import dora_products, products
from peftc.optimise.decoding.elementwise import gated, normed
from peftc.optimise.decoding.packed import Eight, four, times
from peftc.optimise.decoding.room import STEP, appended
from peftc.optimise.decoding.rotary import rotated, signed
from peftc.protocol.storage import storages

LLAMA = hf.LlamaConfig(
    vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
NEAR = 1e-5  # fp32, sums in another order


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_branches_of_one_input(shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, outs, ranks = torch.randn(*shape, 12), (7, 20, 5), [2, 3, 1]
    weights = [torch.randn(out, 12) for out in outs]
    biases = [torch.randn(7), None, torch.randn(5)] if biased else []
    a = [torch.randn(rank, 12) for rank in ranks]
    b = [torch.randn(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    scales, lengths = [0.5, 2.0, -1.0], [torch.randn(out) for out in outs]
    *expected, _ = lora_linear.reference(x, weights, biases, a, b, scales, False, None, 0.0, 0)
    for found, wanted in zip(products(x, weights, biases, a, b, scales), expected, strict=True):
        near(found, wanted)
    *expected, _ = dora_linear.reference(x, weights, biases, a, b, lengths, scales, False, None, 0.0, 0)
    found_all = dora_products(x, weights, biases, a, b, lengths, scales)
    for found, wanted in zip(found_all, expected, strict=True):
        near(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branches_in_a_wider_precision(dtype: torch.dtype) -> None:
    """As they learn beside half precision: rounded once, where the definition rounds branch and sum."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 12, dtype=dtype), torch.randn(7, 12, dtype=dtype)
    a, b = torch.randn(4, 12), torch.randn(7, 4)
    (found,) = products(x, [weight], [], [a], [b], [0.5])
    assert found.dtype is dtype
    wanted = x.float() @ weight.float().t() + 0.5 * (x.float() @ a.t()) @ b.t()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), wanted, rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 20), (128, 192), (64, 96), (80, 128)])
def test_a_product_with_eight_bits(rows: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Sums of integers, large ones, then scaled: float16 has no room for them."""
    torch.manual_seed(0)
    packed = storages()["int8"]().pack(torch.randn(shape))
    x = torch.randn(rows, shape[1]).abs().to(dtype)
    bias = torch.randn(shape[0], dtype=dtype) if rows > 1 else None
    dense = dequantize_int8(packed["values"], packed["scale"], shape, torch.float32)
    wanted = F.linear(x.float(), dense, None if bias is None else bias.float())
    found = times(x, Eight(packed["values"], packed["scale"]), bias)
    assert found.dtype is dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(found.float(), wanted, rtol=2 * eps, atol=32 * eps)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("double", [True, False])
def test_a_product_with_four_bits(name: str, rows: int, double: bool, dtype: torch.dtype) -> None:
    """bf16 rounds scales and sums to 2^-8 of themselves; fp32 has the unpacked numbers."""
    near = 2**-7 if dtype is torch.bfloat16 else NEAR
    torch.manual_seed(0)
    shape = (96, 192)
    storage = storages()[name](double=double)
    packed = storage.pack(torch.randn(shape))
    x = torch.randn(rows, shape[1]).to(dtype)
    given = packed["packed"], packed["absmax"], packed.get("nested_absmax"), packed.get("offset")
    dense = dequantize_4bit(*given, name, 64, shape, torch.float32)
    weight = four(*given, name, 64, shape, dtype)
    assert (weight.turned is not None) is (dtype is torch.bfloat16 and there_is(name, 64))
    found = times(x, weight).float()
    assert (found - x.float() @ dense.t()).norm() <= near * (x.float() @ dense.t()).norm()


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_of_packed_weights_is_the_unpacked_ones(storage: str, dtype: torch.dtype) -> None:
    """Logits of each step within the rounding of the precision: fp32 1e-5, bf16 3 % of the largest."""
    torch.manual_seed(0)
    base: Any = hf.LlamaForCausalLM(LLAMA)
    base = base.to(dtype).eval()
    packed = peftc.compile(base, f"quantize linear except head with {storage}\napply lora(r=4) to attn.*, mlp.*").eval()
    with torch.no_grad():
        for parameter in packed.trainable_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    ids = torch.randint(3, 99, (1, 5))
    for _ in range(3):
        step: Any = packed(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        whole = packed(input_ids=ids).logits[:, -1:]
        largest = whole.abs().max()
        assert (step.logits[:, -1:] - whole).abs().max() <= (1e-5 if dtype is torch.float32 else 0.03) * largest
        ids = torch.cat([ids, whole.argmax(-1)], 1)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "hidden", "all seen", "bias", "of each head"])
def test_attention_of_heads_that_share_keys(tokens: int, shared: int, kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, tokens, 8), torch.randn(2, shared, 9, 8), torch.randn(2, shared, 9, 5)
    masks = {
        "none": None, "hidden": torch.rand(2, 1, tokens, 9) > 0.3, "all seen": torch.ones(2, 1, tokens, 9).bool(),
        "bias": torch.randn(2, 1, tokens, 9), "of each head": torch.randn(2, 6, tokens, 9),
    }  # fmt: skip
    mask = masks[kind]
    copies = 6 // shared
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1), mask, scale=0.3
    )
    near(attended(q, k, v, None if mask is None else seen(mask, q.dtype), 0.3), expected)


def test_turns_norms_and_gates() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    near(rotated(x, angles.cos(), signed(angles.sin())), x * angles.cos() + turned * angles.sin())
    weight = torch.randn(8)
    for given in (weight, None):
        near(normed(x, given, 1e-3)[0], rms_norm.reference(x, given, 1e-3, False)[0])
    for name in ("silu", "gelu", "relu", "tanh", "identity"):
        gate = torch.randn(4, 8)
        near(gated(gate, x[0, 0, :4], name), torch.ops.peftc.gated_activation(gate, x[0, 0, :4], name))


# ---- Room for what is to come ---------------------------------------------------------------------------------------


def tokens(count: int) -> Tensor:
    return torch.randn(2, 3, count, 4)


def test_what_is_appended_lies_behind_what_was_there() -> None:
    parts = [tokens(count) for count in (3, 1, 1, 2 * STEP, 2)]
    kept = parts[0][:, :, :0]
    for place, part in enumerate(parts):
        before = kept.data_ptr()
        kept = appended(kept, part)
        assert torch.equal(kept, torch.cat(parts[: place + 1], 2))
        assert (kept.data_ptr() == before) is (place in (1, 2, 4))


def test_two_ways_on_from_one_past_do_not_meet() -> None:
    past = appended(tokens(0), tokens(3))
    there = past.clone()
    one, other = tokens(1), tokens(2)
    first = appended(past, one)
    second = appended(past, other)
    shorter = appended(first[:, :, :2], other)
    longer = appended(first, other)
    assert torch.equal(past, there)
    assert torch.equal(first, torch.cat([there, one], 2))
    assert torch.equal(second, torch.cat([there, other], 2))
    assert torch.equal(shorter, torch.cat([there[:, :, :2], other], 2))
    assert torch.equal(longer, torch.cat([there, one, other], 2))


# ---- How many operations --------------------------------------------------------------------------------------------


def test_a_step_has_few_operations() -> None:
    """Of each block: two norms, four groups of products, two turns, two appended, one attention, one gate."""
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    compiled = peftc.compile(hf.LlamaForCausalLM(config), "apply lora(r=4) to attn.*, mlp.*")
    program = compiled.continuation().programs.go_on
    called = Counter(getattr(node.target, "__name__", "") for node in program.graph.nodes)
    per_block = {"products": 4, "normed": 2, "rotated": 2, "appended": 2, "attended": 1, "gated": 1}
    for name, count in per_block.items():
        assert called[name] == count * 3 + (name == "normed"), name
    assert called["signed"] == called["seen"] == 1
    assert not {"cat", "silu", "rsqrt", "roll", "dropout"} & {name for name in called if called[name] > 1}


def test_what_is_packed_is_not_kept_unpacked() -> None:
    """DoRA's lengths are computed once for a text, and the weights unpacked for each token."""
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4
    )
    spec = "quantize linear except head with nf4\napply dora(r=2) to attn.*, mlp.*"
    compiled = peftc.compile(hf.LlamaForCausalLM(config), spec).eval()
    compiled.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    decoder = compiled.continuation()
    (kept,) = decoder.prepared.values()
    given = {tensor.untyped_storage()._cdata for tensor in (*compiled.parameters(), *compiled.buffers())}
    made = [tensor for tensor in kept if tensor.untyped_storage()._cdata not in given]
    assert made
    assert max(tensor.numel() for tensor in made) < 64 * 64
