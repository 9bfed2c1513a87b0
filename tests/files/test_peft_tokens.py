"""Rows of the token table that learn, and prefixes of which the first tokens do not, beside HF PEFT's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from hfpeft import NEAR, quietly, shaken, tensors_in
from marks import first_is_quick
from peftc.graph.ir import get_attribute
from zoo import ZOO, inputs


def given(base: nn.Module) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A batch, and two of its tokens, the larger first."""
    batch = inputs(base)
    return batch, sorted({*batch["input_ids"].flatten().tolist()})[1::-1]


@pytest.mark.parametrize("name", first_is_quick(["gpt2", "llama", "bert"]))
def test_it_is_hf_pefts(name: str, tmp_path: Path) -> None:
    """GPT-2's head is its table: there, too, the rows are those that learn."""
    base = shaken(ZOO[name]())
    batch, ids = given(base)
    theirs: Any = shaken(
        quietly(peft.get_peft_model, copy.deepcopy(base), peft.TrainableTokensConfig(token_indices=ids))
    )
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert len(ours.plan.bindings) == (2 if name == "gpt2" else 1)

    first, second = theirs(**batch), ours(**batch)
    torch.testing.assert_close(second.logits, first.logits, rtol=NEAR, atol=NEAR)
    assert not torch.allclose(first.logits, base(**batch).logits, rtol=0, atol=1e-3)
    first.loss.backward()
    second.loss.backward()
    (expected,) = (parameter.grad for parameter in theirs.parameters() if parameter.requires_grad)
    (found,) = (parameter.grad for parameter in ours.trainable_parameters().values())
    torch.testing.assert_close(found, expected.flip(0), rtol=0, atol=2 * NEAR * float(expected.abs().max()))

    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**batch).logits, first.logits, rtol=NEAR, atol=NEAR)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor.flip(0)) for key, tensor in before.items())


def test_half_of_what_reads_a_table_is_not_exported(tmp_path: Path) -> None:
    made = peftc.compile(ZOO["gpt2"](), 'apply tokens(ids="14") to "transformer.wte.rows"')
    assert get_attribute(made, made.plan.bindings[0].names["learned"]).shape == (1, 32)
    with pytest.raises(peftc.PeftcError, match="all that reads a table reads the rows there"):
        made.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ("5, x", "has 'x', which is no id"),
        ("5, 5", "has an id twice"),
        ("5,", "which is no id"),
        ("-1", "which is no id"),
    ],
)
def test_ids_that_are_none(ids: str, reason: str) -> None:
    (problem,) = peftc.check(f'apply tokens(ids="{ids}") to vocabulary')
    assert reason in str(problem)


def test_a_token_that_is_not_in_the_table() -> None:
    with pytest.raises(peftc.PeftcError, match="ids has 4000, and the table has"):
        peftc.plan(ZOO["llama"](), 'apply tokens(ids="4000") to vocabulary')


@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2"]))
def test_a_cartridge(name: str, tmp_path: Path) -> None:
    base = shaken(ZOO[name]())
    batch = inputs(base)
    config = peft.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=2, task_type="CAUSAL_LM")
    theirs: Any = shaken(quietly(peft.get_peft_model, copy.deepcopy(base), config))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert ours.plan.bindings[0].method.values == {"length": 4, "reparam": None, "frozen": 2, "windowed": True}

    first, second = theirs(**batch), ours(**batch)
    torch.testing.assert_close(second.logits, first.logits, rtol=NEAR, atol=NEAR)
    first.loss.backward()
    second.loss.backward()
    (expected,) = (parameter.grad for parameter in theirs.parameters() if parameter.requires_grad)
    state = [get_attribute(ours, b.names[name]) for b in ours.plan.bindings for name in ("keys", "values")]
    found = torch.cat([tensor.grad for tensor in state], 1)
    assert found.shape == expected.shape == (2, expected.shape[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * NEAR * float(expected.abs().max()))

    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**batch).logits, first.logits, rtol=NEAR, atol=NEAR)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
