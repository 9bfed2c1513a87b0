"""`torch.compile` of compiled models: the same numbers, few recompilations, and no more kept than eager mode keeps.

What is kept is asked of the `aot_eager` backend, which needs no C++ compiler and cuts the graph with Inductor's
function; Inductor itself computes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import peftc
from marks import by_inductor
from peftc.bench.saved_bytes import saved_bytes
from peftc.driver.compiled import CompiledModule
from peftc.optimise.regions import BlockModule
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
LORA = "apply lora(r=4) to attn.*, mlp.*"
DORA = "apply dora(r=4) to attn.*, mlp.*"
DROPOUT = "apply lora(r=4, dropout=0.1) to attn.*, mlp.*"
QUANTIZE = "quantize linear except head with"
# The eager cut may keep a small value behind a large product, which the rule keeps: 1.06 on Llama 4's experts.
SLACK = 1.07


def model_of(spec: str, family: str = "llama") -> CompiledModule:
    """With random state, since a zero B hides half of it."""
    model = peftc.compile(ZOO[family](), spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def compiled(model: nn.Module, backend: Any, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def step(model: nn.Module, call: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of everything that learns; `call` is the model or its compiled form."""
    model.zero_grad()
    torch.manual_seed(3)
    loss: Tensor = call(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: nn.Module, fast: Any, batch: dict[str, Tensor]) -> None:
    """To float32's rounding: the same sums in another order."""
    (loss, gradients), (other, others) = step(model, model, batch), step(model, fast, batch)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def kept_bytes(model: nn.Module, call: Any, batch: dict[str, Tensor]) -> int:
    """What a step holds between its passes, less what is there anyway."""
    return saved_bytes(lambda: call(**batch).loss, [*model.parameters(), *model.buffers(), *batch.values()])


# --- numbers -------------------------------------------------------------------------------------------------------


@by_inductor
@pytest.mark.parametrize(
    ("spec", "family"),
    [
        (DROPOUT, "llama"),
        (DORA, "llama"),
        ("apply loha(r=4) to attn.*", "llama"),
        ("apply lokr(r=4) to attn.*", "llama"),
        ("apply ia3 to attn.k, attn.v, mlp.down", "llama"),
        ("apply adapter(size=8) to attn, mlp", "llama"),
        ("apply prefix(length=4) to attn", "llama"),
        ("apply prompt(length=4)", "llama"),
        (f"{QUANTIZE} nf4(double=true)\n{LORA}", "llama"),
        (f"{QUANTIZE} int8\n{LORA}", "llama"),
        (f"{QUANTIZE} nf4\n{DORA}", "llama"),
        ("apply lora(r=4) to expert", "mixtral"),
        ("apply adalora(r=4, target=2) to attn.*", "llama"),
    ],
    ids=[
        "dropout", "dora", "loha", "lokr", "ia3", "adapter", "prefix", "prompt", "nf4", "int8", "nf4-dora",
        "experts", "adalora",
    ],
)  # fmt: skip
def test_inductor_computes_the_same(spec: str, family: str) -> None:
    model = model_of(spec, family)
    # eager mode's random numbers, or what is dropped would differ
    with torch._inductor.config.patch(fallback_random=True):
        fast = compiled(model, "inductor", dynamic=True)
        for size in ((2, 16), (3, 11)):
            assert_alike(model, fast, inputs(model.base, *size))


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["nf4(double=true)", "fp4", "int8"])
@pytest.mark.parametrize("spec", [LORA, DORA], ids=["lora", "dora"])
def test_no_unpacked_weight_is_kept(spec: str, storage: str) -> None:
    """They would be 4 bytes a number, all layers' at once, where the storage has half a byte or one."""
    batch = inputs(ZOO["llama"](), 2, 16)
    found = []
    for quantised in ("", f"{QUANTIZE} {storage}\n"):
        model = model_of(quantised + spec)
        found.append(kept_bytes(model, compiled(model, "aot_eager", dynamic=False), batch))
    assert found[0] == found[1]


@by_inductor
def test_inductor_keeps_no_unpacked_weight() -> None:
    """Its own decompositions come before its cut. What it makes may go to torch's cache."""
    model = model_of(f"{QUANTIZE} nf4\n{LORA}")
    batch = inputs(model.base, 2, 16)
    fast = compiled(model, "inductor", dynamic=False)
    counters["aot_autograd"].clear()
    assert kept_bytes(model, fast, batch) <= SLACK * kept_bytes(model, model, batch)
    assert not counters["aot_autograd"]["autograd_cache_bypass"]


@pytest.mark.parametrize("name", ZOO)
def test_no_more_is_kept_than_in_eager_mode(name: str) -> None:
    model = model_of("apply lora(r=4) to attn.*", name)
    batch = inputs(model.base, 4, 32)
    fast = compiled(model, "aot_eager", dynamic=False)
    assert_alike(model, fast, batch)
    assert kept_bytes(model, fast, batch) <= SLACK * kept_bytes(model, model, batch)


@pytest.mark.parametrize("spec", [LORA, DROPOUT], ids=["lora", "dropout"])
def test_a_checkpointed_block_keeps_its_input_alone(spec: str) -> None:
    """What is random beside it: the same numbers are dropped in both passes."""
    model = model_of(f"{spec}\ncheckpoint block in layers[1:]")
    batch = inputs(model.base, 4, 32)
    fast = compiled(model, "aot_eager", dynamic=False)
    assert_alike(model, fast, batch)
    assert kept_bytes(model, fast, batch) <= kept_bytes(model, model, batch)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_batch_of_one_runs_too(name: str) -> None:
    """It was captured with two rows, and operations were asked whether these are one."""
    model = peftc.compile(ZOO[name](), LORA).eval()
    batch = inputs(model.base, 1, 7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, "eager")(**batch).loss, model(**batch).loss)


def test_what_a_trainer_asks_for_after_the_compile_counts() -> None:
    """The code is compiled anew where blocks are to be computed again, and not to be any more."""
    model = model_of(LORA)
    batch = inputs(model.base, 4, 32)
    fast = compiled(model, "aot_eager", dynamic=False)
    assert_alike(model, fast, batch)
    kept = [kept_bytes(model, fast, batch)]
    for change in (model.activation_checkpointing_enable, model.activation_checkpointing_disable):
        change()
        assert_alike(model, fast, batch)
        kept.append(kept_bytes(model, fast, batch))
    assert kept[1] < 0.7 * kept[0]
    assert kept[2] == kept[0]


def test_a_block_that_writes_in_place_runs_as_it_is_written() -> None:
    """A region with tags must not: a value that is computed again would be another one."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.call_function(torch.ops.aten.mul_.Tensor, (y, 2.0))
    graph.output(graph.call_function(torch.ops.aten.exp.default, (y,)))
    given = torch.randn(3, 5, requires_grad=True)
    result = compiled(BlockModule(nn.Module(), graph), "aot_eager")(given)
    (gradient,) = torch.autograd.grad(result.sum(), given)
    expected = torch.exp(2 * torch.sin(given.detach()))
    torch.testing.assert_close(result.detach(), expected)
    torch.testing.assert_close(gradient, expected * 2 * torch.cos(given.detach()))
