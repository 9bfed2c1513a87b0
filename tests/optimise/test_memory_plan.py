"""Blocks as one autograd function: the same numbers as the graph run as it is, and the fewest bytes kept."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import golden
import peftc
from marks import first_is_quick
from paths import GOLDEN
from peftc.bench.saved_bytes import saved_bytes
from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.compiled import CompiledModule
from peftc.graph.cut import cheapest
from peftc.kernels.common.products import product
from peftc.optimise import fuse as fusion
from peftc.optimise.joint import lifted
from peftc.optimise.regions import BlockModule, Kind, _Holder, program
from zoo import ZOO, inputs

torch.set_num_threads(1)
NAMES = first_is_quick(list(ZOO))
LORA = "apply lora(r=4) to attn.*"


def blocks(model: nn.Module) -> list[BlockModule]:
    return [module for module in model.modules() if isinstance(module, BlockModule)]


def planned(plain: CompiledModule) -> CompiledModule:
    """A copy of a model that was compiled without fusions, whose blocks are planned."""
    twin = copy.deepcopy(plain)
    for path in twin.plan.sites.blocks:
        parent, _, leaf = path.rpartition(".")
        block = twin.get_submodule(path)
        assert isinstance(block, fx.GraphModule)
        twin.get_submodule(parent).add_module(leaf, BlockModule(block, block.graph))
    return twin.train(plain.training)


def pair(name: str, spec: str = LORA) -> tuple[CompiledModule, CompiledModule]:
    """A model run as it is written, and with planned blocks; state is random, since a zero B hides half of it."""
    plain = peftc.compile(ZOO[name](), spec, fuse=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in plain.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return plain, planned(plain)


def step(model: nn.Module, batch: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of everything that learns."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """What a training step holds between its passes, less what is there anyway."""
    return saved_bytes(lambda: model(**batch).loss, [*model.parameters(), *model.buffers(), *batch.values()])


def assert_alike(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Equal but for the order of sums: a value that several read gets its gradients added in another order."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_a_planned_block_computes_what_is_written(name: str, train: bool) -> None:
    """With the model's own dropout in train mode, and at other sizes than those it was traced at."""
    plain, twin = pair(name)
    plain.train(train)
    twin.train(train)
    for size in ((3, 11), (1, 5)):
        batch = inputs(plain.base, *size)
        assert_alike(step(plain, batch), step(twin, batch))
    assert all(block._lifted[train] is not None for block in blocks(twin))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.slow
def test_a_plan_keeps_less(name: str) -> None:
    plain, twin = pair(name)
    batch = inputs(plain.base, 4, 32)
    assert kept_bytes(twin, batch) < kept_bytes(plain, batch)


def kept(model: CompiledModule, path: str) -> str:
    """What a block's plan keeps, one value a line, its own tensors and what all blocks read left out."""
    block = model.get_submodule(path)
    assert isinstance(block, BlockModule)
    known = block._lifted[True]
    assert known is not None
    graph, text = known
    needs = tuple(node.name.endswith(("_a", "_b")) or place == 0 for place, node in enumerate(graph.inputs))
    passes = program(Kind(text, needs, (), torch.device("cpu"), None, recompute_all=False), _Holder(graph)).passes
    shown = [node for node in passes.kept if isinstance(node.meta["val"], Tensor)]
    lines = [
        f"{tuple(node.meta['val'].shape)}  {'input' if node.op == 'placeholder' else node.target}"
        for node in shown
        if node.op != "placeholder" or node.name == "given_1"
    ]
    return "\n".join(lines) + "\n"


def test_what_a_block_keeps(request: pytest.FixtureRequest) -> None:
    """No output of a norm, no activation, no copy of keys for each query head, no view beside what it shows."""
    model = peftc.compile(ZOO["llama"](), "apply lora(r=4) to attn.*, mlp.*")
    step(model, inputs(ZOO["llama"]()))
    golden.check(GOLDEN / "memory_plan" / "llama.txt", kept(model, "model.layers.1"), request.config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [("llama", "apply ia3 to attn.k, attn.v, mlp.down"), ("llama", "apply ia3(on=output) to attn.*, mlp.*"),
     ("llama", "quantize linear except head with nf4\napply ia3 to attn.k, attn.v"),
     ("gpt2", "apply ia3 to attn.k, attn.v, mlp.down")],
)  # fmt: skip
def test_a_scaled_product_keeps_no_more_than_the_product(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its backward pass reads, its own output, stands in the product's place."""
    batch = inputs(ZOO[name]())
    fused = peftc.compile(ZOO[name](), spec)
    others = tuple(rule for rule in fusion.fusions() if rule.name not in ("scaled_linear", "scaled_rows"))
    monkeypatch.setattr(fusion, "fusions", lambda: others)
    alone = peftc.compile(ZOO[name](), spec)
    assert {one.rule: one.count for one in fused.fired or ()}["scaled_linear"]
    assert kept_bytes(fused, batch) <= kept_bytes(alone, batch)


@pytest.mark.slow
def test_weights_are_unpacked_again_in_the_backward_pass() -> None:
    """A dense weight would be kept for the gradient of its input: 4 bytes a number where it lies in half a byte."""
    batch = inputs(ZOO["llama"](), 2, 8)
    found = []
    for quantised in ("", "quantize linear except head with nf4\n"):
        model = peftc.compile(ZOO["llama"](), quantised + LORA)
        found.append(kept_bytes(model, batch))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_checkpointed_block_keeps_its_input_alone() -> None:
    batch = inputs(ZOO["llama"](), 4, 32)
    models = []
    for spec in (LORA, f"{LORA}\ncheckpoint block in layers[1:]"):
        torch.manual_seed(0)
        models.append(peftc.compile(ZOO["llama"](), spec))
    whole, again = (kept_bytes(model, batch) for model in models)
    hidden = 4 * 32 * 32 * 4
    assert whole - again > 5 * hidden  # what the second block kept beside its input
    first, second = (step(model, batch) for model in models)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], gradient) for name, gradient in second[1].items())
    evaluated = kept_bytes(models[1].eval(), batch)  # a training step's loss keeps no logits, which the table counts
    assert models[1].plan.memory(4, 32).activations == pytest.approx(evaluated, rel=0.05)


@pytest.mark.parametrize("spec", ["apply prompt(length=4)", "apply adalora to attn.k, attn.v"])
def test_equal_values_of_a_block_lie_apart(spec: str) -> None:
    """Of blocks alike and of sites alike within one, or they pass for views of one tensor and nothing is planned."""
    compiled = peftc.compile(ZOO["llama"](), f"{spec}\ncheckpoint block")
    assert all(lifted(block, block.graph, trains=True) for block in blocks(compiled))


def test_a_checkpoint_is_a_block() -> None:
    with pytest.raises(PeftcError, match="wrong-site"):
        peftc.plan(ZOO["llama"](), f"{LORA}\ncheckpoint mlp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_autocast_is_in_the_plan(dtype: torch.dtype) -> None:
    """The casts are those that eager mode makes; sums of half-precision gradients come in another order."""
    plain, twin = pair("llama")
    batch = inputs(ZOO["llama"](), 2, 8)
    with torch.autocast("cpu", dtype):
        one, other = step(plain, batch), step(twin, batch)
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=0)
    for name, gradient in one[1].items():
        bound = 3e-2 * float(gradient.abs().max())  # eight bits of a bfloat16, over some sums
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=bound)
    exact = step(twin, batch)
    assert not torch.equal(exact[0], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_autocast_reaches_what_is_fused(dtype: torch.dtype) -> None:
    """Behind an attention or an activation the input is half precision, and the frozen weight is not."""
    models = [peftc.compile(ZOO["llama"](), "apply lora(r=4) to attn.*, mlp.*", fuse=fuse) for fuse in (True, False)]
    batch = inputs(ZOO["llama"](), 2, 8)
    losses = []
    for model in models:
        with torch.autocast("cpu", dtype):
            losses.append(step(model.train(), batch)[0])
            with torch.no_grad():
                losses.append(model.eval()(**batch).loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-2, atol=0)  # eight bits of a bfloat16


@pytest.mark.slow
def test_a_block_may_return_a_turned_tensor() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.linear(self.norm(x.transpose(1, 2)))).transpose(1, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Turned() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    base, x = Model(), torch.randn(3, 6, 5)
    models = [peftc.compile(base, "apply lora(r=2, init=gaussian) to linear", example=x, fuse=f) for f in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    found = [torch.autograd.grad(m(x).square().sum(), [*m.trainable_parameters().values()]) for m in models]
    names = [list(m.trainable_parameters()) for m in models]
    other = dict(zip(names[1], found[1], strict=True))
    for name, gradient in zip(names[0], found[0], strict=True):
        torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6)


def test_a_result_that_nothing_learns_of_has_no_gradient() -> None:
    """The first block's keys, which its own result reads, too; the next one's come of what learns."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
            keys = self.k(x).tanh()
            return x + self.q(x) * keys.mean(1, keepdim=True), keys[:, 1:], 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            total = x.new_zeros(())
            for layer in self.layers:
                x, keys, times = layer(x)
                total = total + times * keys.square().sum()
            return x.square().sum() + total

    base, x = Model(), torch.randn(3, 6, 5)
    models = [peftc.compile(base, 'apply lora(r=2, init=gaussian) to "**.q"', example=x, fuse=f) for f in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    found = [torch.autograd.grad(m(x), [*m.trainable_parameters().values()]) for m in models]
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert len(blocks(models[0])) == 3


@pytest.mark.slow
def test_threads_may_call_it_first_together() -> None:
    program.cache_clear()
    model = peftc.compile(ZOO["llama"](), LORA).eval()
    batch = inputs(ZOO["llama"]())
    with ThreadPoolExecutor(3) as pool:
        losses = list(pool.map(lambda _: model(**batch).loss.detach(), range(3)))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("bias", [torch.arange(96.0)[::2], torch.ones(1).expand(48), torch.arange(48.0)])
def test_a_product_reads_a_bias_as_it_lies(bias: Tensor) -> None:
    left, weight = torch.randn(32, 40), torch.randn(48, 40)
    torch.testing.assert_close(product(left, weight.t(), bias), left @ weight.t() + bias)


@pytest.mark.slow
def test_without_gradients_the_graph_runs_as_it_is() -> None:
    plain, twin = pair("llama")
    batch = inputs(ZOO["llama"]())
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, twin.eval()(**batch).logits)
    assert not any(block._lifted for block in blocks(twin))


@pytest.mark.slow
def test_equal_blocks_share_one_plan() -> None:
    program.cache_clear()
    model = peftc.compile(ZOO["llama"](), LORA)
    step(model, inputs(ZOO["llama"]()))
    assert program.cache_info().misses == 2  # the first block's input needs no gradient
    step(peftc.compile(ZOO["llama"](), LORA), inputs(ZOO["llama"](), 3, 9))
    assert program.cache_info().misses == 2


@pytest.mark.slow
def test_a_second_derivative_is_refused() -> None:
    _, twin = pair("llama")
    loss = twin(**inputs(ZOO["llama"]())).loss
    learning = list(twin.trainable_parameters().values())
    with pytest.raises(peftc.PeftcError, match="second-derivative"):
        torch.autograd.grad(loss, learning, create_graph=True)


@pytest.mark.slow
def test_the_caller_s_hooks_see_the_step_and_not_the_trace() -> None:
    """Such as those that move what is saved to the host: while a block is traced its tensors have no memory."""
    program.cache_clear()
    model = peftc.compile(ZOO["llama"](), LORA)
    with torch.autograd.graph.save_on_cpu():
        loss, gradients = step(model, inputs(ZOO["llama"]()))
    again = step(model, inputs(ZOO["llama"]()))
    assert torch.equal(loss, again[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in again[1].items())


# --- the cut itself ------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[fx.Graph, dict[fx.Node, int], set[fx.Node], set[fx.Node]]:
    """A graph of up to nine values: their bytes, which are dear to compute, and which the backward pass reads."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{place}") for place in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(1, 7))):
        sources = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2, unique=True))
        nodes.append(graph.call_function(F.silu, tuple(sources)))
    size = {node: draw(st.integers(0, 9)) for node in nodes}
    dear = {node for node in nodes if node.op == "placeholder" or draw(st.booleans())}
    needed = draw(st.sets(st.sampled_from(nodes), min_size=1))
    return graph, size, dear, needed


@given(graphs())
def test_no_choice_keeps_fewer_bytes(case: tuple[fx.Graph, dict[fx.Node, int], set[fx.Node], set[fx.Node]]) -> None:
    """Against all choices, tried one by one."""
    graph, size, dear, needed = case
    nodes = list(graph.nodes)

    def enough(kept: set[fx.Node]) -> bool:
        have: set[Any] = set()
        for node in nodes:
            if node in kept or (node not in dear and all(source in have for source in node.all_input_nodes)):
                have.add(node)
        return needed <= have

    choices = (set(some) for count in range(len(nodes) + 1) for some in combinations(nodes, count))
    best = min(sum(size[node] for node in some) for some in choices if enough(some))
    found = cheapest(nodes, needed, size.__getitem__, lambda node: node not in dear)
    assert enough(found)
    assert sum(size[node] for node in found) == best


@given(graphs())
def test_what_costs_the_same_is_kept_rather_than_computed_again(
    case: tuple[fx.Graph, dict[fx.Node, int], set[fx.Node], set[fx.Node]],
) -> None:
    graph, _, dear, needed = case
    wanted = min(needed, key=str)
    found = cheapest(list(graph.nodes), {wanted}, lambda _node: 1, lambda node: node not in dear)
    assert found == {wanted}
