"""Every method of the registry, in every variant its parameters allow, against section E of the methods' table.

No method is named in the tests of claims 1 to 7: a file added under `passes/methods` is tested here without a line.
Each variant runs quickly on a plain module in double precision, where rounding hides nothing; the methods as they
are by default also run on five architectures, and the full product of both is marked slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from claims import (
    comes_back_from_disk,
    learns_what_it_declares_and_nothing_else,
    merges_or_says_why_not,
    starts_as_the_base,
    unmergeable,
    with_dense_weights,
)
from peftc.protocol.combinator import Combinator
from peftc.protocol.method import PLAIN, Method, kinds, methods
from peftc.protocol.params import Configured, Param, registered
from peftc.protocol.site import Experts, Linear, Sublayer
from subjects import close, compiled
from variants import (
    ARCHITECTURES,
    CONV,
    DEFAULTS,
    EMBEDDING,
    EXPERTS,
    KERNELS,
    MIXTURES,
    TABLES,
    VARIANTS,
    built,
    chosen,
    complaints,
    default,
    home,
    statement_on,
    usual_place,
    variants,
)

# Every method by default runs quickly; the variants of its parameters, and the other architectures, are slow.
QUICK = [(home(variant), variant) for variant in DEFAULTS]
ON_EXPERTS = [v for v in VARIANTS if Experts in kinds(built(v)) and not built(v).refuses(EXPERTS)]
QUICK += [("mixtral", variant) for variant in ON_EXPERTS if default(variant)]
ON_KERNELS = [v for v in VARIANTS if CONV in kinds(built(v)) and not built(v).refuses(KERNELS[0])]
QUICK += [("convolved", variant) for variant in ON_KERNELS if default(variant)]
ON_TABLES = [v for v in VARIANTS if EMBEDDING in kinds(built(v)) and not built(v).refuses(TABLES[0])]
QUICK += [("looking", variant) for variant in ON_TABLES if default(variant)]
FULL = [(home(variant), variant) for variant in VARIANTS]
FULL += [(name, variant) for name in ARCHITECTURES for variant in DEFAULTS]
FULL += [("gpt2", variant) for variant in VARIANTS if chosen(variant) and not isinstance(built(variant), Combinator)]
FULL += [("convolved", variant) for variant in ON_KERNELS]
FULL += [("looking", variant) for variant in ON_TABLES]
FULL += [(name, variant) for name in MIXTURES for variant in ON_EXPERTS]
# Refused, since the input of a slice is that of the weight's other rows, too: tests/spec/plan/ia3-input-on-slice.peft.
REFUSED = {("gpt2", "ia3(on=input)")}
REFUSED |= {("vit", variant) for variant in DEFAULTS if usual_place(built(variant)) == "vocabulary"}  # images have none
FULL = [case for case in dict.fromkeys(FULL) if case not in QUICK and case not in REFUSED]


def on(name: str, value: str, *marks: pytest.MarkDecorator) -> Any:
    """Parameters of a test; one worker of pytest-xdist gets all of a model, which it captures once."""
    return pytest.param(
        name, value, id=f"{name}-{value}", marks=[pytest.mark.xdist_group(f"conformance-{name}"), *marks]
    )


CASES = [on(*case) for case in QUICK] + [on(*case, pytest.mark.slow) for case in FULL]
every_variant = pytest.mark.parametrize(("name", "variant"), CASES)


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


# ---- Claim 8: every storage under every method -------------------------------------------------------------------

STORAGES = ("nf4(double=true)", "nf4", "fp4", "int8")
ON_WEIGHTS = [variant for variant in DEFAULTS if kinds(built(variant))[0] is Linear]


QUICK_ON_STORED = ("lora", "ia3", "relora", "adalora")  # beside the weight, behind it, writing it, with a penalty


def stored_cases() -> Iterator[Any]:
    """Every storage under every method of linear layers; a few of them run quickly."""
    double, *others = STORAGES
    at_home = [(home(variant), variant) for variant in ON_WEIGHTS]
    at_home += [("mixtral", variant) for variant in ON_EXPERTS if default(variant)]
    more = [(name, variant) for name in ARCHITECTURES for variant in ON_WEIGHTS]
    more += [(name, variant) for name in MIXTURES for variant in ON_EXPERTS if default(variant)]
    more += [(home(variant), variant) for variant in DEFAULTS]
    slow = pytest.mark.slow
    for name, variant in at_home:
        yield stored(name, variant, double, *([] if name == "plain" and variant in QUICK_ON_STORED else [slow]))
    for place, variant in enumerate(variant for variant in VARIANTS if built(variant).prepares):
        yield stored(home(variant), variant, "nf4", *([slow] if place else []))
    yield from (stored(*case, double, slow) for case in more if case not in (*at_home, *REFUSED))
    yield from (stored(*case, storage, slow) for storage in others for case in at_home)


def stored(name: str, variant: str, storage: str, *marks: pytest.MarkDecorator) -> Any:
    """`on`, with all layers stored but a head, whose weight may be an embedding's, too."""
    spec = f"quantize linear except head with {storage}\n{statement_on(name, variant)}"
    marks = (pytest.mark.xdist_group(f"conformance-{name}"), *marks)
    return pytest.param(name, spec, variant, id=f"{name}-{storage}-{variant}", marks=marks)


every_storage = pytest.mark.parametrize(("name", "spec", "variant"), list(stored_cases()))


@every_storage
def test_8_on_stored_weights_it_starts_as_these(name: str, spec: str, variant: str) -> None:
    if not built(variant).identity or built(variant).prepares:
        pytest.skip("the method does not claim it, or what it takes out is not rounded")
    case = compiled(name, spec)
    assert case.module.plan.packed
    starts_as_the_base(case)


@every_storage
def test_8_on_stored_weights_it_is_the_definition(name: str, spec: str, variant: str) -> None:
    case = compiled(name, spec)
    if unmergeable(case):
        pytest.skip("no weight does the same")
    case.randomise()
    with torch.no_grad():
        expected = case.subject.outputs(with_dense_weights(case))
        close(case.subject.outputs(case.module), expected, case.subject.tolerance)


@every_storage
def test_8_on_stored_weights_it_learns_what_it_declares(name: str, spec: str, variant: str) -> None:
    learns_what_it_declares_and_nothing_else(compiled(name, spec))


@every_storage
def test_8_on_stored_weights_it_merges_or_says_why_not(name: str, spec: str, variant: str) -> None:
    merges_or_says_why_not(compiled(name, spec))


@every_storage
def test_8_on_stored_weights_it_comes_back_from_disk(name: str, spec: str, variant: str, tmp_path: Path) -> None:
    comes_back_from_disk(compiled(name, spec), tmp_path / "adapter")


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
            numbers = st.floats(low if above is None else above, high).filter(
                lambda given: not parameter.problem(given)
            )
        return st.one_of(numbers, st.none()) if parameter.optional else numbers

    given = st.fixed_dictionaries({name: values(p) for name, p in cls.parameters.items()})
    return given.map(lambda values: agreeing(cls, values)).filter(lambda method: method.conflict() is None)


def agreeing(cls: type[Configured], values: dict[str, Any]) -> Configured:
    """With the default of each number that the other values do not go with."""
    made = cls(**values)
    for name, parameter in cls.parameters.items():
        if made.conflict() and parameter.kind in (int, float) and not parameter.required:
            other = cls(**made.values | {name: parameter.default})
            made = made if other.conflict() == made.conflict() else other
    return made


def folds(cls: type[Configured]) -> bool:
    """Whether a plain method stands on linear layers and folds into them."""
    return issubclass(cls, Method) and kinds(cls)[0] is Linear and cls.unmergeable is None


def sometimes_folds(cls: type[Method]) -> bool:
    return any(kinds(built(variant))[0] is Linear and built(variant).unmergeable is None for variant in variants(cls))


SIZES = st.one_of(st.integers(1, 12), st.sampled_from((8, 12, 16, 24)))  # of the last, more parts divide them


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if sometimes_folds(cls)])
@given(
    data=st.data(),
    n_in=SIZES,
    n_out=SIZES,
    tokens=st.integers(1, 4),
    has_bias=st.booleans(),
    role=st.sampled_from(["attn.k", "mlp.down"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])  # what it refuses is drawn, too
def test_2_rewrite_equals_fold_on_any_shape(
    name: str, data: st.DataObject, n_in: int, n_out: int, tokens: int, has_bias: bool, role: str, seed: int
) -> None:
    method = data.draw(settings_of(methods()[name]))
    site = Linear("layer", "layer", frozenset({role}), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None)
    assume(isinstance(site, kinds(method)) and method.refuses(site) is None)
    random = torch.Generator().manual_seed(seed)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    specs = {**method.state(site), **method.shares([site])[0]}
    start = {key: spec.init(torch.empty(spec.shape, dtype=spec.dtype or torch.float64)) for key, spec in specs.items()}
    method.initialise(site, number(n_out, n_in), start)
    # random numbers hide nothing; but an index, or a seed, stays what the method made it
    state = {key: number(*spec.shape) if spec.dtype is None else start[key] for key, spec in specs.items()}
    x, bias = number(tokens, n_in), number(n_out) if has_bias else None
    weight = method.prepare(site, number(n_out, n_in), state)
    known: dict[str, Any] = {**state, "weight": weight, "bias": bias, "training": torch.zeros(()), "here": PLAIN}
    if method.rewrites_input(site):
        given = {name: known.get(name) for name in method.asks_input(state)}
        rewritten = F.linear(method.rewrite_input(site, x, **given), weight, bias)
    else:
        given = {name: known.get(name) for name in method.asks(state)}
        rewritten = method.rewrite(site, x, F.linear(x, weight, bias), **given)
    folded = F.linear(x, *method.fold(site, weight, bias, state))
    # float64 rounds at 1e-16. A row whose norm DoRA divides by may be 1e-4 of its parts: its square is their sum,
    # whose rounding is then 1e8 times as large
    tolerance = 1e-7 if name == "dora" else 1e-9
    torch.testing.assert_close(rewritten, folded, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if CONV in kinds(cls)])
@given(data=st.data(), has_bias=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])  # what it refuses is drawn, too
def test_2_rewrite_equals_fold_on_any_kernel(name: str, data: st.DataObject, has_bias: bool, seed: int) -> None:
    method = data.draw(settings_of(methods()[name]))
    n, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2)))
    kernel, stride, dilation = (tuple(data.draw(st.integers(1, most)) for _ in range(n)) for most in (3, 2, 2))
    n_in, n_out = (groups * data.draw(st.integers(1, 6)) for _ in range(2))
    padding = data.draw(st.sampled_from(("valid", (1,) * n)))
    site = CONV(
        "layer", "layer", frozenset({"conv"}), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None,
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip
    assume(method.refuses(site) is None and method.unmergeable_at(site) is None)
    random = torch.Generator().manual_seed(seed)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    state = {key: number(*spec.shape) for key, spec in method.state(site).items()}
    x, bias, weight = number(2, n_in, *(7,) * n), number(n_out) if has_bias else None, number(*site.shape)
    known: dict[str, Any] = {**state, "weight": weight, "bias": bias, "training": torch.zeros(()), "here": PLAIN}

    def base(weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        made: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
        return made

    rewritten = method.rewrite(site, x, base(weight, bias), **{name: known.get(name) for name in method.asks(state)})
    # as above; sums are of up to 6 * 27 numbers
    tolerance = 1e-7 if name == "dora" else 1e-9
    torch.testing.assert_close(rewritten, base(*method.fold(site, weight, bias, state)), rtol=tolerance, atol=tolerance)


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
    found = method.rewrite(Sublayer("mlp", "mlp", frozenset({"mlp"}), width=width), x[None], h[None], **state)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
