"""LoRA on stacked expert weights: against HF PEFT, against dense weights token by token, and what it never makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftc
from peftc.graph.ir import PROVENANCE
from peftc.protocol.method import Here, methods
from peftc.protocol.site import Experts
from peftc.rewrite.weights import product_like
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

NEAR = 1e-5  # fp32, two implementations of one sum
SPEC = "apply lora(r=2, alpha=6) to expert"
MODELS = ["mixtral", "qwen2_moe"]


def randomised(compiled: peftc.CompiledModule) -> peftc.CompiledModule:
    """With state that is no start: a zero B would hide what is wrong with A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return compiled.eval()


@cache
def base(name: str) -> Any:
    return ZOO[name]().eval()


@cache
def _compiled(name: str, spec: str) -> peftc.CompiledModule:
    return peftc.compile(base(name), spec)


def compiled(name: str, spec: str) -> peftc.CompiledModule:
    """Compiled once for all tests of a process; with the same random state and no gradients each time."""
    module = randomised(_compiled(name, spec))
    for parameter in module.parameters():
        parameter.grad = None
    return module


# ---- HF PEFT, which adds a dense delta to the weights ---------------------------------------------------------------


def theirs_of(
    name: str, compiled: peftc.CompiledModule, settings: dict[str, Any]
) -> tuple[Any, dict[str, nn.Parameter]]:
    """HF PEFT's model with the state of `compiled`, and its parameters by the names of ours."""
    parameters = sorted({binding.site.name.split(".", 3)[3] for binding in compiled.plan.bindings})
    config = peft.LoraConfig(**settings, target_modules=[], target_parameters=parameters)
    model: Any = peft.get_peft_model(ZOO[name](), config).eval()
    found: dict[str, nn.Parameter] = {}
    for binding in compiled.plan.bindings:
        module, _, parameter = binding.site.name.rpartition(".")
        wrapper = model.base_model.model.get_submodule(module)
        while wrapper.parameter_name != parameter:  # those of one module are nested
            wrapper = wrapper.base_layer
        a, b = (compiled.get_parameter(f"{binding.path}.{name}").data for name in "AB")
        found[f"{binding.path}.A"] = wrapper.lora_A["default"].weight
        found[f"{binding.path}.B"] = wrapper.lora_B["default"].weight
        found[f"{binding.path}.A"].data.copy_(a.flatten(0, 1))
        found[f"{binding.path}.B"].data.copy_(b.permute(1, 2, 0).flatten(1))
    return model, found


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (SPEC, {"r": 2, "lora_alpha": 6}),
        ("apply lora(r=3, alpha=5, rslora=true) to expert", {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    ],
    ids=["lora", "rslora"],
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_hf_pefts(name: str, spec: str, settings: dict[str, Any]) -> None:
    ours = compiled(name, spec)
    theirs, parameters = theirs_of(name, ours, settings)
    batch = inputs(base(name), batch=3, length=9)
    found, expected = ours(**batch), theirs(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=NEAR)
    found.loss.backward()
    expected.loss.backward()
    assert parameters.keys() == ours.trainable_parameters().keys()
    for path, parameter in ours.trainable_parameters().items():
        their = parameters[path].grad
        assert parameter.grad is not None
        assert their is not None
        assert parameter.grad.any()
        experts = parameter.shape[0]
        if path.endswith(".A"):
            their = their.unflatten(0, (experts, -1))
        else:
            their = their.unflatten(1, (-1, experts)).permute(2, 0, 1)
        torch.testing.assert_close(parameter.grad, their, rtol=0, atol=NEAR)


# ---- The definition, one token at a time ----------------------------------------------------------------------------


def by_hand(base: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, delta: Callable[[str], Tensor]) -> Tensor:
    """down_e(silu(gate_e x) * up_e x), weighted and summed over the chosen experts, all matrices dense."""
    fused, down = base.gate_up_proj + delta("gate_up_proj"), base.down_proj + delta("down_proj")
    half = fused.shape[1] // 2
    rows = []
    for token, experts, shares in zip(hidden, chosen, weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(experts.tolist(), shares, strict=True):
            gate, up = fused[expert, :half] @ token, fused[expert, half:] @ token
            row = row + share * (down[expert] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("selector", ["expert", "mlp.*", "mlp.up, mlp.down", "mlp.gate"])
def test_it_is_the_formula_on_each_token(selector: str) -> None:
    """The experts of layer 0 of the compiled model, on what its router sends them, against dense matrices of each."""
    module = compiled("mixtral", f"apply lora(r=3, alpha=6) to {selector}")
    # of the graph before it is folded into blocks, so that what enters and leaves the experts can be read
    graph = module.history["tidy"]
    first = next(node for node in graph.nodes if "grouped_mm" in str(node.target))
    block = base("mixtral").model.layers[0].mlp
    hidden_node = first.args[0].args[0]
    seen = values_of(module, graph, [hidden_node, *leaving(graph)])
    hidden, found = seen
    with torch.no_grad():
        _, weights, chosen = block.gate(hidden)

        def delta(weight: str) -> Tensor:
            total = torch.zeros_like(getattr(block.experts, weight))
            for binding in module.plan.bindings:
                if binding.site.name.startswith(f"model.layers.0.mlp.experts.{weight}"):
                    a, b = (module.get_parameter(f"{binding.path}.{name}") for name in "AB")
                    rows = list(binding.site.rows or range(total.shape[1]))  # type: ignore[attr-defined]
                    for expert in range(len(total)):
                        total[expert, rows] += 2.0 * b[expert] @ a[expert]
            return total

        expected = by_hand(block.experts, hidden, chosen, weights, delta)
    torch.testing.assert_close(found, expected, rtol=0, atol=NEAR)


def leaving(graph: fx.Graph) -> Iterator[fx.Node]:
    """The sum over the chosen experts of the first layer."""
    second = [node for node in graph.nodes if "grouped_mm" in str(node.target)]
    node = second[0]
    while "sum.dim_IntList" not in str(node.target):
        node = node.next
    yield node


def values_of(module: peftc.CompiledModule, graph: fx.Graph, nodes: list[fx.Node]) -> list[Tensor]:
    """What some nodes of the flat graph compute on the batch of the zoo."""
    flat = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    flat.graph_copy(graph, known)
    flat.output([known[node] for node in nodes])
    flat.eliminate_dead_code()
    batch = inputs(base("mixtral"))
    given = [batch[name] for name in module.convention.inputs]
    found: list[Tensor] = fx.GraphModule(module, flat)(*given)
    return found


sizes = st.integers(1, 9)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), n_in=sizes, n_out=sizes, r=st.integers(1, 5), seed=sizes
)
@settings(max_examples=60)
def test_a_branch_of_any_shape_is_each_experts_own(counts: list[int], n_in: int, n_out: int, r: int, seed: int) -> None:
    """Experts with no token, and shapes of which no two sizes need be equal; in double precision."""
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    graph = fx.Graph()
    op = graph.call_function(torch.ops.transformers.grouped_mm_fallback.default)
    site = Experts("experts", "experts", frozenset(), n_in=n_in, n_out=n_out, experts=len(counts))
    here = Here(product=product_like(op, offsets))
    method = methods()["lora"](r=r, alpha=3)
    state = {name: number(*spec.shape) for name, spec in method.state(site).items()}
    x, y = number(sum(counts), n_in), number(sum(counts), n_out)
    expected = y.clone()
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        expected[start:end] += x[start:end] @ (3 / r * state["B"][expert] @ state["A"][expert]).T
        start = end
    torch.testing.assert_close(method.rewrite(site, x, y, here=here, **state), expected, rtol=1e-12, atol=1e-12)
    delta = method.delta(site, **state)
    assert delta.shape == (len(counts), n_out, n_in)


# ---- What is never made ---------------------------------------------------------------------------------------------


def dense(module: peftc.CompiledModule) -> int:
    """The numbers in the smallest stack of whole weights that a branch stands beside."""
    return min(prod((*b.site.batch, b.site.n_in, b.site.n_out)) for b in module.plan.bindings)  # type: ignore[attr-defined]


class Sizes(TorchDispatchMode):
    """Counts the tensors of at least `least` numbers that operations make, views aside."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.count += sum(t.numel() >= self.least and t.untyped_storage().data_ptr() not in given for t in made)
        return result


@pytest.mark.parametrize("selector", ["expert", "mlp.*"])
def test_no_dense_delta_in_the_graph(selector: str) -> None:
    """At two tokens, where every tensor of tokens is smaller than the weights."""
    module = compiled("mixtral", f"apply lora(r=2) to {selector}")
    for node in module.history["tidy"].nodes:
        if PROVENANCE in node.meta and isinstance(made := node.meta["val"], Tensor):
            fixed = prod(size for size in made.shape if isinstance(size, int))
            per_token = prod(2 for size in made.shape if not isinstance(size, int)) * 2
            assert fixed * per_token < dense(module), node.format_node()


def test_no_dense_delta_in_a_step() -> None:
    """Forward and backward make no more tensors of the weights' size than the frozen base does by itself.

    The base does make them: its grouped product computes the gradient of a frozen weight, too, and throws it away.
    """
    counts = []
    for spec in (SPEC, "train embed"):
        module = _compiled("mixtral", spec)
        batch = inputs(base("mixtral"), batch=1, length=2)
        with Sizes(4 * 80 * 32) as mode:
            module(**batch).loss.backward()
        counts.append(mode.count)
    assert counts[0] <= counts[1]


# ---- Any number of tokens, precision and place ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, pytest.param("gpt_oss", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 3), (4, 11)])
def test_merged_is_unmerged_at_other_sizes(name: str, batch: int, length: int) -> None:
    """One token leaves all experts but two without any."""
    module = compiled(name, SPEC)
    given = inputs(base(name), batch=batch, length=length)
    with torch.no_grad():
        merged: Any = module.merge()
        torch.testing.assert_close(merged.eval()(**given).logits, module(**given).logits, rtol=0, atol=NEAR)


def test_experts_that_all_see_every_token() -> None:
    """A batched product in place of a grouped one, over weights stored transposed."""
    test_merged_is_unmerged_at_other_sizes("llama4", 2, 5)


def test_in_bfloat16_by_torchs_own_grouped_product(tmp_path: Path) -> None:
    """Its strides must be multiples of 16 bytes, and two numbers of two bytes are not: the rank is padded."""
    model = ZOO["mixtral"]().bfloat16().eval()
    module = randomised(peftc.compile(model, SPEC))
    products = [node for node in module.history["tidy"].nodes if "_grouped_mm" in str(node.target)]
    assert len(products) == 2 * 2 * 3
    assert all("aten" in str(node.target) for node in products)
    assert {parameter.dtype for parameter in module.trainable_parameters().values()} == {torch.float32}
    batch = inputs(model)
    with torch.no_grad():
        # bfloat16 has eight bits: two orders of rounding differ by some hundredths of outputs of size one
        torch.testing.assert_close(module.merge()(**batch).logits, module(**batch).logits, rtol=0.05, atol=0.05)
    module(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.trainable_parameters().values())
    module.save(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(peftc.load(tmp_path / "adapter", model).eval()(**batch).logits, module(**batch).logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_each_expert_starts_from_its_own_weight(init: str) -> None:
    module = peftc.compile(base("mixtral"), f"apply lora(r=2, alpha=4, init={init}) to expert").eval()
    frozen: Tensor = base("mixtral").model.layers[0].mlp.experts.down_proj.data
    path = next(b.path for b in module.plan.bindings if b.site.name == "model.layers.0.mlp.experts.down_proj")
    a, b = (module.get_parameter(f"{path}.{name}") for name in "AB")
    for expert, weight in enumerate(frozen):
        part = 2.0 * b[expert] @ a[expert]
        if init == "pissa":
            left, singular, right = torch.linalg.svd(weight)
            expected = left[:, :2] * singular[:2] @ right[:2]
        else:
            q, r = torch.linalg.qr(weight)
            expected = 2.0 * q[:, :2] @ r[:2]
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
    batch = inputs(base("mixtral"))
    with torch.no_grad():
        torch.testing.assert_close(module(**batch).logits, base("mixtral")(**batch).logits, rtol=0, atol=NEAR)


def test_each_experts_start_is_that_of_a_linear_layer() -> None:
    """Uniform within 1/sqrt(n_in), however many experts there are; all of B zero."""
    module = peftc.compile(base("mixtral"), "apply lora(r=8) to mlp.down")
    for name, parameter in module.trainable_parameters().items():
        if name.endswith("A"):
            assert 0.95 / 80**0.5 < parameter.abs().max() <= 1 / 80**0.5
        else:
            assert not parameter.any()


def test_the_plan_counts_every_experts_matrices() -> None:
    """Of 4 experts: A and B of [160, 32] and of [32, 80], in 2 layers; parts of the fused weight have an A each."""
    count = {selector: peftc.plan(base("mixtral"), f"apply lora(r=2) to {selector}").trainable
             for selector in ("expert", "mlp.*", "mlp.gate")}  # fmt: skip
    assert count["expert"] == 2 * 4 * 2 * ((160 + 32) + (32 + 80))
    assert count["mlp.*"] == 2 * 4 * 2 * (2 * (80 + 32) + (32 + 80))
    assert count["mlp.gate"] == 2 * 4 * 2 * (80 + 32)


def test_linear_means_experts_too_and_the_router_is_an_ordinary_layer() -> None:
    plan = peftc.plan(base("qwen2_moe"), "apply lora(r=2) to linear in layers[0]")
    assert {b.site.name.removeprefix("model.layers.0.") for b in plan.bindings} == {
        *(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.gate", "mlp.shared_expert_gate",
        *(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")),
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip
    module = compiled(
        "mixtral", 'apply dora(r=2) to "**.mlp.gate"\napply lora(r=2) to linear except (expert, "**.mlp.gate")'
    )
    kinds = {type(b.site).__name__ for b in module.plan.bindings}
    assert kinds == {"Linear"}
    batch = inputs(base("mixtral"))
    module(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.trainable_parameters().values())


@pytest.mark.parametrize("name", ["mixtral", pytest.param("llama4", marks=pytest.mark.slow)])
def test_an_adapter_beside_the_experts_reads_the_tokens_before_routing(name: str) -> None:
    """Sorted or repeated tokens would be others, and more. Against the same adapter run by hooks on the base."""
    model = base(name)
    module = compiled(name, "apply adapter(size=3, at=parallel, activation=tanh) to mlp")
    batch = inputs(model)

    def beside(state: Callable[[str], Tensor]) -> Callable[..., Any]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            inner = torch.tanh(nn.functional.linear(given[0], state("down"), state("down_bias")))
            added = nn.functional.linear(inner, state("up"), state("up_bias")).reshape(whole.shape)
            return (whole + added, *output[1:]) if isinstance(output, tuple) else output + added

        return hook

    hooks = []
    for binding in module.plan.bindings:
        path = binding.site.name.removesuffix(".experts").removesuffix(".shared_expert")
        hooks.append(model.get_submodule(path).register_forward_hook(beside(state_of(module, binding.path))))
    with torch.no_grad():
        expected = model(**batch).logits
        for handle in hooks:
            handle.remove()
        torch.testing.assert_close(module(**batch).logits, expected, rtol=0, atol=NEAR)
        assert (model(**batch).logits - expected).abs().max() > 100 * NEAR


def state_of(module: peftc.CompiledModule, path: str) -> Callable[[str], Tensor]:
    return lambda name: module.get_parameter(f"{path}.{name}")


def test_under_torch_compile_its_saved_tensors_are_unpacked_once() -> None:
    """A checkpoint, which a block is there, allows no second time."""
    module, batch = compiled("mixtral", SPEC), inputs(base("mixtral"))
    module(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in module.trainable_parameters().items()}
    module.zero_grad()
    torch.compile(module, backend="eager")(**batch).loss.backward()
    for name, parameter in module.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=NEAR)


def test_lora_plus_and_dropout() -> None:
    module = compiled("mixtral", "apply lora(r=2, dropout=0.5, lr_ratio=16) to expert")
    one, sixteen = sorted(group["lr"] for group in module.param_groups(lr=1e-3))
    assert sixteen == 16 * one
    batch = inputs(base("mixtral"))
    with torch.no_grad():
        assert torch.equal(module(**batch).loss, module(**batch).loss)
        module.train()
        assert not torch.equal(module(**batch).loss, module(**batch).loss)


@pytest.mark.parametrize("spec", [SPEC, "apply lora(r=2, init=pissa) to expert, attn.q", "apply lora(r=3) to mlp.down"])
def test_hf_peft_reads_what_peftc_writes(spec: str, tmp_path: Path) -> None:
    ours = compiled("mixtral", spec)
    ours.save_pretrained(tmp_path / "adapter")
    theirs: Any = peft.PeftModel.from_pretrained(ZOO["mixtral"](), str(tmp_path / "adapter")).eval()
    batch = inputs(base("mixtral"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, rtol=0, atol=NEAR)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_peftc_reads_what_hf_peft_writes(name: str, tmp_path: Path) -> None:
    """A linear layer beside two parameters of one module; and weights stored transposed."""
    parameters = ["experts.down_proj", "experts.gate_up_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    theirs: Any = peft.get_peft_model(ZOO[name](), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    theirs.save_pretrained(tmp_path)
    ours = peftc.load_peft(base(name), tmp_path).eval()
    assert len(ours.plan.bindings) == 2 * 3
    batch = inputs(base(name))
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("apply lora(r=2) to mlp.up", "a part of one"), ("apply lora(r=2, dropout=0.1) to expert", "no dropout")],
)
def test_what_hf_pefts_folder_cannot_hold_is_refused(spec: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(peftc.PeftcError, match=reason):
        compiled("mixtral", spec).save_pretrained(tmp_path / "adapter")


def test_experts_that_hf_peft_misreads_are_refused(tmp_path: Path) -> None:
    """Llama 4's do not say that they are stored transposed, so HF PEFT's A has the size of the outputs."""
    with pytest.raises(peftc.PeftcError, match="for its outputs"):
        compiled("llama4", SPEC).save_pretrained(tmp_path / "adapter")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    theirs: Any = peft.get_peft_model(ZOO["llama4"](), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(peftc.PeftcError, match="for its outputs"):
        peftc.load_peft(base("llama4"), tmp_path)
