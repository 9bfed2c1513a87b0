"""Every method of the registry, in every variant its parameters allow, against section E of the methods' table.

No method is named in the tests of claims 1 to 7: a file added under `passes/methods` is tested here without a line.
Each variant runs quickly on a plain module in double precision, where rounding hides nothing; the methods as they
are by default also run on five architectures, and the full product of both is marked slow.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftc
from peftc import pipeline
from peftc.capture import Captured, capture
from peftc.ir import get_attribute
from peftc.method import Method, Param, methods, wanted
from peftc.sites import Linear, Module, Site
from zoo import ZOO, inputs

torch.set_num_threads(1)

# Where a method is tried, by the kind of site it wants. On GPT-2, attn.q is a slice of a fused, transposed weight;
# on all of them mlp.down has more inputs than outputs.
PLACES: dict[type[Site], str] = {Linear: "attn.q, mlp.down", Module: "attn, mlp"}
ARCHITECTURES = ("llama", "gpt2", "bert", "t5", "vit")

# Largest difference of two outputs of size about 1 that were computed in another order: a few hundred roundings of
# 6e-8 (float32) and 1e-16 (float64, where the softmax and the GELU's erf are also good to 1e-15).
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


# ---- The models ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A transformer block in which no layer is square, and some have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 16, bias=bias) for bias in (False, True, False))
        self.out = nn.Linear(16, 24)
        self.wide, self.narrow = nn.Linear(24, 40, bias=False), nn.Linear(40, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        q, k, v = (
            layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        return hidden + torch.as_tensor(self.narrow(F.gelu(self.wide(self.second_norm(hidden)))))


class Plain(nn.Module):
    """A model that no library knows: peftc sees nothing but `forward` and `example=`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.as_tensor(self.head(x))


@dataclass
class Subject:
    """One base model, a batch for it, and what it held before anything was compiled."""

    name: str
    base: nn.Module
    batch: dict[str, Tensor]
    example: Any
    before: dict[str, Tensor]

    def outputs(self, module: nn.Module) -> Tensor:
        found = module(**self.batch)
        return found if isinstance(found, Tensor) else torch.as_tensor(found.logits)

    def loss(self, module: nn.Module) -> Tensor:
        """The model's own, or for a plain one the distance to an arbitrary target."""
        if self.name == "plain":
            outputs = self.outputs(module)
            return (outputs - torch.linspace(-1, 1, outputs.shape[-1], dtype=outputs.dtype)).square().mean()
        return torch.as_tensor(module(**self.batch).loss)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[next(self.base.parameters()).dtype]

    def is_untouched(self) -> bool:
        now = self.base.state_dict()
        gradients = [parameter.grad for parameter in self.base.parameters() if parameter.grad is not None]
        same = all(torch.equal(now[name], tensor) for name, tensor in self.before.items())
        return not gradients and same and now.keys() == self.before.keys()


@cache
def subject(name: str) -> Subject:
    if name == "plain":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base: nn.Module = Plain().double()
            batch = {"x": torch.randn(3, 6, 24, dtype=torch.float64)}
    else:
        zoo_model = ZOO[name]()
        base, batch = zoo_model, inputs(zoo_model)
    base.eval()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    return Subject(name, base, batch, batch if name == "plain" else None, before)


captures: dict[tuple[int, str], Captured] = {}


def captured_once(model: nn.Module, example: Any, *more: Any) -> Captured:
    """`capture`, which takes seconds, once for each model; each caller gets a graph of its own, as it uses it up."""
    key = id(model), str({name: (tensor.shape, tensor.dtype) for name, tensor in example.kwargs.items()})
    if key not in captures:
        captures[key] = capture(model, example, *more)
    known = captures[key]
    graph = fx.Graph()
    graph.output(graph.graph_copy(known.module.graph, {}))
    return replace(known, module=fx.GraphModule(known.module, graph, class_name=type(model).__name__))


@pytest.fixture(autouse=True)
def _capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "capture", captured_once)


# ---- The variants of each method, from its declared parameters ---------------------------------------------------


def other_values(parameter: Param) -> list[Any]:
    """Each other choice; the other truth; one other number that the parameter allows."""
    if parameter.choices:
        return [choice for choice in parameter.choices if choice != parameter.default]
    if parameter.type is bool:
        return [not parameter.default]
    if parameter.type is str:
        return []
    start = parameter.default or 0
    numbers = [3, 5] if parameter.type is int else [start + 2.5, start + 0.25]
    return [value for value in numbers if value != parameter.default and parameter.problem(value) is None][:1]


def spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def variants(cls: type[Method]) -> Iterator[str]:
    """The method as it is by default, and once for each value that differs from that."""
    yield cls.name
    for parameter in cls.parameters.values():
        for value in other_values(parameter):
            if cls(**{parameter.name: value}).conflict() is None:
                yield f"{cls.name}({parameter.name}={spelt(value)})"


def statement(variant: str) -> str:
    place = PLACES[methods()[variant.partition("(")[0]].site]
    return f"apply {variant} to {place}"


VARIANTS = [variant for cls in methods().values() for variant in variants(cls)]
QUICK = [("plain", variant) for variant in VARIANTS] + [(name, method) for name in ARCHITECTURES for method in methods()]
FULL = [(name, variant) for name in ARCHITECTURES for variant in VARIANTS if variant not in methods()]


def on(name: str, value: str, *marks: pytest.MarkDecorator) -> Any:
    """Parameters of a test; one worker of pytest-xdist gets all of a model, which it captures once."""
    return pytest.param(name, value, id=f"{name}-{value}", marks=[pytest.mark.xdist_group(f"conformance-{name}"), *marks])


CASES = [on(*case) for case in QUICK] + [on(*case, pytest.mark.slow) for case in FULL]
every_variant = pytest.mark.parametrize(("name", "variant"), CASES)


@dataclass
class Compiled:
    """A model compiled once for all tests of a case; `reset` puts it back to its start."""

    subject: Subject
    module: peftc.CompiledModule
    start: dict[str, Tensor]

    def reset(self) -> None:
        self.module.load_state_dict(self.start)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.grad = None

    def randomise(self) -> None:
        """Random values in all that learns: a zero B would hide what A does."""
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.module.trainable_parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


@cache
def _compiled(name: str, spec: str) -> Compiled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = peftc.compile(subject(name).base, spec, example=subject(name).example)
    return Compiled(subject(name), module, {key: tensor.clone() for key, tensor in module.state_dict().items()})


def compiled(name: str, spec: str) -> Compiled:
    case = _compiled(name, spec)
    case.reset()
    return case


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- The claims --------------------------------------------------------------------------------------------------


def starts_as_the_base(case: Compiled) -> None:
    with torch.no_grad():
        close(case.subject.outputs(case.module), case.subject.outputs(case.subject.base), case.subject.tolerance)


def learns_what_it_declares_and_nothing_else(case: Compiled) -> None:
    plan, module = case.module.plan, case.module
    declared = {*plan.trained} | {
        f"{binding.path}.{tensor}"
        for binding in plan.bindings
        for tensor, state in binding.method.state(binding.site).items()
        if state.trainable
    }
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    start = {key: tensor.detach().clone() for key, tensor in everything.items()}
    with torch.no_grad():
        loss = case.subject.loss(module)

    module.train()
    optimizer = torch.optim.Adam(module.param_groups(lr=1e-2))
    reached: set[str] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # of the dropout
        for _ in range(10):
            optimizer.zero_grad()
            case.subject.loss(module).backward()
            reached |= {key for key, tensor in everything.items() if tensor.grad is not None and tensor.grad.any()}
            optimizer.step()

    assert reached == declared
    assert {key for key, tensor in everything.items() if not torch.equal(tensor, start[key])} == declared
    module.eval()
    with torch.no_grad():
        assert case.subject.loss(module) < loss
    assert case.subject.is_untouched()


def comes_back_from_disk(case: Compiled, folder: Path) -> None:
    case.randomise()
    case.module.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "peftc.json"]
    assert safetensors.torch.load((folder / "adapter.safetensors").read_bytes()).keys() == case.start.keys()
    json.loads((folder / "peftc.json").read_text())
    loaded = peftc.load(folder, case.subject.base).eval()
    with torch.no_grad():
        assert torch.equal(case.subject.outputs(loaded), case.subject.outputs(case.module))
    assert loaded.trainable_parameters().keys() == case.module.trainable_parameters().keys()
    assert case.subject.is_untouched()


def unmergeable(case: Compiled) -> bool:
    """What the methods say of themselves: no plain weight does the same, or the layer lacks the bias to shift."""
    return any(
        binding.method.unmergeable
        or (binding.method.adds_bias(binding.site) and getattr(binding.site, "bias", None) is None)
        for binding in case.module.plan.bindings
    )


def merges_or_says_why_not(case: Compiled) -> None:
    case.randomise()
    if unmergeable(case):
        with pytest.raises(peftc.PeftcError) as raised:
            case.module.merge()
        assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"cannot-merge"}
        return
    merged = case.module.merge()
    assert type(merged) is type(case.subject.base)
    assert merged.state_dict().keys() == case.subject.before.keys()
    assert not any(isinstance(part, fx.GraphModule) for part in merged.modules())
    with torch.no_grad():
        close(case.subject.outputs(merged.eval()), case.subject.outputs(case.module), case.subject.tolerance)
    assert case.subject.is_untouched()


@every_variant
def test_1_it_starts_as_the_base_model(name: str, variant: str) -> None:
    if not methods()[variant.partition("(")[0]].identity:
        pytest.skip("the method does not claim it")
    starts_as_the_base(compiled(name, statement(variant)))


@every_variant
def test_2_the_compiled_model_is_the_definition(name: str, variant: str) -> None:
    """Against a copy of the base whose weights the test itself replaces by the method's dense ones."""
    case = compiled(name, statement(variant))
    if unmergeable(case):
        pytest.skip("no weight does the same")
    case.randomise()
    with torch.no_grad():
        expected = case.subject.outputs(with_dense_weights(case))
        close(case.subject.outputs(case.module), expected, case.subject.tolerance)


def with_dense_weights(case: Compiled) -> nn.Module:
    model = copy.deepcopy(case.subject.base)
    for binding in case.module.plan.bindings:
        site, method = binding.site, binding.method
        assert isinstance(site, Linear)
        state = {tensor: get_attribute(case.module, f"{binding.path}.{tensor}") for tensor in binding.state}
        stored = get_attribute(model, site.owner)
        weight = stored.t() if site.transposed else stored
        bias = get_attribute(model, site.bias) if site.bias else None
        rows = list(site.rows if site.rows is not None else range(site.n_out))
        frozen = method.prepare(site, weight[rows], state)
        weight[rows], shifted = method.fold(site, frozen, None if bias is None else bias[rows], state)
        if bias is not None:
            assert shifted is not None
            bias[rows] = shifted
    return model


@every_variant
def test_3_it_learns_what_it_declares_and_nothing_else(name: str, variant: str) -> None:
    learns_what_it_declares_and_nothing_else(compiled(name, statement(variant)))


@every_variant
def test_4_it_merges_or_says_why_not(name: str, variant: str) -> None:
    merges_or_says_why_not(compiled(name, statement(variant)))


@every_variant
def test_5_it_comes_back_from_disk(name: str, variant: str, tmp_path: Path) -> None:
    comes_back_from_disk(compiled(name, statement(variant)), tmp_path / "adapter")


@every_variant
def test_6_the_plan_counts_what_is_built(name: str, variant: str) -> None:
    case = compiled(name, statement(variant))
    plan, module = case.module.plan, case.module
    assert plan.trainable == sum(tensor.numel() for tensor in module.parameters() if tensor.requires_grad)
    assert plan.trainable == sum(row.parameters for row in plan.rows)
    added = {f"{b.path}.{tensor}": state.shape for b in plan.bindings for tensor, state in b.state.items()}
    assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == added
    frozen = sum(tensor.numel() for key, tensor in module.named_parameters() if key not in added)
    assert plan.total == frozen + sum(map(prod, added.values()))


# ---- Claim 2 on its own: any shape -------------------------------------------------------------------------------

def settings_of(cls: type[Method]) -> st.SearchStrategy[Method]:
    """The method with any values its parameters allow, small ones, and no dropout: that is not part of a definition."""

    def values(parameter: Param) -> st.SearchStrategy[Any]:
        if parameter.choices:
            return st.sampled_from(parameter.choices)
        if parameter.type is bool:
            return st.booleans()
        if parameter.name == "dropout" or parameter.type is str:
            return st.just(parameter.default)
        low, high = (4 if bound is None else min(bound, 4) for bound in (parameter.min, parameter.max))
        number: Any = st.integers(int(low), int(high)) if parameter.type is int else st.floats(low, high, width=16)
        return number | st.none() if parameter.optional else number

    return st.fixed_dictionaries({name: values(p) for name, p in cls.parameters.items()}).map(lambda given: cls(**given))


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if cls.site is Linear and not cls.unmergeable])
@given(
    data=st.data(),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    tokens=st.integers(1, 4),
    has_bias=st.booleans(),
    role=st.sampled_from(["attn.k", "mlp.down"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_2_rewrite_equals_fold_on_any_shape(
    name: str, data: st.DataObject, n_in: int, n_out: int, tokens: int, has_bias: bool, role: str, seed: int
) -> None:
    method = data.draw(settings_of(methods()[name]))
    site = Linear("layer", "layer", frozenset({role}), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None)
    assume(method.conflict() is None)
    assume(method.refuses(site) is None)
    random = torch.Generator().manual_seed(seed)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    state = {key: number(*spec.shape) for key, spec in method.state(site).items()}
    x, bias = number(tokens, n_in), number(n_out) if has_bias else None
    weight = method.prepare(site, number(n_out, n_in), state)
    known: dict[str, Tensor | None] = {**state, "weight": weight, "bias": bias}

    def asked(function: Callable[..., Tensor], given: int) -> list[Tensor | None]:
        return [known[parameter] for parameter in wanted(function, given)]

    if method.rewrites_input(site):
        rewritten = F.linear(method.rewrite_input(site, x, *asked(type(method).rewrite_input, 3)), weight, bias)
    else:
        rewritten = method.rewrite(site, x, F.linear(x, weight, bias), *asked(type(method).rewrite, 4))
    folded = F.linear(x, *method.fold(site, weight, bias, state))
    # float64 rounds at 1e-16; a row whose norm DoRA divides by may be 1e-4, and makes ten thousand times that
    torch.testing.assert_close(rewritten, folded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at", ["sequential", "parallel"])
@pytest.mark.parametrize("bias", [True, False])
@given(width=st.integers(1, 12), entering=st.integers(1, 12), size=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_2_an_adapter_is_its_formula(at: str, bias: bool, width: int, entering: int, size: int, seed: int) -> None:
    """h + s (U f(D x + b) + c), one number at a time; x is h where the adapter is sequential."""
    random = torch.Generator().manual_seed(seed)
    x, h = (torch.randn(n, generator=random, dtype=torch.float64) for n in (entering, width))
    source = h if at == "sequential" else x
    down, up, down_bias, up_bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape in ((size, len(source)), (width, size), (size,), (width,))
    )
    method = methods()["adapter"](size=size, at=at, bias=bias, scale=1.5, activation="tanh")
    given = (down, up, down_bias, up_bias) if bias else (down, up, None, None)
    inner = [
        torch.tanh(sum(down[j, i] * source[i] for i in range(len(source))) + (down_bias[j] if bias else 0))
        for j in range(size)
    ]
    expected = torch.stack([
        h[k] + 1.5 * (sum(up[k, j] * inner[j] for j in range(size)) + (up_bias[k] if bias else 0))
        for k in range(width)
    ])  # fmt: skip
    found = method.rewrite(Module("mlp", "mlp", frozenset({"mlp"}), width=width), x[None], h[None], *given)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
