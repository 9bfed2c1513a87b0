"""Gated methods, at layers and at attentions, against their formula written out with hooks on the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from byhooks import CLOSE, Hook, State, adapter_branch, agree, base, compiled, gate, lora_branch, randomised, state_of
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from zoo import VOCABULARY, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "spec", "function"),
    [
        ("llama", "apply gated(lora(r=3)) to attn.q, attn.v", lambda x, y, s: y + gate(x, s) * lora_branch(x, s)),
        ("gpt2", "apply gated(lora(r=3)) to attn.q, attn.v", lambda x, y, s: y + gate(x, s) * lora_branch(x, s)),
        ("bert", "apply gated(adapter(size=5)) to mlp", lambda x, h, s: h + gate(x, s) * adapter_branch(h, s)),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_a_gate_written_out(name: str, spec: str, function: Hook) -> None:
    agree(name, randomised(name, spec), function)


def test_a_gate_shows_no_token_what_follows() -> None:
    model = randomised("llama", "apply gated(lora(r=3)) to attn.q, attn.v\napply gated(adapter(size=4)) to mlp")
    batch = inputs(base("llama"))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = model(**batch).logits, model(**other).logits
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_a_gate_opens_and_closes() -> None:
    """Far open it is the method itself, far closed the base."""
    spec = "apply {} to attn.q, attn.v"
    model, plain = randomised("llama", spec.format("gated(lora(r=3))")), compiled("llama", spec.format("lora(r=3)"))
    batch = inputs(base("llama"))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            get_attribute(model, ours.names["w"]).zero_()
            for key in ("A", "B"):
                get_attribute(plain, theirs.names[key]).copy_(get_attribute(model, ours.names[f"method.{key}"]))
        for bias, expected in ((50.0, plain), (-50.0, base("llama"))):
            for binding in model.plan.bindings:
                get_attribute(model, binding.names["b"]).fill_(bias)
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, **CLOSE)


# ---- At attentions ---------------------------------------------------------------------------------------------------


def test_a_gated_prefix_written_out() -> None:
    """y + σ(w x + b) (y' - y), where y' attends to [P, k] and [Q, v], on BERT: outputs and gradients."""
    model = randomised("bert", "apply gated(prefix(length=3)) to attn")
    batch = inputs(base("bert"))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    handles = []

    def heads(flat: Tensor) -> Tensor:
        return torch.as_tensor(flat.unflatten(-1, (4, 8)).transpose(1, 2))

    for layer, state in zip(base("bert").get_submodule("bert.encoder.layer").children(), states, strict=True):

        def hook(module: Any, args: Any, outputs: Any, state: State = state) -> Any:
            x, y = args[0], outputs[0]
            keys, values = (
                torch.cat([state[f"method.{name}"].expand(2, -1, -1), project(x)], 1)
                for name, project in (("keys", module.key), ("values", module.value))
            )
            scores = heads(module.query(x)) @ heads(keys).transpose(-1, -2) / 8**0.5
            changed = (scores.softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)
            return y + gate(x, state) * (changed - y), *outputs[1:]

        handles.append(layer.get_submodule("attention.self").register_forward_hook(hook))
    expected = base("bert")(**batch)
    for handle in handles:
        handle.remove()
    actual = model(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    actual.loss.backward()
    expected.loss.backward()
    for binding, state in zip(model.plan.bindings, states, strict=True):
        for key, full in binding.names.items():
            torch.testing.assert_close(get_attribute(model, full).grad, state[key].grad, **CLOSE)
    for parameter in base("bert").parameters():
        parameter.grad = None


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow),
                                  pytest.param("bloom", marks=pytest.mark.slow)])  # fmt: skip
def test_a_gate_opens_and_closes_at_a_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far closed it is the base, whose positions count on from nothing; far open the prefix, if that took no places."""
    prefix = methods()["prefix"]
    monkeypatch.setattr(prefix, "takes_positions", lambda self, site: 0)
    model = randomised(name, "apply gated(prefix(length=3)) to attn")
    plain = compiled(name, "apply prefix(length=3) to attn")
    batch = inputs(base(name))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            get_attribute(model, ours.names["w"]).zero_()
            for key, full in theirs.names.items():
                get_attribute(plain, full).copy_(get_attribute(model, ours.names[f"method.{key}"]))
        for bias, expected in ((50.0, plain), (-50.0, base(name))):
            for binding in model.plan.bindings:
                get_attribute(model, binding.names["b"]).fill_(bias)
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, **CLOSE)
        assert (plain(**batch).logits - base(name)(**batch).logits).abs().max() > 1e-3


# ---- Around other methods --------------------------------------------------------------------------------------------


def test_a_gate_lets_calibration_through() -> None:
    """The method under it starts from data as it does by itself."""
    batches = [inputs(base("llama"))]
    spec = "apply {} to attn.q"
    for inner in ("sparse(lora(r=2), by=snip)", "lora(r=2, init=eva)"):
        plain = compiled("llama", spec.format(inner), calibration=batches)
        model = compiled("llama", spec.format(f"gated({inner})"), calibration=batches)
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            for key, full in theirs.names.items():
                if "B" not in key:  # whose zeros are judged at numbers drawn later in one than in the other
                    assert torch.equal(get_attribute(model, ours.names[f"method.{key}"]), get_attribute(plain, full))


def test_a_gated_weight_that_claims_its_layer() -> None:
    """DoRA's change of the output goes through a gate as any other; its claim on the weight stands."""
    model = randomised("llama", "apply gated(dora(r=3)) to attn.q, attn.v")
    weights = [base("llama").get_parameter(binding.site.parameters[0]) for binding in model.plan.bindings]

    def dora(x: Tensor, y: Tensor, state: State) -> Tensor:
        weight = next(w for w in weights if len(w) == y.shape[-1] and torch.allclose(x @ w.t(), y))
        changed = weight + 16 / 3 * state["method.B"] @ state["method.A"]
        length = state["method.m"] / changed.detach().norm(dim=1)
        return torch.as_tensor(y + gate(x, state) * (length * (x @ changed.t()) - y))

    agree("llama", model, dora)
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(base("llama"), "apply gated(dora) to attn.q\napply lora to attn.q")
    assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"weight-claimed"}


def test_two_gates_at_one_place_over_different_methods() -> None:
    spec = "apply gated(adapter(size=3)) to attn, mlp\napply gated(prefix(length=2)) to attn"
    plan = peftc.plan(ZOO["llama"](), spec)
    assert len({binding.path for binding in plan.bindings}) == len(plan.bindings) == 6
