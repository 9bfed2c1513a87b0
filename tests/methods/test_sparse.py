"""Sparse methods: against the dense ones that they stand for, and which numbers each way of choosing keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftc
from byhooks import CLOSE, State, agree, base, compiled, gate, hooked, lora_branch, randomised, state_of
from peftc.driver import calibration
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from peftc.protocol.site import Linear
from zoo import inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


def whole(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[State], State]:
    """A sparse site's tensors as the dense ones that they stand for."""

    def dense(state: State) -> State:
        found = dict(state)
        for name, shape in shapes.items():
            places, values = found.pop(f"{name}.places"), found.pop(f"{name}.values")
            empty = torch.zeros(torch.Size(shape).numel())
            found[name] = empty.index_put((places,), values).reshape(shape)
        return found

    return dense


LORA_SHAPES = {"method.A": (4, 32), "method.B": (48, 4)}  # of q in a llama whose heads are wider than the model


def test_sparse_lora_written_out_and_merged() -> None:
    model = randomised("llama", "apply sparse(lora(r=4), density=0.3, by=random) to attn.q")
    agree("llama", model, lambda x, y, s: y + lora_branch(x, s), whole(LORA_SHAPES))
    batch = inputs(base("llama"))
    with torch.no_grad():
        torch.testing.assert_close(model.merge().eval()(**batch).logits, model(**batch).logits, **CLOSE)


def test_a_gate_around_a_sparse_method_written_out() -> None:
    model = randomised("llama", "apply gated(sparse(lora(r=4), density=0.3)) to attn.q")
    dense = whole({f"method.{name}": shape for name, shape in LORA_SHAPES.items()})
    agree("llama", model, lambda x, y, s: y + gate(x, s) * lora_branch(x, s, "method.method."), dense)


def test_what_is_removed_stays_zero() -> None:
    """Ten steps of a sparse adapter: as many numbers as the density says learn, and no others are there."""
    model = compiled("bert", "apply sparse(adapter(size=10), density=0.2) to mlp")
    shapes = {"method.down": (10, 32), "method.up": (32, 10)}
    batch = inputs(base("bert"))
    start = [state_of(model, binding) for binding in model.plan.bindings]
    assert model.plan.trainable == 2 * (64 + 64 + 10 + 32)
    optimizer = torch.optim.AdamW(model.param_groups(lr=1e-2))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for before, binding in zip(start, model.plan.bindings, strict=True):
        now = state_of(model, binding)
        for name, matrix in whole(shapes)(now).items():
            if name in shapes:
                assert torch.equal(now[f"{name}.places"], before[f"{name}.places"])
                assert set(matrix.flatten().nonzero().flatten().tolist()) <= set(now[f"{name}.places"].tolist())
                assert not torch.equal(now[f"{name}.values"], before[f"{name}.values"])


def fresh(call: Any, site: Linear) -> State:
    """A method's state at a site, started with seed 0."""
    state = {name: spec.init(torch.empty(spec.shape, dtype=spec.dtype)) for name, spec in call.state(site).items()}
    torch.manual_seed(0)
    call.initialise(site, torch.zeros(site.n_out, site.n_in), state)
    return state


@given(
    n_in=st.integers(1, 20), n_out=st.integers(1, 20), r=st.integers(1, 5),
    density=st.floats(0.01, 1), by=st.sampled_from(["magnitude", "random"]),
)  # fmt: skip
@settings(max_examples=60)
def test_the_density_is_kept_exactly(n_in: int, n_out: int, r: int, density: float, by: str) -> None:
    site = Linear("q", "", frozenset(), n_in=n_in, n_out=n_out)
    state = fresh(methods()["sparse"](method=methods()["lora"](r=r), density=density, by=by), site)
    for name, count in {"A": r * n_in, "B": n_out * r}.items():
        places = state[f"method.{name}.places"].tolist()
        assert len(places) == max(1, round(density * count)) == len(state[f"method.{name}.values"])
        assert places == sorted(set(places)), "each once"
        assert places[0] >= 0
        assert places[-1] < count


def test_magnitude_keeps_the_largest() -> None:
    """Of A, which starts random; B starts at zero, whatever is kept of it."""
    site = Linear("q", "", frozenset(), n_in=11, n_out=7)
    lora = methods()["lora"](r=4)
    state = fresh(methods()["sparse"](method=lora, density=0.25), site)
    torch.manual_seed(0)
    a = lora.state(site)["A"].init(torch.empty(4, 11))
    largest = sorted(range(44), key=lambda place: -abs(a.flatten()[place].item()))[:11]
    assert state["method.A.places"].tolist() == sorted(largest)
    assert torch.equal(state["method.A.values"], a.flatten()[sorted(largest)])
    assert not state["method.B.values"].any()
    assert state["method.B.places"].tolist() != list(range(7)), "not simply the first"


def test_random_places_do_not_follow_the_magnitudes() -> None:
    site = Linear("q", "", frozenset(), n_in=40, n_out=40)
    sparse = methods()["sparse"]
    by_size, by_chance = (fresh(sparse(method=methods()["lora"](r=10), by=by), site) for by in ("magnitude", "random"))
    shared = set(by_size["method.A.places"].tolist()) & set(by_chance["method.A.places"].tolist())
    assert 0 < len(shared) < 40, "a fifth of eighty by chance"


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompiledModule, list[State]]]:
    """The probe that SNIP's calibration builds, and the numbers it was judged at."""
    seen: list[tuple[CompiledModule, list[State]]] = []
    run = calibration.probed

    def probed(model: CompiledModule, batches: Any) -> Any:
        found = run(model, batches)
        seen.append((model, [state_of(model, binding) for binding in model.plan.bindings]))
        return found

    monkeypatch.setattr(calibration, "probed", probed)
    return seen


def test_snip_keeps_what_the_loss_depends_on(probes: list[tuple[CompiledModule, list[State]]]) -> None:
    """|w ∂L/∂w| over two batches, by hooks on the base, at the numbers that then start to learn. Lee et al. 2019."""
    batches = [inputs(base("llama")), inputs(base("llama"), batch=3, length=5)]
    model = compiled("llama", "apply sparse(lora(r=4), density=0.25, by=snip) to attn.q", calibration=batches)
    ((probe, states),) = probes
    assert all(binding.method.name == "lora" for binding in probe.plan.bindings)
    for batch in batches:
        with hooked("llama", probe, states, lambda x, y, s: y + lora_branch(x, s, "")):
            base("llama")(**batch).loss.backward()
    for parameter in base("llama").parameters():
        parameter.grad = None
    for binding, judged in zip(model.plan.bindings, states, strict=True):
        state = state_of(model, binding)
        for name, w in judged.items():
            assert w.grad is not None
            score = (w * w.grad).detach().flatten().abs()
            places = state[f"method.{name}.places"]
            assert len(places) == len(score) // 4
            left = torch.ones(len(score), dtype=torch.bool).index_fill(0, places, value=False)
            # The least that is kept is no less than the most that is removed, up to what rounding makes of equals.
            assert score[places].min() >= score[left].max() * (1 - 1e-4)
            start = w.detach().flatten()[places] if name == "A" else torch.zeros(len(places))
            assert torch.equal(state[f"method.{name}.values"], start), "what was judged is what learns"
    batch = batches[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, base("llama")(**batch).logits, **CLOSE)


def test_snip_of_matrices_that_share_tensors(probes: list[tuple[CompiledModule, list[State]]]) -> None:
    """The probe shares what the model shares, and both start at the same numbers."""
    spec = "apply sparse(adapter(size=4, weight=phm(n=2, rank=1, shared=true)), by=snip) to mlp"
    model = compiled("llama", spec, calibration=[inputs(base("llama"))])
    ((probe, _),) = probes
    first, second = model.plan.bindings
    assert first.names["method.weight.A"] == second.names["method.weight.A"]
    ours = get_attribute(model, first.names["method.weight.A"])
    assert torch.equal(ours, get_attribute(probe, probe.plan.bindings[1].names["weight.A"]))
    assert ours.any()


def test_calibration_is_asked_for() -> None:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile(base("llama"), "apply sparse(lora, by=snip) to attn.q")
    assert "calibration" in str(raised.value)
