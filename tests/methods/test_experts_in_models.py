"""LoRA on stacked expert weights makes no dense delta, and works at any number of tokens, precision and place."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftc
from expertlora import MODELS, NEAR, SPEC, base, compiled, compiled_once, randomised
from peftc.graph.ir import PROVENANCE
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


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
        module = compiled_once("mixtral", spec)
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
