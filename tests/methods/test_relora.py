"""ReLoRA's merges: what they change and keep, the learning rate around them, saving and taking them back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import peftc
from peftc.graph.ir import get_attribute
from peftc.protocol.site import Linear
from peftc.rewrite.weights import dense_weight
from scheduled import RELORA, adamw, compiled, copies, equal, logits, tensors, train

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

SCALE = 6 / 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_merge_changes_what_is_kept_and_no_output(name: str) -> None:
    """Seen from hooks right before and right after peftc's own."""
    model = compiled(name, RELORA)
    optimizer = adamw(model)
    before: list[Any] = []
    after: list[Any] = []

    def look(into: list[Any]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            known = [{key: tensor in optimizer.state for key, tensor in tensors(model, b).items()} for b in bindings]
            into.append((copies(model), logits(model), known, len(optimizer.state)))

        return hook

    bindings = model.plan.bindings
    optimizer.register_step_post_hook(look(before))
    model.follow(optimizer)
    optimizer.register_step_post_hook(look(after))
    train(model, optimizer, range(1, 8))

    for step in range(1, 8):
        old, new = before[step - 1], after[step - 1]
        if step % 3:
            still = ("merged", "A", "B") if step < 3 else ("merged",)  # later the step is shortened meanwhile
            assert all(torch.equal(o[key], n[key]) for o, n in zip(old[0], new[0], strict=True) for key in still)
            assert old[2] == new[2]
            continue
        # the weight is rounded once more: 1e-6 of logits of the order of 1
        torch.testing.assert_close(new[1], old[1], rtol=0, atol=1e-6)
        for was, now in zip(old[0], new[0], strict=True):
            grown = was["merged"] + SCALE * was["B"] @ was["A"]
            torch.testing.assert_close(now["merged"], grown, rtol=0, atol=1e-7)
            assert was["B"].any()
            assert not now["B"].any()
            assert not torch.equal(was["A"], now["A"])
            assert now["A"].abs().max() <= 1 / math.sqrt(now["A"].shape[1]) + 1e-7  # as a LoRA's A starts
        assert all(found == {"A": True, "B": True, "merged": False} for found in old[2])
        assert not any(any(found.values()) for found in new[2])
        assert new[3] == old[3] - 2 * len(bindings) > 0, "the norms' moments stay"


def test_the_sum_of_the_updates_has_the_rank_of_all_of_them() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 11))
    for state in copies(model):
        total = state["merged"] + SCALE * state["B"] @ state["A"]
        for matrix, merges in ((state["merged"], 3), (total, 4)):
            assert torch.linalg.matrix_rank(matrix.double(), rtol=1e-6) == 2 * merges, "but for fp32's rounding"


def test_only_the_rows_of_the_slice_change_and_the_base_not_at_all() -> None:
    model = compiled("gpt2", RELORA)
    base = {name: parameter.detach().clone() for name, parameter in model.base.named_parameters()}
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 5))
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, base[name]), name
    fused = "transformer.h.0.attn.c_attn.weight"
    change = (get_attribute(model, fused) - base[fused]).t()  # stored as [in, out]
    assert not change[32:64].any(), "the rows of k"
    for binding in model.plan.bindings:
        site = binding.site
        assert isinstance(site, Linear)
        found = dense_weight(get_attribute(model, site.weight), site) - dense_weight(base[site.weight], site)
        merged = tensors(model, binding)["merged"]
        assert merged.any()
        torch.testing.assert_close(found, merged, rtol=0, atol=1e-7)


def test_a_warm_step_is_that_of_a_smaller_learning_rate() -> None:
    """Against AdamW by hand: another learning rate in each step, and merges that are written out here."""
    ours, theirs = compiled("gpt2", RELORA), compiled("gpt2", RELORA)
    optimizer = adamw(ours)
    ours.follow(optimizer)
    adapters = [full for binding in theirs.plan.bindings for full in binding.names.values() if "merged" not in full]
    learning = theirs.trainable_parameters()
    groups = [
        {"params": [learning[name] for name in adapters]},
        {"params": [parameter for name, parameter in learning.items() if name not in adapters]},
    ]
    by_hand = AdamW(groups, lr=1e-2, weight_decay=0.1)
    warmth = {4: 1 / 3, 5: 2 / 3, 6: 1.0, 7: 1 / 3, 8: 2 / 3}
    for step in range(1, 9):
        by_hand.param_groups[0]["lr"] = 1e-2 * warmth.get(step, 1.0)
        train(ours, optimizer, range(step, step + 1))
        train(theirs, by_hand, range(step, step + 1))
        if step % 3 == 0:
            theirs.load_state_dict(ours.state_dict())  # A starts anew at random
            for name in adapters:
                del by_hand.state[learning[name]]
        equal(ours, theirs, 1e-6)  # a step is of 1e-2; what the lerp rounds, AdamW may turn by a few ulp


def test_a_merged_model_computes_the_same() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 6))
    merged = model.merge()
    assert type(merged) is type(model.base)
    # weights of the order of 0.1 summed in another order
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_saved_in_the_middle_it_goes_on_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    whole = compiled("gpt2", RELORA)
    optimizer = adamw(whole)
    whole.follow(optimizer)
    losses = train(whole, optimizer, range(1, 8))

    first = compiled("gpt2", RELORA)
    optimizer = adamw(first)
    first.follow(optimizer)
    assert train(first, optimizer, range(1, stop + 1)) == losses[:stop]
    first.save(tmp_path / "saved")
    kept = copy.deepcopy(optimizer.state_dict())

    second = peftc.load(tmp_path / "saved", first.base).train()
    optimizer = adamw(second)
    optimizer.load_state_dict(kept)
    second.follow(optimizer, step=stop)
    assert train(second, optimizer, range(stop + 1, 8)) == losses[stop:]
    equal(second, whole)


def test_a_state_from_before_the_first_merge_takes_the_merge_back() -> None:
    """As a Trainer that loads its best checkpoint does."""
    model = compiled("gpt2", RELORA)
    start, expected = copy.deepcopy(model.state_dict()), logits(model)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 5))
    model.load_state_dict(start)
    assert torch.equal(logits(model), expected)
