"""LoRA on stacked expert weights: against HF PEFT, its folder included, and against dense weights token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import peftc
from expertlora import MODELS, NEAR, SPEC, base, compiled
from peftc.protocol.method import Here, methods
from peftc.protocol.site import Experts
from peftc.rewrite.weights import product_like
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


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


# ---- HF PEFT's folder ------------------------------------------------------------------------------------------------


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
