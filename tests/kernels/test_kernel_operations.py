"""Every kernel is an operation that torch's checks, exporter and compiler accept."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from kernelcases import F32, F64, branches, gradients, learns, normal, subjects
from peftc.kernels.common.operation import call_directly, cpu_function

ops = torch.ops.peftc


SUBJECTS = list(subjects(F32))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_opcheck(name: str) -> None:
    op, arguments = subjects(F32)[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradcheck(name: str) -> None:
    op, arguments = subjects(F64)[name]
    flat, spec = pytree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run(*learned: Tensor) -> Any:
        values = list(flat)
        for i, tensor in zip(places, learned, strict=True):
            values[i] = tensor
        result = op(*pytree.tree_unflatten(values, spec))
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(run, tuple(flat[i] for i in places))


class Wrapper(nn.Module):
    """One operation on an input of dynamic size; everything else is a buffer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, (_, *rest) = subjects(F32)[name]
        self.name = name
        flat, spec = pytree.tree_flatten(rest)
        flat = [
            nn.Parameter(leaf.detach()) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in flat
        ]
        self.learned = nn.ParameterList(leaf for leaf in flat if isinstance(leaf, nn.Parameter))
        self.rest = pytree.tree_unflatten(flat, spec)

    def forward(self, x: Tensor) -> Any:
        if self.name == "gated_activation":
            return self.op(x, x * 2, *self.rest[1:])
        if self.name == "rotary":
            heads = x[:, None]
            return self.op([heads, 2 * heads], heads.detach().cos(), heads.detach().sin())
        if self.name == "row_lengths":
            return self.op(x, self.rest[0], 2 * x[:, :2], *self.rest[2:])
        if self.name == "cross_entropy":
            return self.op(x, self.rest[0], None, torch.zeros_like(x[:, 0], dtype=torch.int64), *self.rest[3:])
        return self.op(x, *self.rest)


def _sizes(name: str) -> tuple[Tensor, Tensor]:
    width = pytree.tree_leaves(subjects(F32)[name][1])[0].shape[-1]
    flat = name in ("cross_entropy", "expert_linear", "expert_lora", "row_lengths")
    shapes = [(6, width), (7, width)] if flat else [(2, 3, width), (4, 5, width)]
    return learns(*shapes[0]), learns(*shapes[1])


@pytest.mark.parametrize("name", SUBJECTS)
def test_export_with_dynamic_sizes(name: str) -> None:
    small, large = _sizes(name)
    module = Wrapper(name)
    dynamic = dict.fromkeys(range(small.dim() - 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (small.detach(),), dynamic_shapes=(dynamic,), strict=False)
    torch.testing.assert_close(program.module(check_guards=False)(large.detach()), module(large.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_compile_as_one_graph(name: str) -> None:
    module = Wrapper(name)
    torch._dynamo.reset()  # one function for all names: it must not run out of recompilations
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in _sizes(name):
        outputs = [f(x) for f in (compiled, module)]
        lists = [[o] if isinstance(o, Tensor) else [t for t in o if t.requires_grad] for o in outputs]
        torch.testing.assert_close(lists[0], lists[1])
        torch.testing.assert_close(gradients(lists[0], [x]), gradients(lists[1], [x]))


def test_flops() -> None:
    """A LoRA linear costs its base's products and 6 m r (n_in + n_out)."""
    x = learns(10, 12)
    rest = branches(12, [(7, 2)], False, False, F32, F32)
    with FlopCounterMode(display=False) as counter:
        ops.lora_linear(x, *rest, None, 0.0, 0)[0].sum().backward()
    assert counter.get_total_flops() == 4 * 10 * 12 * 7 + 6 * 10 * 2 * (12 + 7)


def test_no_rows() -> None:
    x = learns(0, 12)
    rest = branches(12, [(7, 2)], False, False, F32, F32)
    assert ops.lora_linear(x, *rest, torch.tensor(1), 0.5, 0)[0].shape == (0, 7)
    assert ops.rms_norm(x, None, 1e-6, True)[0].shape == (0, 12)
    assert ops.seeded_dropout(x, torch.tensor(1), 0.5, 0).shape == (0, 12)


def test_the_function_behind_an_operation() -> None:
    x = normal(3, 8)
    function = cpu_function(ops.rms_norm.default)
    assert function is not None
    assert torch.equal(function(x, None, 1e-6, True)[0], ops.rms_norm(x, None, 1e-6, True)[0])
    assert cpu_function(torch.ops.aten.mm.default) is None


def test_a_graph_that_calls_functions_directly() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    norm = graph.call_function(ops.rms_norm.default, (x, None, 1e-6, True))
    graph.output(graph.call_function(torch.ops.aten.neg.default, (graph.call_function(operator.getitem, (norm, 0)),)))
    module, given = fx.GraphModule(nn.Module(), graph), normal(3, 8)
    before = module(given)
    call_directly(module.graph)
    module.recompile()
    assert torch.equal(module(given), before)
    assert not any(node.target is ops.rms_norm.default for node in module.graph.nodes)
