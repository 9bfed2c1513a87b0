"""Weight methods beyond LoRA against the papers' formulas, written out again: dense, slow and in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftc
from peftc.graph.ir import get_attribute
from peftc.protocol.method import Method, methods
from peftc.protocol.operands import wanted
from peftc.protocol.site import Linear
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

EXACT = 1e-12  # two orders of one sum


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def example(
    method: Method, n_in: int, n_out: int, *, has_bias: bool = True
) -> tuple[Linear, dict[str, Tensor | None], Tensor]:
    """A site, random state and frozen tensors, and five tokens, in double precision."""
    random = torch.Generator().manual_seed(5)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    site = Linear("layer", "layer", frozenset(), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None)
    specs = method.state(site)
    weight = number(n_out, n_in)
    state = {key: torch.zeros(spec.shape, dtype=spec.dtype or torch.float64) for key, spec in specs.items()}
    method.initialise(site, weight, state)
    state |= {key: number(*spec.shape).requires_grad_() for key, spec in specs.items() if spec.trainable}
    known: dict[str, Tensor | None] = {**state, "weight": weight, "bias": number(n_out) if has_bias else None}
    return site, known, number(5, n_in).requires_grad_()


def apply(method: Method, site: Linear, x: Tensor, known: dict[str, Tensor | None], y: Tensor | None = None) -> Tensor:
    """The method's rewrite; without `y`, of what it adds to zero."""
    start = torch.zeros(len(x), site.n_out, dtype=x.dtype) if y is None else y
    rewrite: Callable[..., Tensor] = method.rewrite
    return rewrite(site, x, start, *(known.get(name) for name in wanted(type(method).rewrite, 4)))


def krona_by_entries(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """Section 3: (A (x) B)[i b1 + k, j b2 + l] = A[i, j] B[k, l]."""
    a, b = known["A"], known["B"]
    rows = []
    for i in range(a.shape[0]):
        for k in range(b.shape[0]):
            row = [a[i, j] * b[k, column] for j in range(a.shape[1]) for column in range(b.shape[1])]
            rows.append(torch.stack(row))
    product = torch.stack(rows)
    return F.linear(x, known["weight"] + method.scale * product, known["bias"])


def qalora_by_algorithm_1(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """result = x W^T + (QA(x) * (D_in // L)) A^T B^T s, where QA is AvgPool1d over D_in // L inputs."""
    pooled = F.avg_pool1d(x[:, None], method.group)[:, 0] * method.group
    branch: Tensor = (pooled @ known["A"].T) @ known["B"].T * method.scale
    return F.linear(x, known["weight"], known["bias"]) + branch


def far_in_two_layers(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """A learning layer and a frozen one, their outputs put side by side and back in order."""
    learning = known["index"].tolist()
    frozen = [row for row in range(len(known["weight"])) if row not in learning]
    bias = known["bias"]
    parts = [
        F.linear(x, known["selected"], None if bias is None else bias[learning] + known["shift"]),
        F.linear(x, known["weight"][frozen], None if bias is None else bias[frozen]),
    ]
    outputs = torch.cat(parts, 1)
    return outputs[:, torch.tensor(learning + frozen).argsort()]


TRANSCRIPTIONS: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("krona", {"a": 2, "a2": 3, "scale": 1.5}, krona_by_entries),
    ("krona", {"a": 4, "a2": 2, "scale": 2.0}, krona_by_entries),
    ("krona", {"a": 2}, krona_by_entries),
    ("krona", {}, krona_by_entries),
    ("qalora", {"r": 3, "group": 3}, qalora_by_algorithm_1),
    ("qalora", {"r": 3, "alpha": 1.0, "group": 6}, qalora_by_algorithm_1),
    ("far", {"keep": 0.5}, far_in_two_layers),
    ("far", {"keep": 1.0}, far_in_two_layers),
    ("far", {"keep": 0.01, "select": "random"}, far_in_two_layers),
]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("name", "values", "slow"), TRANSCRIPTIONS, ids=lambda given: given.__name__ if callable(given) else str(given)
)
def test_as_the_paper_says(name: str, values: dict[str, Any], slow: Callable[..., Tensor], has_bias: bool) -> None:
    """Outputs and gradients, in x too, of n_in = 12 and n_out = 8."""
    method = methods()[name](**values)
    site, known, x = example(method, n_in=12, n_out=8, has_bias=has_bias)
    learns = [x, *(tensor for tensor in known.values() if tensor is not None and tensor.requires_grad)]
    weight = known["weight"]
    assert weight is not None
    ours = apply(method, site, x, known, F.linear(x, weight, known["bias"]))
    theirs = slow(method, x, known)
    close(ours, theirs, EXACT)
    direction = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    for one, other in zip(
        torch.autograd.grad(ours, learns, direction), torch.autograd.grad(theirs, learns, direction), strict=True
    ):
        assert one.any()
        close(one, other, EXACT)


@pytest.mark.parametrize("variant", ["loha", "lokr", "lokr, scaled"])
def test_rank_dropout_leaves_out_rows_of_the_change(variant: str) -> None:
    """As in HF PEFT's get_delta_weight: rows are zero or, where scaled, divided by the share that stays."""
    name = variant.partition(",")[0]
    settings = {"rank_dropout_scale": True} if variant == "lokr, scaled" else {}
    thinned = methods()[name](r=2, rank_dropout=0.5, **settings)
    site, state, x = example(methods()[name](r=2), n_in=12, n_out=40, has_bias=False)
    full, y = apply(methods()[name](r=2), site, x, state), torch.zeros(5, 40, dtype=torch.float64)
    torch.manual_seed(0)
    branch = apply(thinned, site, x, state, y)
    stays = branch.abs().sum(0) > 0
    assert 10 < stays.sum() < 30
    factor = 40 / stays.sum() if variant != "lokr" else 1
    close(branch, full * stays * factor, EXACT)


def test_far_takes_the_largest_rows() -> None:
    base = ZOO["bert"]()
    compiled = peftc.compile(base, "apply far(keep=0.1) to mlp.up")
    for binding in compiled.plan.bindings:
        assert isinstance(binding.site, Linear)
        weight = base.get_parameter(binding.site.owner).detach()
        index = get_attribute(compiled, f"{binding.path}.index")
        norms = [float(row.square().sum()) for row in weight]
        largest = sorted(range(len(norms)), key=norms.__getitem__)[-round(0.1 * len(norms)) :]
        assert index.dtype == torch.int64
        assert index.tolist() == sorted(largest)
        assert torch.equal(get_attribute(compiled, f"{binding.path}.selected"), weight[index])


def test_far_takes_the_rows_of_the_largest_gradients() -> None:
    """The squared gradient of each example's loss, one example at a time."""
    base: Any = ZOO["llama"]()
    batch = inputs(base, batch=3)
    compiled = peftc.compile(base, "apply far(keep=0.1, select=gradient) to mlp.up", calibration=[batch])
    for binding in compiled.plan.bindings:
        assert isinstance(binding.site, Linear)
        weight = base.get_parameter(binding.site.owner)
        score = torch.zeros(len(weight))
        for example in range(3):
            loss = base(**{name: tensor[example : example + 1] for name, tensor in batch.items()}).loss
            score += torch.autograd.grad(loss, weight)[0].square().sum(1)
        largest = score.argsort()[-round(0.1 * len(score)) :]
        assert get_attribute(compiled, f"{binding.path}.index").tolist() == sorted(largest.tolist())


def test_a_folded_bias_is_rounded_once() -> None:
    """c is between two numbers of bfloat16, and so is 1 + c: just above the middle, where rounding c goes to it."""
    site = Linear("layer", "layer", frozenset(), n_in=1, n_out=1, bias="layer.bias")
    one = torch.ones(1, dtype=torch.bfloat16)
    c = torch.tensor([[2**-8 + 2**-17]])
    _, bias = methods()["beft"]().fold(site, one[None], one, {"c": c})
    assert bias is not None
    assert torch.equal(bias, torch.tensor([1 + 2**-7], dtype=torch.bfloat16))
