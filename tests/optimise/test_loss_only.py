"""The graph of a training step with more than one rule of its own, or with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

import peftc
from peftc.graph.patterns import anything, either, op, value
from peftc.optimise.fuse import fuse
from peftc.protocol import rule
from peftc.protocol.rule import Editor, Fusion, Match
from tiny import Tagger, example
from zoo import ZOO, inputs

aten = torch.ops.aten
SPEC = "apply lora(r=2) to linear except head\n"


class LookedUp(Fusion):
    """A second rule for a training step: the same look-up, as a node of its own."""

    name = "looked_up"
    in_training = True
    pattern = either(
        op(aten.embedding.default, value("table"), value("tokens"), anything("padding")),
        op(aten.embedding.default, value("table"), value("tokens")),
    )

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        return [editor.emit(match, match.root, aten.embedding.default, match["table"], match["tokens"])]


class Nowhere(LookedUp):
    """A third, which fits nowhere."""

    name = "nowhere"
    pattern = op(aten.erfinv.default, value("x"))


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers rules for one test."""
    rule.fusions()

    def register(*rules: type[Fusion]) -> None:
        monkeypatch.setattr(rule, "_registry", {**rule._registry, **{one.name: one for one in rules}})
        rule.fusions.cache_clear()

    return register


@pytest.fixture(autouse=True)
def forgotten(register: Register, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is not there for the next."""
    yield
    monkeypatch.undo()
    rule.fusions.cache_clear()
    assert "looked_up" not in {one.name for one in rule.fusions()}


def counts(compiled: peftc.CompiledModule) -> dict[str, int]:
    return {one.rule: one.count for one in compiled.fired if one.rule in ("chunked_loss", "looked_up", "nowhere")}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """What a training step returns, and the gradients."""
    found = model(**batch)
    learning = [tensor for tensor in model.parameters() if tensor.requires_grad]
    return found.get("logits"), found["loss"], list(torch.autograd.grad(found["loss"], learning))


def same_step(compiled: peftc.CompiledModule, oracle: peftc.CompiledModule, batch: dict[str, Tensor]) -> None:
    oracle.load_state_dict(compiled.state_dict())
    logits, loss, gradients = step(compiled, batch)
    _, expected, wanted = step(oracle, batch)
    assert logits is None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert compiled.eval()(**batch)["logits"] is not None


def test_two_rules_of_a_training_step(register: Register) -> None:
    register(LookedUp, Nowhere)
    model = ZOO["llama"]()
    compiled = peftc.compile(model, SPEC)
    assert counts(compiled) == {"chunked_loss": 1, "looked_up": 1, "nowhere": 0}
    same_step(compiled, peftc.compile(model, SPEC, fuse=False), inputs(model))
    assert "looked_up" in compiled.report()


def test_one_of_two_is_enough(register: Register) -> None:
    register(LookedUp)
    model = Tagger()
    compiled = peftc.compile(model, "train bias\n", example=example(model))
    assert counts(compiled) == {"chunked_loss": 0, "looked_up": 1}
    batch = {"input_ids": torch.randint(11, (3, 4)), "labels": torch.randint(5, (3, 4))}
    same_step(compiled, peftc.compile(model, "train bias\n", example=example(model), fuse=False), batch)


def test_none_fires(register: Register) -> None:
    register(Nowhere)
    model = Tagger()
    compiled = peftc.compile(model, "train bias\n", example=example(model))
    assert counts(compiled) == {"chunked_loss": 0, "nowhere": 0}
    assert compiled(**example(model))["logits"] is not None


def test_no_rules_are_none() -> None:
    """And not all that there are."""
    model = Tagger()
    plan = peftc.plan(model, "train bias\n", example=example(model))
    assert fuse(plan.captured.module, plan.captured.module.graph, rules=[]) == ()
