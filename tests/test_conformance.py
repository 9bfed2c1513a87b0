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
from dataclasses import dataclass
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
from peftc.combinator import Combinator
from peftc.ir import get_attribute
from peftc.method import Data, Method, Stage, kinds, methods
from peftc.params import Configured, Param, registered
from peftc.resolve import resolve
from peftc.site import Block, Experts, Linear, Module, Projection, Sequence, Site
from peftc.specs import as_spec
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_capture_a_model")

# Where a method is tried, by the kind of site it wants. On GPT-2, attn.q is a slice of a fused, transposed weight;
# on all of them mlp.down has more inputs than outputs.
PLACES: dict[type[Site], str] = {
    Linear: "attn.q, mlp.down", Module: "attn, mlp", Block: "block", Experts: "mlp.gate, mlp.down",
    Sequence: "the whole input",
}  # fmt: skip
ARCHITECTURES = ("llama", "gpt2", "bert", "t5", "vit")
# Of stacked experts, a slice of a fused weight and a whole one; the second stores them transposed, slices interleaved.
MIXTURES = ("mixtral", "gpt_oss")

# Sites as the smallest models have them, to ask a method whether it would stand there.
LIKELY = (
    *(
        Linear("attn.q", "", frozenset({"attn.q"}), n_out=n_out, n_in=n_in)
        for n_out, n_in in ((16, 24), (32, 32), (48, 32))
    ),
    *(
        Linear("mlp.down", "", frozenset({"mlp.down"}), n_out=n_out, n_in=n_in)
        for n_out, n_in in ((24, 40), (32, 48), (32, 80))
    ),
    *(Module(name, "", frozenset({name}), width=24, entry_width=24) for name in ("attn", "mlp")),
)
EXPERTS = Experts("experts", "", frozenset({"expert"}), n_out=48, n_in=32, experts=4)
# How a call is spelt small where its default is too large for models this small.
SMALL = {"phm": "(n=2)"}

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


# ---- The variants of each method, from its declared parameters ---------------------------------------------------


def other_values(parameter: Param) -> list[Any]:
    """Each other choice; the other truth; other numbers that the parameter allows; every call that it takes."""
    if parameter.nested:
        return [f"{name}{SMALL.get(name, '')}" for name in registered(parameter.nested)]
    if parameter.choices:
        return [choice for choice in parameter.choices if choice != parameter.default]
    if parameter.kind is bool:
        return [not parameter.default]
    if parameter.kind is str:
        return []
    start = parameter.default or 0
    numbers = [3, 5, 4] if parameter.kind is int else [start + 2.5, start + 0.25]
    return [value for value in numbers if value != parameter.default and parameter.problem(value) is None]


def spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def variants(cls: type[Method]) -> Iterator[str]:
    """The method as it is by default, and once for each value that differs from that and goes with the sizes here."""
    required = [parameter for parameter in cls.parameters.values() if parameter.required]
    starts = [f"{p.name}={value}" for p in required for value in other_values(p)] or [""]
    starts = [start for start in starts if fitting(cls.name, start)]
    for start in starts:
        yield str(fitting(cls.name, start))
    for parameter in cls.parameters.values():
        values = [] if parameter.required else [f"{parameter.name}={spelt(value)}" for value in other_values(parameter)]
        found = [call for value in values if (call := fitting(cls.name, ", ".join(filter(None, (starts[0], value)))))]
        yield from found if parameter.choices or parameter.nested else found[:1]


@cache
def fitting(name: str, given: str) -> str | None:
    """The call, if need be with one number smaller than its default, as the models here are; None if none fits."""
    numbers = [
        number for number, p in methods()[name].parameters.items() if p.kind is int and f"{number}=" not in given
    ]
    calls = [
        f"{name}({', '.join(filter(None, (given, more)))})".removesuffix("()")
        for more in ("", *(f"{number}={size}" for number in numbers for size in (8, 4)))
    ]
    calls = [call for call in calls if not complaints(call)]
    return next((call for call in calls if place(call) == PLACES[kinds(built(call))[0]]), None) or next(
        (call for call in calls if place(call)), None
    )


def complaints(call: str) -> list[peftc.Diagnostic]:
    """What a spec says of a call by itself: methods that do not go together, parameters that do not."""
    return peftc.check(f"apply {call} to attn")


@cache
def built(variant: str) -> Method:
    """The method that a variant spells."""
    (application,) = resolve(as_spec(f"apply {variant} to attn")).applications
    return application.method


def default(variant: str) -> bool:
    """Whether the variant is its method as it is by default: of a combinator, the first method that it takes."""
    return variant == next(variants(type(built(variant))))


@cache
def place(variant: str) -> str:
    """Where the variant can stand, of the places for its kind of site; empty if nowhere."""
    method = built(variant)
    likely = [site for site in LIKELY if isinstance(site, kinds(method)[0])]
    if not likely:
        return PLACES[kinds(method)[0]]
    refused = {site.name for site in likely if method.refuses(site)}
    return ", ".join(name for name in dict.fromkeys(site.name for site in likely) if name not in refused)


def statement(variant: str) -> str:
    return f"apply {variant}" + ("" if built(variant).stage is Stage.SEQUENCE else f" to {place(variant)}")


def statement_on(name: str, variant: str) -> str:
    """The statement for one model: on a mixture of experts it is about them."""
    return f"apply {variant} to {PLACES[Experts]}" if name in MIXTURES else statement(variant)


def chosen(variant: str) -> bool:
    """Whether the variant is the default or another choice, which may change how a method works, not only how much."""
    last = variant.rstrip(")").rpartition("=")[0].rpartition("(")[2].rpartition(" ")[2]
    parameter = built(variant).parameters.get(last)
    return default(variant) or (parameter is not None and (parameter.choices or parameter.nested) is not None)


# Gradients are of a loss, which a plain module does not return.
NEEDS_LOSS = {Data.WEIGHT_GRADIENTS, Data.STATE_GRADIENTS}


def home(variant: str) -> str:
    """The smallest model that the variant can be tried on."""
    return "llama" if built(variant).data in NEEDS_LOSS else "plain"


VARIANTS = [variant for cls in methods().values() for variant in variants(cls) if place(variant)]
DEFAULTS = [variant for variant in VARIANTS if default(variant)]
# Every method by default runs quickly; the variants of its parameters, and the other architectures, are slow.
QUICK = [(home(variant), variant) for variant in DEFAULTS]
ON_EXPERTS = [v for v in VARIANTS if Experts in kinds(built(v)) and not built(v).refuses(EXPERTS)]
QUICK += [("mixtral", variant) for variant in ON_EXPERTS if default(variant)]
FULL = [(home(variant), variant) for variant in VARIANTS]
FULL += [(name, variant) for name in ARCHITECTURES for variant in DEFAULTS]
FULL += [("gpt2", variant) for variant in VARIANTS if chosen(variant) and not isinstance(built(variant), Combinator)]
FULL += [(name, variant) for name in MIXTURES for variant in ON_EXPERTS]
# Refused, since the input of a slice is that of the weight's other rows, too: tests/spec/plan/ia3-input-on-slice.peft.
REFUSED = {("gpt2", "ia3(on=input)")}
FULL = [case for case in dict.fromkeys(FULL) if case not in QUICK and case not in REFUSED]


def on(name: str, value: str, *marks: pytest.MarkDecorator) -> Any:
    """Parameters of a test; one worker of pytest-xdist gets all of a model, which it captures once."""
    return pytest.param(
        name, value, id=f"{name}-{value}", marks=[pytest.mark.xdist_group(f"conformance-{name}"), *marks]
    )


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

    def randomise(self, seed: int = 2) -> None:
        """Random values in all that learns: a zero B would hide what A does."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.module.trainable_parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


@cache
def _compiled(name: str, spec: str) -> Compiled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wants = any(application.method.data for application in resolve(as_spec(spec)).applications)
        data = [subject(name).batch] if wants else None
        module = peftc.compile(subject(name).base, spec, example=subject(name).example, calibration=data)
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
    declared = {*plan.trained} | {name for name, state in plan.tensors.items() if state.trainable}
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    # Several random states: where one closes every ReLU of an adapter one unit wide, another opens it.
    reached: set[str] = set()
    for seed in range(2, 12):
        case.randomise(seed)
        case.subject.loss(module).backward()
        reached |= {key for key, tensor in everything.items() if tensor.grad is not None and tensor.grad.any()}
        if reached >= declared:
            break
    assert reached == declared
    case.reset()

    start = {key: tensor.detach().clone() for key, tensor in everything.items()}
    with torch.no_grad():
        loss = case.subject.loss(module)
    module.train()
    optimizer = torch.optim.Adam(module.param_groups(lr=1e-2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # of the dropout
        for _ in range(10):
            optimizer.zero_grad()
            case.subject.loss(module).backward()
            optimizer.step()
    changed = {key for key, tensor in everything.items() if not torch.equal(tensor, start[key])}
    assert changed
    assert changed <= declared
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
    if not built(variant).identity:
        pytest.skip("the method does not claim it")
    starts_as_the_base(compiled(name, statement_on(name, variant)))


@every_variant
def test_2_the_compiled_model_is_the_definition(name: str, variant: str) -> None:
    """Against a copy of the base whose weights the test itself replaces by the method's dense ones."""
    case = compiled(name, statement_on(name, variant))
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
        assert isinstance(site, Projection)
        state = {name: get_attribute(case.module, full) for name, full in binding.names.items()}
        stored = get_attribute(model, site.owner)
        weight = stored.transpose(-2, -1) if site.transposed else stored
        bias = get_attribute(model, site.bias) if site.bias else None
        rows = list(site.rows if site.rows is not None else range(site.n_out))
        frozen = method.prepare(site, weight[..., rows, :], state)
        weight[..., rows, :], shifted = method.fold(site, frozen, None if bias is None else bias[rows], state)
        if bias is not None:
            assert shifted is not None
            bias[rows] = shifted
    return model


@every_variant
def test_3_it_learns_what_it_declares_and_nothing_else(name: str, variant: str) -> None:
    learns_what_it_declares_and_nothing_else(compiled(name, statement_on(name, variant)))


@every_variant
def test_4_it_merges_or_says_why_not(name: str, variant: str) -> None:
    merges_or_says_why_not(compiled(name, statement_on(name, variant)))


@every_variant
def test_5_it_comes_back_from_disk(name: str, variant: str, tmp_path: Path) -> None:
    comes_back_from_disk(compiled(name, statement_on(name, variant)), tmp_path / "adapter")


@every_variant
def test_6_the_plan_counts_what_is_built(name: str, variant: str) -> None:
    case = compiled(name, statement_on(name, variant))
    plan, module = case.module.plan, case.module
    assert plan.trainable == sum(tensor.numel() for tensor in module.parameters() if tensor.requires_grad)
    assert plan.trainable == sum(row.parameters for row in plan.rows)
    added = {name: state.shape for name, state in plan.tensors.items()}
    assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == added
    frozen = sum(tensor.numel() for key, tensor in module.named_parameters() if key not in added)
    assert plan.total == frozen + sum(map(prod, added.values()))


# ---- Claim 2 on its own: any shape -------------------------------------------------------------------------------


def settings_of(cls: type[Configured]) -> st.SearchStrategy[Any]:
    """The method with any values its parameters allow, small ones, and no dropout: that is not part of a definition."""

    def values(parameter: Param) -> st.SearchStrategy[Any]:
        if parameter.choices:
            return st.sampled_from(parameter.choices)
        if parameter.kind is bool:
            return st.booleans()
        if parameter.nested:
            kind = parameter.nested
            inner = [one for one in registered(kind).values() if folds(one)]
            taken = [one for one in inner if not complaints(f"{cls.name}({one.name})")]
            return st.sampled_from(taken).flatmap(settings_of)
        if parameter.name.endswith("dropout") or parameter.kind is str:
            return st.just(parameter.default)
        low, high = (4 if bound is None else min(bound, 4) for bound in (parameter.min, parameter.max))
        numbers: st.SearchStrategy[Any] = st.integers(int(low), int(high))
        if parameter.kind is float:
            above = parameter.above
            numbers = st.floats(low if above is None else above, high, exclude_min=above is not None)
        return st.one_of(numbers, st.none()) if parameter.optional else numbers

    given = st.fixed_dictionaries({name: values(p) for name, p in cls.parameters.items()})
    return given.map(lambda values: cls(**values)).filter(lambda method: method.conflict() is None)


def folds(cls: type[Configured]) -> bool:
    """Whether a plain method stands on linear layers and folds into them."""
    return issubclass(cls, Method) and kinds(cls)[0] is Linear and cls.unmergeable is None


def sometimes_folds(cls: type[Method]) -> bool:
    return any(kinds(built(variant))[0] is Linear and built(variant).unmergeable is None for variant in variants(cls))


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if sometimes_folds(cls)])
@given(
    data=st.data(),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    tokens=st.integers(1, 4),
    has_bias=st.booleans(),
    role=st.sampled_from(["attn.k", "mlp.down"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_2_rewrite_equals_fold_on_any_shape(
    name: str, data: st.DataObject, n_in: int, n_out: int, tokens: int, has_bias: bool, role: str, seed: int
) -> None:
    method = data.draw(settings_of(methods()[name]))
    site = Linear("layer", "layer", frozenset({role}), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None)
    assume(isinstance(site, kinds(method)) and method.refuses(site) is None)
    random = torch.Generator().manual_seed(seed)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    specs = {**method.state(site), **method.shared([site])}
    start = {key: spec.init(torch.empty(spec.shape, dtype=spec.dtype or torch.float64)) for key, spec in specs.items()}
    method.initialise(site, number(n_out, n_in), start)
    # random numbers hide nothing; but an index, or a seed, stays what the method made it
    state = {key: number(*spec.shape) if spec.dtype is None else start[key] for key, spec in specs.items()}
    x, bias = number(tokens, n_in), number(n_out) if has_bias else None
    weight = method.prepare(site, number(n_out, n_in), state)
    known: dict[str, Tensor | None] = {**state, "weight": weight, "bias": bias, "training": torch.zeros(())}
    if method.rewrites_input(site):
        given = {name: known.get(name) for name in method.asks_input(state)}
        rewritten = F.linear(method.rewrite_input(site, x, **given), weight, bias)
    else:
        given = {name: known.get(name) for name in method.asks(state)}
        rewritten = method.rewrite(site, x, F.linear(x, weight, bias), **given)
    folded = F.linear(x, *method.fold(site, weight, bias, state))
    # float64 rounds at 1e-16; a row whose norm DoRA divides by may be 1e-4, and makes ten thousand times that
    torch.testing.assert_close(rewritten, folded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at", ["sequential", "parallel"])
@pytest.mark.parametrize("bias", [True, False])
@given(width=st.integers(1, 12), entering=st.integers(1, 12), size=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_2_an_adapter_is_its_formula(at: str, bias: bool, width: int, entering: int, size: int, seed: int) -> None:
    """h + s (U f(D x + b) + c), one output at a time; x is h where the adapter is sequential."""
    random = torch.Generator().manual_seed(seed)
    x, h = (torch.randn(n, generator=random, dtype=torch.float64) for n in (entering, width))
    source = h if at == "sequential" else x
    down, up, down_bias, up_bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape in ((size, len(source)), (width, size), (size,), (width,))
    )
    method = methods()["adapter"](size=size, at=at, bias=bias, scale=1.5, activation="tanh")
    state = {"down": down, "up": up} | ({"down_bias": down_bias, "up_bias": up_bias} if bias else {})
    inner = [torch.tanh((down[j] * source).sum() + (down_bias[j] if bias else 0)) for j in range(size)]
    outer = [sum(up[k, j] * inner[j] for j in range(size)) + (up_bias[k] if bias else 0) for k in range(width)]
    expected = torch.stack([h[k] + 1.5 * outer[k] for k in range(width)])
    found = method.rewrite(Module("mlp", "mlp", frozenset({"mlp"}), width=width), x[None], h[None], **state)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


# ---- Claim 5 on its own: what happens to an artifact that something happened to -----------------------------------

SPEC = "apply lora(r=2) to attn.q, mlp.down\ntrain norm"
TENSORS, MANIFEST = "adapter.safetensors", "peftc.json"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    case = compiled("plain", SPEC)
    case.randomise()
    folder = tmp_path / "adapter"
    case.module.save(folder)
    return folder


def refused(folder: Path, code: str, base: nn.Module | None = None) -> None:
    """Loading fails with a diagnostic, and the base model is as it was."""
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.load(folder, base or subject("plain").base)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]
    assert subject("plain").is_untouched()


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
@pytest.mark.xdist_group("conformance-plain")
class TestDamage:
    def test_a_missing_file(self, artifact: Path, file: str) -> None:
        (artifact / file).unlink()
        refused(artifact, "bad-artifact")

    @pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
    def test_a_truncated_file(self, artifact: Path, file: str, share: float) -> None:
        whole = (artifact / file).read_bytes()
        (artifact / file).write_bytes(whole[: int(share * len(whole))])
        refused(artifact, "bad-artifact")

    def test_a_flipped_bit(self, artifact: Path, file: str) -> None:
        """Two hundred bits, spread over the file."""
        whole = (artifact / file).read_bytes()
        for bit in range(0, 8 * len(whole), max(1, len(whole) // 25)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (artifact / file).write_bytes(damaged)
            refused(artifact, "bad-artifact")

    @pytest.mark.parametrize("content", [b"{}", b"null", b'"peftc"', b"\xff\xfe", b"\x80\x04K\x01."])
    def test_another_file(self, artifact: Path, file: str, content: bytes) -> None:
        (artifact / file).write_bytes(content)
        refused(artifact, "bad-artifact")


@pytest.mark.parametrize("content", [b"[]", b"7", b"[" * 20_000], ids=["a list", "a number", "deep"])
@pytest.mark.xdist_group("conformance-plain")
def test_a_manifest_of_another_kind(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST).write_bytes(content)
    refused(artifact, "bad-artifact")


def reseal(folder: Path, **changes: Any) -> None:
    """Edits the manifest and makes its checksum fit again; None removes a field."""
    body = json.loads((folder / MANIFEST).read_text()) | changes
    body = {key: value for key, value in body.items() if key != "checksum" and value is not None}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body | {"checksum": seal}))


def with_input(shape: list[Any], dtype: str = "float64", name: str = "x") -> dict[str, Any]:
    """A change of the manifest: another recorded input."""
    return {"example": {"args": [], "kwargs": {name: [shape, dtype]}}}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"tensors": "0" * 64},
        {"spec": "apply lora(r=2) to attn.k\ntrain norm"},
        {"spec": "apply dora(r=2) to attn.q, mlp.down\ntrain norm"},
        {"spec": "apply lora(r=4) to attn.q, mlp.down\ntrain norm"},
        *({field: None} for field in ("format", "spec", "model", "base", "tensors", "example")),
        *({field: 7} for field in ("spec", "model", "reference", "base", "tensors", "example")),
        *({"example": example} for example in ({}, {"args": 7, "kwargs": {}}, {"args": [], "kwargs": [1]})),
        with_input([3, 6, 24], "no_such_type"),
        with_input([-1, 6, 24]),
        with_input(["3", 6, 24]),
        with_input([10**9, 10**9, 24]),
    ],
    ids=str,
)
@pytest.mark.xdist_group("conformance-plain")
def test_an_edited_manifest_is_refused(artifact: Path, changes: dict[str, Any]) -> None:
    reseal(artifact, **changes)
    refused(artifact, "bad-artifact")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"spec": "apply loraa to attn.q"}, "unknown-method"),
        ({"spec": "apply lora(r=2) to"}, "missing-selector"),
        (with_input([3, 6, 24], "int64"), "cannot-capture"),
        (with_input([3, 6, 7]), "cannot-capture"),
        (with_input([3, 6, 24], name="y"), "cannot-capture"),
    ],
    ids=str,
)
@pytest.mark.xdist_group("conformance-plain")
def test_a_manifest_in_order_that_makes_no_sense(artifact: Path, changes: dict[str, Any], code: str) -> None:
    """A spec or inputs that can be read, and fail as they would have when the artifact was made."""
    reseal(artifact, **changes)
    refused(artifact, code)


@pytest.mark.xdist_group("conformance-plain")
def test_a_wrong_base_is_refused(artifact: Path) -> None:
    other = copy.deepcopy(subject("plain").base)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-9
    refused(artifact, "wrong-base", other)
    refused(artifact, "wrong-base", subject("llama").base)


@pytest.mark.xdist_group("conformance-llama")
def test_a_base_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """The same weights under another configuration, or with another buffer, give other outputs."""
    compiled("llama", statement("ia3")).module.save(tmp_path / "adapter")
    other = ZOO["llama"]()
    changed = type(other)(type(other.config).from_dict({**other.config.to_dict(), "hidden_act": "gelu"}))
    changed.load_state_dict(other.state_dict())
    refused(tmp_path / "adapter", "wrong-base", changed)
    other.get_buffer("model.rotary_emb.inv_freq")[0] += 1e-3
    refused(tmp_path / "adapter", "wrong-base", other)


@pytest.mark.xdist_group("conformance-llama")
def test_a_base_that_is_called_otherwise_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model came from and what its labels are called changes no output."""
    case = compiled("llama", statement("ia3"))
    case.module.save(tmp_path / "adapter")
    config: Any = case.subject.base.config
    monkeypatch.setattr(config, "_name_or_path", "elsewhere")
    monkeypatch.setattr(config, "id2label", {0: "good", 1: "bad"})
    peftc.load(tmp_path / "adapter", case.subject.base)


@pytest.mark.xdist_group("conformance-plain")
def test_save_leaves_alone_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(peftc.PeftcError, match="something else"):
        compiled("plain", SPEC).module.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def fail(error: type[BaseException], at: int) -> Callable[..., Any]:
    """A function that passes its calls on, but for one."""
    calls = 0
    rename = Path.rename

    def rename_or_fail(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return rename(self, target)

    return rename_or_fail


def disk_full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


RENAME = "pathlib.Path.rename"
INTERRUPTIONS = [
    pytest.param("os.fsync", lambda: disk_full, id="the disk is full"),
    pytest.param(RENAME, lambda: fail(OSError, at=1), id="the old one cannot be moved"),
    pytest.param(RENAME, lambda: fail(OSError, at=2), id="the new one cannot be moved"),
    pytest.param(RENAME, lambda: fail(KeyboardInterrupt, at=1), id="Ctrl-C before the old one moves"),
    pytest.param(RENAME, lambda: fail(KeyboardInterrupt, at=2), id="Ctrl-C before the new one moves"),
]


@pytest.mark.parametrize(("function", "replacement"), INTERRUPTIONS)
@pytest.mark.xdist_group("conformance-plain")
def test_an_interrupted_save_leaves_the_old_artifact_whole(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, function: str, replacement: Callable[[], Any]
) -> None:
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    newer = compiled("plain", SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(function, replacement())
        with pytest.raises((OSError, KeyboardInterrupt)):
            newer.module.save(artifact)
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name], "something was left lying about"
    newer.module.save(artifact)
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} != before


# ---- Claim 7: methods that meet -----------------------------------------------------------------------------------


TRAININGS = ("train norm", "train linear")
PLAINEST = [*map(statement, DEFAULTS), "train norm"]


def stage(line: str) -> int:
    """When the line's method acts; only within a stage does the order of the file matter."""
    return 0 if line in TRAININGS else built(variant_of(line)).stage


def method_of(line: str) -> str:
    return "train" if line in TRAININGS else variant_of(line).partition("(")[0]


def variant_of(line: str) -> str:
    return line.removeprefix("apply ").partition(" to ")[0]


def meetings(lines: list[str]) -> list[str]:
    """Every two lines about different methods, in both orders where that makes a difference."""
    pairs = [pair for pair in permutations(lines, 2) if method_of(pair[0]) != method_of(pair[1])]
    return ["\n".join(pair) for pair in pairs if stage(pair[0]) <= stage(pair[1])]


def contradiction(spec: str) -> str | None:
    """The code of the refusal where a method that wants something to itself meets what all of these stand on."""
    lines = spec.splitlines()
    applied = [application.method for application in resolve(as_spec(spec)).applications]
    if len(lines) > 1 and any(method.claims_upstream() for method in applied):
        return "gradient-claimed"
    on_weights = [method for method in applied if method.stage is Stage.WEIGHT]
    shared = len(on_weights) + ("train linear" in lines) > 1
    return "weight-claimed" if shared and any(method.claims_weight() for method in on_weights) else None


def meeting(name: str, spec: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(name, spec, id=f"{name}: {' / '.join(spec.splitlines())}",
                        marks=[pytest.mark.xdist_group(f"conformance-{name}"), *marks])  # fmt: skip


def subject_of(spec: str) -> str:
    """A plain module, unless a gradient is asked for."""
    asked = {application.method.data for application in resolve(as_spec(spec)).applications}
    return "llama" if asked & NEEDS_LOSS else "plain"


QUICK_MEETINGS = [
    *(
        ("llama", f"{statement(first)}\n{statement(second)}")
        for first, second in combinations(("lora", "ia3", "adapter"), 2)
    ),
    # of one fused weight, each has rows of its own
    ("gpt2", "apply dora to attn.q\napply lora to attn.k"),
]
FULL_MEETINGS = [
    *((subject_of(spec), spec) for spec in meetings(PLAINEST) if not contradiction(spec)),
    ("gpt2", "apply lora(init=pissa) to attn.q\napply dora to attn.k, mlp.down"),
]


@pytest.mark.parametrize(
    ("name", "spec"),
    [meeting(*case) for case in QUICK_MEETINGS]
    + [meeting(*case, pytest.mark.slow) for case in FULL_MEETINGS if case not in QUICK_MEETINGS],
)
def test_7_two_that_meet(name: str, spec: str, tmp_path: Path) -> None:
    if all(application.method.identity for application in resolve(as_spec(spec)).applications):
        starts_as_the_base(compiled(name, spec))
    learns_what_it_declares_and_nothing_else(compiled(name, spec))
    merges_or_says_why_not(compiled(name, spec))
    comes_back_from_disk(compiled(name, spec), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "spec"), [meeting("plain", spec) for spec in meetings(PLAINEST) if contradiction(spec)]
)
def test_7_what_one_claims_is_shared_with_nothing(name: str, spec: str) -> None:
    """Whatever the order in the file, the refusal shows both lines."""
    for lines in permutations(spec.splitlines()):
        with pytest.raises(peftc.PeftcError) as raised:
            peftc.plan(subject(name).base, "\n".join(lines), example=subject(name).example)
        assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {contradiction(spec)}
        assert all(line in str(raised.value) for line in lines)


@pytest.mark.xdist_group("conformance-plain")
def test_7_all_at_once(tmp_path: Path) -> None:
    """Every method that shares, and an existing parameter, in one model."""
    sharing = [v for v in DEFAULTS if not (built(v).claims_weight() or built(v).claims_upstream())]
    sharing = [statement(variant) for variant in sharing if built(variant).data not in NEEDS_LOSS]
    spec = "\n".join(["train norm, head", *sharing])
    test_7_two_that_meet("plain", spec, tmp_path)
