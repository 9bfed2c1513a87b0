"""Fusions of whole models: how often each rule fires, with equal losses and gradients, and what is told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftc
from fusioncases import TOLERANCE, Case, lora, number, rewritten
from golden import check
from paths import GOLDEN
from peftc.protocol.rule import fusions
from peftc.show.screen import rendered
from peftc.show.tables import fusions_table
from zoo import ZOO, inputs

# ---- What is told ----------------------------------------------------------------------------------------------


def test_every_rule_says_what_it_is() -> None:
    for one in fusions():
        assert type(one).__doc__
        assert one.pattern.size > 0
    names = [one.name for one in fusions()]
    assert len(names) == len(set(names))


def test_the_table_of_fusions(request: pytest.FixtureRequest) -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        normal = case.n * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return lora(normal, F.linear(normal, case.w), case.lora_A, case.lora_B, 2.0)

    model = Case(function, n=(7,), w=(5, 7), lora_A=(2, 7), lora_B=(5, 2))
    names = ["rms_norm", "gated_activation", "lora_linear"]
    _, _, fired = rewritten(model, (number(2, 3, 7),), ("lora_A", "lora_B", "w"), names)
    table = fusions_table(fired)
    assert table
    check(GOLDEN / "fusions" / "table.txt", rendered(table) + "\n", request.config)
    assert fusions_table([]) is None, "headings alone say nothing"
    assert [one.to_json()["fired"] for one in fired] == [1, 0, 0]
    told = fired[2].to_json()["nearest_miss"]
    assert told["reason"] == "w learns, too"
    assert told["nodes"] == ("w",)


# ---- Whole models ----------------------------------------------------------------------------------------------

LORA = "apply lora(r=4) to attn.*, mlp.*"
IA3 = "apply ia3 to attn.k, attn.v, mlp.down"
# model, spec -> how often each rule fires; those that are not named never do
COUNTS: list[tuple[str, str, dict[str, int]]] = [
    ("llama", LORA, {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("gpt2", LORA, {"spelt_gelu": 2, "lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("mistral", LORA, {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("qwen2", LORA, {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("qwen3", LORA, {"rotary": 2, "rms_norm": 9, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("gemma2", LORA, {"rotary": 2, "rms_norm": 9, "gated_activation": 2, "lora_linear": 8}),
    ("gemma3", LORA, {"rotary": 2, "rms_norm": 13, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
    ("phi", LORA, {"rotary": 2, "spelt_gelu": 2, "lora_linear": 6, "chunked_loss": 1}),
    ("phi3", LORA,
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_rows": 10, "lora_linear": 8, "chunked_loss": 1}),
    ("gpt_neox", LORA, {"rotary": 2, "lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("opt", LORA, {"lora_linear": 8, "chunked_loss": 1}),
    ("bloom", LORA, {"spelt_gelu": 2, "lora_rows": 6, "lora_linear": 8, "chunked_loss": 1}),
    ("falcon", LORA, {"rotary": 2, "lora_rows": 6, "lora_linear": 6, "chunked_loss": 1}),
    ("mixtral", LORA,
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_rows": 4, "lora_linear": 4, "expert_lora": 4,
      "chunked_loss": 1}),
    ("gpt_oss", LORA, {"rms_norm": 5, "lora_rows": 4, "lora_linear": 4, "expert_lora": 4, "chunked_loss": 1}),
    ("llama4", LORA, {"rms_norm": 9, "gated_activation": 4, "lora_linear": 8, "chunked_loss": 1}),
    ("bert", LORA, {"lora_linear": 8}),
    ("modernbert", LORA, {"rotary": 2, "gated_activation": 2, "lora_rows": 10, "lora_linear": 8, "chunked_loss": 1}),
    ("t5", LORA, {"rms_norm": 12, "lora_linear": 22, "chunked_loss": 1}),
    ("t5_gated", LORA,
     {"spelt_gelu": 4, "rms_norm": 12, "gated_activation": 4, "lora_linear": 22, "chunked_loss": 1}),
    ("bart", LORA, {"lora_linear": 22, "chunked_loss": 1}),
    ("vit", LORA, {"lora_linear": 8}),
    ("mixtral", "apply adapter(size=8, at=parallel) to mlp",
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "adapter": 2, "expert_linear": 4, "chunked_loss": 1}),
    ("bert", "apply adapter(size=8) to attn, mlp", {"adapter": 4}),
    ("t5", "apply adapter(size=8) to attn, mlp", {"rms_norm": 12, "adapter": 10, "chunked_loss": 1}),
    ("llama", "apply dora(r=4) to attn.*, mlp.*",
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "row_lengths": 14, "dora_linear": 8,
      "chunked_loss": 1}),
    ("qwen2", "apply dora(r=4) to attn.*",
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "row_lengths": 8, "dora_linear": 4,
      "chunked_loss": 1}),
    ("gpt2", IA3, {"spelt_gelu": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("qwen2", IA3, {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "scaled_linear": 4, "chunked_loss": 1}),
    ("phi3", IA3,
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("bloom", IA3, {"spelt_gelu": 2, "scaled_rows": 4, "scaled_linear": 2, "chunked_loss": 1}),
    ("t5", IA3, {"rms_norm": 12, "scaled_linear": 12, "chunked_loss": 1}),
    ("llama", "apply vera(r=4) to attn.*", {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "chunked_loss": 1}),
    ("llama", "apply loha(r=2) to attn.*, mlp.*",
     {"rotary": 2, "rms_norm": 5, "gated_activation": 2, "lora_linear": 8, "chunked_loss": 1}),
]  # fmt: skip


def marked(cases: list[tuple[str, str, dict[str, int]]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-{case[1].split()[1]}", marks=marks) for case in cases]


@pytest.mark.parametrize(("name", "spec", "counts"), [*marked(COUNTS[:1]), *marked(COUNTS[1:], pytest.mark.slow)])
def test_whole_models(name: str, spec: str, counts: dict[str, int]) -> None:
    """Losses and gradients in eval mode, where there is no dropout, and the loss that training computes in chunks."""
    model = ZOO[name]()
    batch = inputs(model)
    plain, fused = (_at_random(peftc.compile(model, spec, fuse=fuse)).eval() for fuse in (False, True))
    assert {one.rule: one.count for one in fused.fired if one.count} == counts
    losses = [module(**batch).loss for module in (plain, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=TOLERANCE, atol=TOLERANCE)
    for loss in losses:
        loss.backward()
    learned = fused.trainable_parameters()
    for key, parameter in plain.trainable_parameters().items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max().clamp_min(1e-2))  # of the largest entry, 1e-2 where all are smaller
        difference = learned[key].grad / scale - parameter.grad / scale  # type: ignore[operator]
        assert difference.abs().max() < TOLERANCE, key


def _at_random(module: peftc.CompiledModule) -> peftc.CompiledModule:
    """Numbers that hide nothing, the same for modules whose parameters come in another order."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(module.trainable_parameters().items())):
            parameter.copy_(0.1 * number(*parameter.shape, seed=seed))
    return module


@pytest.fixture
def llama() -> peftc.CompiledModule:
    return _at_random(peftc.compile(ZOO["llama"](), LORA))


def test_training_returns_the_loss_alone(llama: peftc.CompiledModule) -> None:
    """The same loss and gradients as eval mode's, which has the logits, too."""
    batch = inputs(llama.base)
    with_logits = llama.eval()(**batch)
    without = llama.train()(**batch)
    assert without.logits is None
    assert with_logits.logits.shape == (2, 7, 97)
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(llama.trainable_parameters().values())
    gradients = [torch.autograd.grad(result.loss, parameters) for result in (without, with_logits)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    del batch["labels"]
    assert llama(**batch).logits is not None
    assert llama(**batch).loss is None


@pytest.mark.slow
def test_training_returns_logits_to_who_asks(llama: peftc.CompiledModule) -> None:
    batch = inputs(llama.base)
    llama.logits_in_training = True
    assert llama(**batch).logits is not None
    assert peftc.compile(llama.base, LORA, fuse=False)(**batch).logits is not None


@pytest.mark.slow
def test_a_head_that_learns_returns_logits() -> None:
    model = ZOO["llama"]()
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q\ntrain head")
    assert compiled(**inputs(model)).logits is not None
    told = {one.rule: str(one.nearest) for one in compiled.fired}
    assert told["chunked_loss"] == "the head's lm_head.weight learns"
