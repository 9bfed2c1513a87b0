"""Mixtures of copies of a method: one copy a pass, their average outside training, and consistency of two passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering
from transformers.modeling_outputs import Seq2SeqQuestionAnsweringModelOutput

import peftc
from byhooks import CLOSE, State, base, compiled, randomised, state_of
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute
from peftc.runtime.consistency import symmetric_divergence
from training import rows, trainer
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

MIXTURE = "apply mixture(lora(r=2), n=3, consistency={}) to attn.q, attn.v"


def picked(model: CompiledModule) -> list[int]:
    """The copy that each site used in the pass whose gradients are there: no other copy has any."""
    found = []
    for binding in model.plan.bindings:
        reached = [
            [copy for copy in range(3) if get_attribute(model, full).grad[copy].any()]
            for full in binding.names.values()
        ]
        assert reached[0] == reached[1]
        (one,) = reached[0]
        found.append(one)
    return found


def plain_with(states: Sequence[State]) -> CompiledModule:
    """The method by itself, with given parameters at each site."""
    plain = compiled("llama", "apply lora(r=2) to attn.q, attn.v")
    with torch.no_grad():
        for binding, state in zip(plain.plan.bindings, states, strict=True):
            for key, full in binding.names.items():
                get_attribute(plain, full).copy_(state[f"method.{key}"])
    return plain


def test_a_pass_of_a_mixture_uses_one_copy_a_site_all_alike_often() -> None:
    model = randomised("llama", MIXTURE.format(0)).train()
    model.logits_in_training = True
    batch = inputs(base("llama"))
    torch.manual_seed(0)
    counts = torch.zeros(len(model.plan.bindings), 3)
    differ = 0
    for step in range(60):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        picks = picked(model)
        differ += len(set(picks)) > 1
        counts[range(len(picks)), picks] += 1
        if step < 3:
            states = [state_of(model, binding) for binding in model.plan.bindings]
            chosen = [{k: t[one] for k, t in state.items()} for state, one in zip(states, picks, strict=True)]
            with torch.no_grad():
                torch.testing.assert_close(output.logits, plain_with(chosen)(**batch).logits, **CLOSE)
    # 240 picks at four sites: 80 of each copy on average, with a standard deviation of 7.3
    assert ((counts.sum(0) - 80).abs() < 5 * 7.3).all()
    assert ((counts - 20).abs() < 5 * 3.7).all(), "at each site by itself"
    assert differ > 40, "sites pick for themselves: all four agree in one pass of 27"


def test_a_mixture_is_its_average_outside_training_and_merged() -> None:
    model = randomised("llama", MIXTURE.format(1))
    batch = inputs(base("llama"))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    average = plain_with([{key: tensor.mean(0) for key, tensor in state.items()} for state in states])
    with torch.no_grad():
        expected = average(**batch)
        torch.testing.assert_close(model(**batch).logits, expected.logits, **CLOSE)
        torch.testing.assert_close(model.merge().eval()(**batch).logits, expected.logits, **CLOSE)
        assert torch.equal(model(**batch).logits, model(**batch).logits)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of two tensors of logits, averaged over positions, from the probabilities themselves."""
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def test_the_consistency_loss_written_out() -> None:
    """Wang et al. 2022, section 3.2, with the two passes made one after the other by a model that has no such loss."""
    one, two = randomised("llama", MIXTURE.format(0)).train(), randomised("llama", MIXTURE.format(0.7)).train()
    one.logits_in_training = two.logits_in_training = True
    batch = inputs(base("llama"))
    torch.manual_seed(5)
    p, q = one(**batch), one(**batch)
    assert not torch.allclose(p.logits, q.logits, atol=1e-2)
    both = (divergence(p.logits, q.logits) + divergence(q.logits, p.logits)) / 2
    expected = (p.loss + q.loss) / 2 + 0.7 * both
    expected.backward()
    torch.manual_seed(5)
    actual = two(**batch)
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected, **CLOSE)
    assert torch.equal(actual.logits, p.logits)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(theirs.grad, ours.grad, **CLOSE)


def test_there_is_one_pass_where_nothing_asks_for_two() -> None:
    """Outside training, without labels, and where `consistency` is zero."""
    batch = inputs(base("llama"))
    zero, one = randomised("llama", MIXTURE.format(0)), randomised("llama", MIXTURE.format(1))
    assert (zero.plan.consistency, one.plan.consistency) == (0, 1)
    with torch.no_grad():
        assert torch.equal(zero(**batch).loss, one(**batch).loss)
        zero.train(), one.train()
        unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
        results = []
        for model in (zero, one):
            torch.manual_seed(1)
            results.append((model(**unlabelled).logits, torch.get_rng_state()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1]), "as many picks in one as in the other"
        torch.manual_seed(1)
        zero(**batch)
        assert torch.equal(torch.get_rng_state(), results[0][1])


def test_a_gate_around_a_mixture_keeps_its_second_pass() -> None:
    plan = peftc.plan(base("llama"), "apply gated(mixture(lora(r=2), n=2, consistency=0.5)) to attn.q")
    assert plan.consistency == 0.5


def test_training_brings_the_copies_together() -> None:
    """AdaMix's effect: ten steps reduce the loss, and what one pass says less what another says."""
    model = randomised("llama", MIXTURE.format(1))
    batch = inputs(base("llama"))

    def between_passes() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            seen = [model.train()(**batch).logits for _ in range(12)]
            pairs = zip(seen[::2], seen[1::2], strict=True)
            return float(torch.stack([divergence(p, q) for p, q in pairs]).mean())

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss(), between_passes()
    optimizer = torch.optim.Adam(model.param_groups(lr=2e-2))
    for _ in range(10):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    after = loss(), between_passes()
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_torch_compile_takes_both_passes_as_one_graph() -> None:
    model = randomised("llama", MIXTURE.format(1)).train()
    batch = inputs(base("llama"))
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = model(**batch).loss
    torch.manual_seed(3)
    torch.testing.assert_close(fast(**batch).loss, expected, **CLOSE)


def test_a_trainer_trains_a_mixture(tmp_path: Path) -> None:
    model = randomised("llama", MIXTURE.format(1))
    before = {name: tensor.detach().clone() for name, tensor in model.trainable_parameters().items()}
    run = trainer(model, tmp_path, rows(9, 12), steps=4, lr=1e-2)
    run.train()
    assert len(run.losses) == 4
    assert all(torch.isfinite(torch.tensor(run.losses)))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.trainable_parameters().items())


def test_a_mixture_of_prefixes_is_its_average_outside_training() -> None:
    model = randomised("llama", "apply mixture(prefix(length=3), n=3) to attn")
    plain = compiled("llama", "apply prefix(length=3) to attn")
    batch = inputs(base("llama"))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            for key, full in theirs.names.items():
                get_attribute(plain, full).copy_(get_attribute(model, ours.names[f"method.{key}"]).mean(0))
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, **CLOSE)
        model.train()
        assert not torch.allclose(model(**batch).logits, model(**batch).logits, atol=1e-4), "copies are picked"
    model(**batch).loss.backward()
    for parameter in model.trainable_parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_places_without_a_label_do_not_count_in_the_consistency() -> None:
    """What stands at padding, whose label is -100, changes nothing."""
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 7, generator=random) for _ in range(2))
    kept = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])
    other = torch.where(kept[..., None], q, torch.randn(2, 5, 7, generator=random))
    expected = symmetric_divergence(p[kept], q[kept])
    torch.testing.assert_close(symmetric_divergence(p, other, kept.flatten()), expected, rtol=1e-5, atol=1e-6)


def test_two_passes_without_logits_are_refused() -> None:
    model = BertForQuestionAnswering(BertConfig(**ZOO["bert"]().config.to_dict()))
    tokens = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": tokens, "start_positions": tokens[:, 0], "end_positions": tokens[:, 1]}
    two = peftc.compile(model, "apply mixture(lora(r=2)) to attn.q", example=example)
    two(**example).loss.backward()  # start_logits and end_logits are compared
    with pytest.raises(peftc.PeftcError, match="consistency=0"):
        peftc.plan(NoLogits(), "apply mixture(lora(r=2)) to head", example=tokens)


class NoLogits(nn.Module):
    """Returns a loss, and features by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Seq2SeqQuestionAnsweringModelOutput:
        features = self.head(self.table(tokens))
        return Seq2SeqQuestionAnsweringModelOutput(loss=features.square().mean(), encoder_last_hidden_state=features)
