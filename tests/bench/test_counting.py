"""Launches, bytes and operations that are counted are those that were worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.bench.batches import batch_for
from peftc.bench.counting.cards import CARDS, LAUNCH, card_of
from peftc.bench.counting.count import Counts, count, on_meta
from peftc.bench.counting.meter import Launch, Meter, intercepted
from peftc.bench.counting.on_cuda import OnCuda
from peftc.bench.counting.table import count_table
from peftc.bench.flops import count_flops
from peftc.bench.variants import FLOOR, FUSED, HF_PEFT, Variant, floor
from peftc.cli import main
from peftc.diagnostics.diagnostic import PeftcError
from peftc.show.screen import rendered

LORA = "apply lora(r=4, alpha=8) to attn.*, mlp.*"
F32, HALF, FLAG, LONG = 4, 2, 1, 8  # bytes


def empty(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learns)


def counted(function: Callable[[], object]) -> dict[tuple[str, int, int, int], int]:
    """(name, bytes read, bytes written, operations) -> how often."""
    with OnCuda(), (meter := Meter()):
        function()
    return {(one.name, one.read, one.written, one.flops): number for one, number in meter.launches.items()}


# --- operations of ATen ------------------------------------------------------------------------------------------


def test_a_linear_layer() -> None:
    x, weight, bias = empty(2, 3, 5), empty(7, 5), empty(7)
    read = F32 * (2 * 3 * 5 + 7 * 5)
    assert counted(lambda: F.linear(x, weight)) == {("mm", read, F32 * 2 * 3 * 7, 2 * 6 * 5 * 7): 1}
    found = counted(lambda: F.linear(x, weight, bias))
    assert found == {("addmm", read + F32 * 7, F32 * 2 * 3 * 7, 2 * 6 * 5 * 7): 1}


def test_a_linear_layers_backward() -> None:
    x, weight = empty(6, 5, learns=True), empty(7, 5)
    y = F.linear(x, weight)
    found = counted(lambda: torch.autograd.grad(y, [x], empty(6, 7)))
    assert found == {("mm", F32 * (6 * 7 + 7 * 5), F32 * 6 * 5, 2 * 6 * 7 * 5): 1}


def test_what_moves_nothing_is_no_launch() -> None:
    x = empty(4, 6)
    views = (lambda: x.view(6, 4), x.t, lambda: x[1:], lambda: x.expand(2, 4, 6), lambda: x.reshape(24), x.detach)
    assert [counted(view) for view in views] == [{}] * len(views)
    assert counted(lambda: torch.empty_like(x)) == {}
    assert counted(lambda: empty(0, 6) + 1) == {}
    assert counted(lambda: torch.ones(3).add(1)) == {}  # that is the host's


def test_an_expanded_tensor_is_read_once() -> None:
    x, row = empty(4, 6), empty(6)
    assert counted(lambda: x + row) == {("add", F32 * (24 + 6), F32 * 24, 0): 1}
    assert counted(lambda: x * row.expand(4, 6)) == {("mul", F32 * (24 + 6), F32 * 24, 0): 1}
    assert counted(lambda: x * x) == {("mul", F32 * 24, F32 * 24, 0): 1}
    assert counted(lambda: row.expand(4, 6).contiguous()) == {("clone", F32 * 6, F32 * 24, 0): 1}
    assert counted(lambda: x.t().reshape(24)) == {("clone", F32 * 24, F32 * 24, 0): 1}


def test_in_place_is_read_and_written() -> None:
    x, other = empty(4, 6), empty(4, 6)
    assert counted(lambda: x.add_(other)) == {("add_", F32 * 48, F32 * 24, 0): 1}
    assert counted(lambda: x.copy_(other)) == {("copy_", F32 * 24, F32 * 24, 0): 1}
    assert counted(x.zero_) == {("zero_", 0, F32 * 24, 0): 1}
    assert counted(lambda: torch.mul(x, 2, out=other)) == {("mul", F32 * 24, F32 * 24, 0): 1}
    assert counted(lambda: x.addmm_(empty(4, 3), empty(3, 6))) == {
        ("addmm_", F32 * (24 + 12 + 18), F32 * 24, 2 * 4 * 3 * 6): 1
    }
    assert counted(lambda: x[:2].mul_(3)) == {("mul_", F32 * 12, F32 * 12, 0): 1}


def test_softmax_and_a_cast() -> None:
    x = empty(4, 6, dtype=torch.bfloat16)
    assert counted(lambda: F.softmax(x, -1)) == {("_softmax", HALF * 24, HALF * 24, 0): 1}
    assert counted(x.float) == {("_to_copy", HALF * 24, F32 * 24, 0): 1}
    assert counted(lambda: torch.zeros_like(x)) == {("zeros_like", 0, HALF * 24, 0): 1}


def test_rows_that_are_picked_are_all_that_is_read() -> None:
    table, ids = empty(1000, 6), empty(5, dtype=torch.int64)
    assert counted(lambda: F.embedding(ids, table)) == {("embedding", LONG * 5 + F32 * 30, F32 * 30, 0): 1}
    total = empty(1000, 6)
    assert counted(lambda: total.index_add_(0, ids, empty(5, 6))) == {
        ("index_add_", F32 * 60 + LONG * 5, F32 * 30, 0): 1
    }


def test_what_is_made_of_others_is_what_they_are() -> None:
    x = empty(4, 6, learns=True)
    y = x[1:]
    found = counted(lambda: torch.autograd.grad(y, [x], empty(3, 6)))
    # zeros of the whole, and the gradient copied into a part of them
    assert found == {("slice_backward", 0, F32 * 24, 0): 1, ("slice_backward", F32 * 18, F32 * 18, 0): 1}


def test_attention_dropout_and_norms_are_one_kernel_each() -> None:
    q, k = empty(1, 8, 64, 32, dtype=torch.bfloat16), empty(1, 2, 64, 32, dtype=torch.bfloat16)
    products = 2 * 2 * 8 * 64 * 64 * 32
    found = counted(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True))
    ((name, read, _, flops),) = found
    assert (name, read, flops) == ("_scaled_dot_product_flash_attention", HALF * (q.numel() + k.numel()), products)
    mask = empty(1, 1, 64, 64, dtype=torch.bfloat16)
    ((name, read, _, flops),) = counted(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert name == "_scaled_dot_product_efficient_attention"
    assert (read, flops) == (HALF * (q.numel() + 64 * 64), products)
    x = empty(4, 6)
    assert counted(lambda: F.dropout(x, 0.5)) == {("native_dropout", F32 * 24, (F32 + FLAG) * 24, 0): 1}
    assert counted(lambda: F.dropout(x, 0.5, training=False)) == {}
    assert counted(lambda: F.rms_norm(x, (6,))) == {("_fused_rms_norm", F32 * 24, F32 * (24 + 4), 0): 1}
    learning = empty(4, 6, learns=True)
    with OnCuda():
        y = F.rms_norm(learning, (6,))
    found = counted(lambda: torch.autograd.grad(y, [learning], empty(4, 6)))
    assert found == {("_fused_rms_norm_backward", F32 * (24 + 24 + 4), F32 * 24, 0): 1}


# --- operations of peftc -----------------------------------------------------------------------------------------


def test_a_fused_norm_is_its_kernel() -> None:
    x, weight = empty(4, 6), empty(6)
    found = counted(lambda: torch.ops.peftc.rms_norm(x, weight, 1e-5, False))
    assert found == {("rms_norm.forward_kernel", F32 * 30, F32 * (24 + 4), 0): 1}
    found = counted(lambda: torch.ops.peftc.rms_norm(x, None, 1e-5, False))
    assert found == {("rms_norm.forward_kernel", F32 * 24, F32 * (24 + 4), 0): 1}
    found = counted(lambda: torch.ops.peftc.rms_norm_weight_backward(x, x, weight, empty(4, 1)))
    assert found[("rms_norm.backward_kernel", F32 * (24 + 6 + 4), F32 * 24, 0)] == 1


def test_fused_branches_are_two_kernels() -> None:
    """One for S = x [A; A]ᵀ, one for both outputs; before them the copy that puts the A's together."""
    x, weights = empty(8, 6), [empty(10, 6), empty(12, 6)]
    a, b = [empty(2, 6), empty(2, 6)], [empty(10, 2), empty(12, 2)]
    found = counted(lambda: torch.ops.peftc.lora_linear(x, weights, [], a, b, [1.0, 1.0], False, None, 0.0, 0))
    narrow, wide = 2 * 8 * 6 * 4, 2 * 8 * (6 + 2) * 22
    assert found == {
        ("peftc.lora_linear", F32 * 24, F32 * 24, 0): 1,
        ("lora_linear.hidden_kernel", F32 * (48 + 24), F32 * 32, 0): 1,
        ("lora_linear.linear_kernel", F32 * (48 + 32 + 22 * 6 + 22 * 2), F32 * 8 * 22, narrow + wide): 1,
    }


def test_what_is_added_to_is_read_too() -> None:
    from peftc.kernels.gpu import lora_backward

    dx, narrow, a, seed = empty(8, 6), empty(8, 2), empty(2, 6), empty(dtype=torch.int64)
    meter = Meter()
    with intercepted(meter.launched):
        lora_backward.add_input_gradient_(dx, narrow, a, seed, 0.1, 0)
    (launch,) = meter.launches
    assert launch == Launch("lora_backward.input_gradient_kernel", F32 * (48 + 16 + 12) + LONG, F32 * 48)


def test_an_operation_within_another_is_a_part_of_it() -> None:
    """Dropout in fp64's gradient of a LoRA linear's A: the masked x is made again, by an operation of its own."""
    shapes = (8, 6), (8, 2), (10, 6), (2, 6), (10, 2), (8, 10)
    x, hidden, weight, a, b, grad = (empty(*shape, dtype=torch.float64) for shape in shapes)
    seed = empty(dtype=torch.int64)
    found = counted(lambda: torch.ops.peftc.lora_linear_backward(
        [grad], x, hidden, [weight], [a], [b], [1.0], False, seed, 0.1, 0, [False, True, False]
    ))  # fmt: skip
    assert found[("seeded_dropout.dropout_kernel", 2 * F32 * 48 + LONG, 2 * F32 * 48, 0)] == 1


def test_a_kernel_without_products_by_formula_is_counted_in_both_passes() -> None:
    gate, up = empty(4, 6, learns=True), empty(4, 6, learns=True)
    y = torch.ops.peftc.gated_activation(gate, up, "silu")
    found = counted(lambda: torch.autograd.grad(y, [gate, up], empty(4, 6)))
    assert found == {("gated_activation.backward_kernel", F32 * 72, F32 * 48, 0): 1}


# --- a model -----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SETTINGS))


@pytest.fixture(scope="module")
def counts(model: LlamaForCausalLM) -> Counts:
    return count(model, LORA, batch=2, seq=16, card=CARDS["h200"])


def test_operations_are_those_that_a_real_step_counts(model: LlamaForCausalLM, counts: Counts) -> None:
    _, arguments = batch_for(model, None, 2, 16)
    given: Any = ((), {name: value for name, value in arguments.items() if name != "attention_mask"})
    base = floor(model)
    assert counts.row(FLOOR).flops == count_flops(lambda: base.step(given))
    fused = Variant(FUSED, peftc.compile(model, LORA))
    assert counts.row(FUSED).flops == count_flops(lambda: fused.step(given))


def test_the_base_is_counted_the_same_whatever_the_spec(model: LlamaForCausalLM, counts: Counts) -> None:
    """And by a plain step of its own, without anything of peftc's in it."""
    other = count(model, "apply ia3 to mlp.down", batch=2, seq=16)
    assert other.row(FLOOR).launches == counts.row(FLOOR).launches
    bare = on_meta(model).requires_grad_(False)
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    hidden = bare.get_submodule("model.embed_tokens")(ids).requires_grad_()
    with OnCuda(), (meter := Meter()):
        bare(inputs_embeds=hidden, labels=ids, use_cache=False).loss.backward()
    launches = dict(counts.row(FLOOR).launches or {})
    added = {one.name for one in launches} - {one.name for one in meter.launches}
    assert added == {"embedding"}  # beside it the zero that stands for what learns, and its gradient
    assert counts.row(FLOOR).total == meter.launches.total() + 3


def test_a_model_stays_as_it_is(model: LlamaForCausalLM, counts: Counts) -> None:
    assert counts.batch == 2
    assert all(not p.is_meta and p.requires_grad and p.grad is None for p in model.parameters())


def test_equal_blocks_count_alike(model: LlamaForCausalLM, counts: Counts) -> None:
    """What one more block adds is the same for the second as for the third: nothing is lost between blocks."""
    totals = []
    for layers in (2, 3, 4):
        deep = LlamaForCausalLM(LlamaConfig(**SETTINGS | {"num_hidden_layers": layers}))
        totals.append([(row.total, row.bytes, row.flops) for row in count(deep, LORA, batch=2, seq=16).rows])
    for two, three, four in zip(*totals, strict=True):
        differences = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((two, three), (three, four))]
        assert differences[0] == differences[1]


def test_the_estimate_is_the_roofline(counts: Counts) -> None:
    row, card = counts.row(FLOOR), CARDS["h200"]
    assert row.launches is not None
    expected = sum(
        number * (max((one.read + one.written) / 4.8e12, one.flops / 67e12) + LAUNCH)
        for one, number in row.launches.items()
    )
    assert counts.seconds(row) == pytest.approx(expected)
    assert card.seconds({Launch("x", 0, 0, 989): 2}, torch.bfloat16) == pytest.approx(2 * (1e-12 + LAUNCH))


def test_a_card_of_ones_own() -> None:
    assert card_of(None) is None
    assert card_of("H100", bandwidth=2e12) == card_of("h100", 2e12)
    own = card_of(None, 1e12, 1e14)
    assert own is not None
    assert (own.bandwidth, own.half, own.full) == (1e12, 1e14, 1e14)
    for name, bandwidth in (("h1000", None), (None, 1e12)):
        with pytest.raises(PeftcError) as refusal:
            card_of(name, bandwidth)
        assert refusal.value.diagnostics[0].code == "unknown-card"


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * float(y.sum())


def test_what_decides_by_numbers_is_refused() -> None:
    with pytest.raises(PeftcError) as refusal:
        count(Deciding(), "apply lora(r=2) to linear", example=torch.ones(4, 3))
    assert refusal.value.diagnostics[0].code == "needs-values"


def test_what_needs_weights_to_be_compiled_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(PeftcError, match="cannot be compiled without its weights") as refusal:
        count(model, f"quantize attn.* with nf4\n{LORA}", seq=8)
    assert refusal.value.diagnostics[0].code == "cannot-measure"


def test_a_convolution_is_one_kernel() -> None:
    x, weight = empty(2, 3, 8, 8), empty(5, 3, 2, 2)
    ((name, read, written, flops),) = counted(lambda: F.conv2d(x, weight, stride=2))
    assert (name, read, written) == ("convolution", F32 * (2 * 3 * 64 + 60), F32 * 2 * 5 * 16)
    assert flops == 2 * written // F32 * 12


def test_where_nothing_learns_nothing_is_counted(model: LlamaForCausalLM) -> None:
    with pytest.raises(PeftcError) as refusal:
        count(model, "freeze norm", seq=8)
    assert refusal.value.diagnostics[0].code == "nothing-trains"


# --- the command -------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_counted(counts: Counts) -> None:
    text = rendered(count_table(counts, verbose=True))
    assert "counted" in text
    assert f"{counts.row(FUSED).total:,}" in text
    assert f"{HF_PEFT}: most bytes" in text
    assert "4 µs" in text


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    LlamaConfig(**SETTINGS).save_pretrained(tmp_path)
    spec = tmp_path / "lora.peft"
    spec.write_text(LORA)
    return spec, tmp_path / "config.json"


def test_the_command_needs_no_weights(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--count", *map(str, files), "--batch", "2", "--seq", "16", "--dtype", "bfloat16"]
    assert main([*arguments, "--json", "--card", "a100"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == [FLOOR, FUSED, HF_PEFT]
    for row in data["rows"]:
        assert row["note"] == ""
        assert row["seconds"] > 0
        assert sum(kind["bytes"] for kind in row["kinds"]) == row["bytes"]
        assert sum(kind["launches"] for kind in row["kinds"]) == row["launches"]
    assert data["rows"][2]["over_hf_peft"] == {"launches": 1, "bytes": 1, "flops": 1}
    assert data["dtype"] == "bfloat16"
    assert main(arguments) == 0
    assert "Counted, not measured" in capsys.readouterr().out


def test_a_card_that_is_not_known_is_said(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--count", *map(str, files), "--card", "abacus"]) == 1
    assert "unknown-card" in capsys.readouterr().err
