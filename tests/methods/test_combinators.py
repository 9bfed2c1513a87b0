"""Methods made of methods: gates, mixtures, sparse ones, against their formulas written out with hooks on the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqQuestionAnsweringModelOutput

import peftc
from peftc.driver import calibration
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from peftc.protocol.method import methods
from peftc.protocol.site import Linear
from peftc.runtime.consistency import symmetric_divergence
from training import rows, trainer
from zoo import VOCABULARY, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}  # single precision, in another order of additions
State = dict[str, Tensor]


@cache
def base(name: str) -> PreTrainedModel:
    model: PreTrainedModel = ZOO[name]().eval()
    return model


def compiled(name: str, spec: str, *, seed: int = 0, calibration: Any = None) -> CompiledModule:
    torch.manual_seed(seed)
    return peftc.compile(base(name), spec, calibration=calibration).eval()


def randomised(name: str, spec: str, seed: int = 0) -> CompiledModule:
    """With random values in all that learns: zeros would hide mistakes."""
    model = compiled(name, spec)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def state_of(model: CompiledModule, binding: Binding) -> State:
    """A copy of a site's tensors, those that learn with gradients of their own."""
    found = {name: get_attribute(model, full).detach().clone() for name, full in binding.names.items()}
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in found.items()}


Hook = Callable[[Tensor, Tensor, State], Tensor]


@contextmanager
def hooked(name: str, model: CompiledModule, states: Sequence[State], function: Hook) -> Iterator[None]:
    """The base with each site's output as `function(x, y, state)` has it."""
    handles: list[Any] = []
    for binding, state in zip(model.plan.bindings, states, strict=True):
        site = binding.site
        if not isinstance(site, Linear):
            handles += _around_feed_forward(base(name), site.name, state, function)
            continue

        def hook(_module: Any, args: Any, y: Tensor, site: Linear = site, state: State = state) -> Tensor:
            if site.rows is None:
                return function(args[0], y, state)
            rows = torch.tensor(site.rows)
            return y.index_copy(-1, rows, function(args[0], y[..., rows], state))

        layer = base(name).get_submodule(site.weight.removesuffix(".weight"))
        handles.append(layer.register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def _around_feed_forward(model: nn.Module, name: str, state: State, function: Hook) -> Iterator[Any]:
    """BERT's: x enters `intermediate`, h leaves `output.dense`."""
    block = name.removesuffix(".mlp")
    entered: list[Tensor] = []
    first, last = model.get_submodule(f"{block}.intermediate"), model.get_submodule(f"{block}.output.dense")
    yield first.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    yield last.register_forward_hook(lambda _module, _args, h: function(entered.pop(), h, state))


def agree(name: str, model: CompiledModule, function: Hook, of: Callable[[State], State] = dict) -> None:
    """Logits and gradients of `model` are those of the base with hooks; `of` says what a site's tensors mean."""
    batch = inputs(base(name))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    with hooked(name, model, [of(state) for state in states], function):
        expected = base(name)(**batch)
    actual = model(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    assert (actual.logits - base(name)(**batch).logits).abs().max() > 1e-2, "the method does something"
    actual.loss.backward()
    expected.loss.backward()
    for binding, state in zip(model.plan.bindings, states, strict=True):
        for key, full in binding.names.items():
            if binding.tensors[full].trainable:
                torch.testing.assert_close(get_attribute(model, full).grad, state[key].grad, **CLOSE)
    for parameter in base(name).parameters():
        parameter.grad = None


def lora_branch(x: Tensor, state: State, prefix: str = "method.") -> Tensor:
    return 16 / state[f"{prefix}A"].shape[0] * (x @ state[f"{prefix}A"].t() @ state[f"{prefix}B"].t())


def adapter_branch(h: Tensor, state: State) -> Tensor:
    inner = F.relu(h @ state["method.down"].t() + state["method.down_bias"])
    return inner @ state["method.up"].t() + state["method.up_bias"]


# ---- Gates -----------------------------------------------------------------------------------------------------------


def gate(x: Tensor, state: State) -> Tensor:
    """Mao et al. 2021, section 3: one number a position, from what enters."""
    return torch.sigmoid((x * state["w"][0]).sum(-1, keepdim=True) + state["b"])


@pytest.mark.parametrize(
    ("name", "spec", "function"),
    [
        ("llama", "apply gated(lora(r=3)) to attn.q, attn.v", lambda x, y, s: y + gate(x, s) * lora_branch(x, s)),
        ("gpt2", "apply gated(lora(r=3)) to attn.q, attn.v", lambda x, y, s: y + gate(x, s) * lora_branch(x, s)),
        ("bert", "apply gated(adapter(size=5)) to mlp", lambda x, h, s: h + gate(x, s) * adapter_branch(h, s)),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_a_gate_written_out(name: str, spec: str, function: Hook) -> None:
    agree(name, randomised(name, spec), function)


def test_a_gate_shows_no_token_what_follows() -> None:
    model = randomised("llama", "apply gated(lora(r=3)) to attn.q, attn.v\napply gated(adapter(size=4)) to mlp")
    batch = inputs(base("llama"))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = model(**batch).logits, model(**other).logits
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_a_gate_opens_and_closes() -> None:
    """Far open it is the method itself, far closed the base."""
    spec = "apply {} to attn.q, attn.v"
    model, plain = randomised("llama", spec.format("gated(lora(r=3))")), compiled("llama", spec.format("lora(r=3)"))
    batch = inputs(base("llama"))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            get_attribute(model, ours.names["w"]).zero_()
            for key in ("A", "B"):
                get_attribute(plain, theirs.names[key]).copy_(get_attribute(model, ours.names[f"method.{key}"]))
        for bias, expected in ((50.0, plain), (-50.0, base("llama"))):
            for binding in model.plan.bindings:
                get_attribute(model, binding.names["b"]).fill_(bias)
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, **CLOSE)


# ---- Mixtures --------------------------------------------------------------------------------------------------------

MIXTURE = "apply mixture(lora(r=2), n=3, consistency={}) to attn.q, attn.v"


def picked(model: CompiledModule) -> list[int]:
    """The copy that each site used in the pass whose gradients are there: no other copy has any."""
    found = []
    for binding in model.plan.bindings:
        reached = [
            [copy for copy in range(3) if get_attribute(model, full).grad[copy].any()]
            for full in binding.names.values()
        ]
        assert reached[0] == reached[1]
        (one,) = reached[0]
        found.append(one)
    return found


def plain_with(states: Sequence[State]) -> CompiledModule:
    """The method by itself, with given parameters at each site."""
    plain = compiled("llama", "apply lora(r=2) to attn.q, attn.v")
    with torch.no_grad():
        for binding, state in zip(plain.plan.bindings, states, strict=True):
            for key, full in binding.names.items():
                get_attribute(plain, full).copy_(state[f"method.{key}"])
    return plain


def test_a_pass_of_a_mixture_uses_one_copy_a_site_all_alike_often() -> None:
    model = randomised("llama", MIXTURE.format(0)).train()
    model.logits_in_training = True
    batch = inputs(base("llama"))
    torch.manual_seed(0)
    counts = torch.zeros(len(model.plan.bindings), 3)
    differ = 0
    for step in range(60):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        picks = picked(model)
        differ += len(set(picks)) > 1
        counts[range(len(picks)), picks] += 1
        if step < 3:
            states = [state_of(model, binding) for binding in model.plan.bindings]
            chosen = [{k: t[one] for k, t in state.items()} for state, one in zip(states, picks, strict=True)]
            with torch.no_grad():
                torch.testing.assert_close(output.logits, plain_with(chosen)(**batch).logits, **CLOSE)
    # 240 picks at four sites: 80 of each copy on average, with a standard deviation of 7.3
    assert ((counts.sum(0) - 80).abs() < 5 * 7.3).all()
    assert ((counts - 20).abs() < 5 * 3.7).all(), "at each site by itself"
    assert differ > 40, "sites pick for themselves: all four agree in one pass of 27"


def test_a_mixture_is_its_average_outside_training_and_merged() -> None:
    model = randomised("llama", MIXTURE.format(1))
    batch = inputs(base("llama"))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    average = plain_with([{key: tensor.mean(0) for key, tensor in state.items()} for state in states])
    with torch.no_grad():
        expected = average(**batch)
        torch.testing.assert_close(model(**batch).logits, expected.logits, **CLOSE)
        torch.testing.assert_close(model.merge().eval()(**batch).logits, expected.logits, **CLOSE)
        assert torch.equal(model(**batch).logits, model(**batch).logits)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of two tensors of logits, averaged over positions, from the probabilities themselves."""
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def test_the_consistency_loss_written_out() -> None:
    """Wang et al. 2022, section 3.2, with the two passes made one after the other by a model that has no such loss."""
    one, two = randomised("llama", MIXTURE.format(0)).train(), randomised("llama", MIXTURE.format(0.7)).train()
    one.logits_in_training = two.logits_in_training = True
    batch = inputs(base("llama"))
    torch.manual_seed(5)
    p, q = one(**batch), one(**batch)
    assert not torch.allclose(p.logits, q.logits, atol=1e-2)
    both = (divergence(p.logits, q.logits) + divergence(q.logits, p.logits)) / 2
    expected = (p.loss + q.loss) / 2 + 0.7 * both
    expected.backward()
    torch.manual_seed(5)
    actual = two(**batch)
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected, **CLOSE)
    assert torch.equal(actual.logits, p.logits)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(theirs.grad, ours.grad, **CLOSE)


def test_there_is_one_pass_where_nothing_asks_for_two() -> None:
    """Outside training, without labels, and where `consistency` is zero."""
    batch = inputs(base("llama"))
    zero, one = randomised("llama", MIXTURE.format(0)), randomised("llama", MIXTURE.format(1))
    assert (zero.plan.consistency, one.plan.consistency) == (0, 1)
    with torch.no_grad():
        assert torch.equal(zero(**batch).loss, one(**batch).loss)
        zero.train(), one.train()
        unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
        results = []
        for model in (zero, one):
            torch.manual_seed(1)
            results.append((model(**unlabelled).logits, torch.get_rng_state()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1]), "as many picks in one as in the other"
        torch.manual_seed(1)
        zero(**batch)
        assert torch.equal(torch.get_rng_state(), results[0][1])


def test_a_gate_around_a_mixture_keeps_its_second_pass() -> None:
    plan = peftc.plan(base("llama"), "apply gated(mixture(lora(r=2), n=2, consistency=0.5)) to attn.q")
    assert plan.consistency == 0.5


def test_training_brings_the_copies_together() -> None:
    """AdaMix's effect: ten steps reduce the loss, and what one pass says less what another says."""
    model = randomised("llama", MIXTURE.format(1))
    batch = inputs(base("llama"))

    def between_passes() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            seen = [model.train()(**batch).logits for _ in range(12)]
            pairs = zip(seen[::2], seen[1::2], strict=True)
            return float(torch.stack([divergence(p, q) for p, q in pairs]).mean())

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss(), between_passes()
    optimizer = torch.optim.Adam(model.param_groups(lr=2e-2))
    for _ in range(10):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    after = loss(), between_passes()
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_torch_compile_takes_both_passes_as_one_graph() -> None:
    model = randomised("llama", MIXTURE.format(1)).train()
    batch = inputs(base("llama"))
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = model(**batch).loss
    torch.manual_seed(3)
    torch.testing.assert_close(fast(**batch).loss, expected, **CLOSE)


def test_a_trainer_trains_a_mixture(tmp_path: Path) -> None:
    model = randomised("llama", MIXTURE.format(1))
    before = {name: tensor.detach().clone() for name, tensor in model.trainable_parameters().items()}
    run = trainer(model, tmp_path, rows(9, 12), steps=4, lr=1e-2)
    run.train()
    assert len(run.losses) == 4
    assert all(torch.isfinite(torch.tensor(run.losses)))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.trainable_parameters().items())


# ---- Sparse ----------------------------------------------------------------------------------------------------------


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


# ---- At attentions ---------------------------------------------------------------------------------------------------


def test_a_gated_prefix_written_out() -> None:
    """y + σ(w x + b) (y' - y), where y' attends to [P, k] and [Q, v], on BERT: outputs and gradients."""
    model = randomised("bert", "apply gated(prefix(length=3)) to attn")
    batch = inputs(base("bert"))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    handles = []

    def heads(flat: Tensor) -> Tensor:
        return torch.as_tensor(flat.unflatten(-1, (4, 8)).transpose(1, 2))

    for layer, state in zip(base("bert").get_submodule("bert.encoder.layer").children(), states, strict=True):

        def hook(module: Any, args: Any, outputs: Any, state: State = state) -> Any:
            x, y = args[0], outputs[0]
            keys, values = (
                torch.cat([state[f"method.{name}"].expand(2, -1, -1), project(x)], 1)
                for name, project in (("keys", module.key), ("values", module.value))
            )
            scores = heads(module.query(x)) @ heads(keys).transpose(-1, -2) / 8**0.5
            changed = (scores.softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)
            return y + gate(x, state) * (changed - y), *outputs[1:]

        handles.append(layer.get_submodule("attention.self").register_forward_hook(hook))
    expected = base("bert")(**batch)
    for handle in handles:
        handle.remove()
    actual = model(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    actual.loss.backward()
    expected.loss.backward()
    for binding, state in zip(model.plan.bindings, states, strict=True):
        for key, full in binding.names.items():
            torch.testing.assert_close(get_attribute(model, full).grad, state[key].grad, **CLOSE)
    for parameter in base("bert").parameters():
        parameter.grad = None


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow),
                                  pytest.param("bloom", marks=pytest.mark.slow)])  # fmt: skip
def test_a_gate_opens_and_closes_at_a_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far closed it is the base, whose positions count on from nothing; far open the prefix, if that took no places."""
    prefix = methods()["prefix"]
    monkeypatch.setattr(prefix, "takes_positions", lambda self, site: 0)
    model = randomised(name, "apply gated(prefix(length=3)) to attn")
    plain = compiled(name, "apply prefix(length=3) to attn")
    batch = inputs(base(name))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            get_attribute(model, ours.names["w"]).zero_()
            for key, full in theirs.names.items():
                get_attribute(plain, full).copy_(get_attribute(model, ours.names[f"method.{key}"]))
        for bias, expected in ((50.0, plain), (-50.0, base(name))):
            for binding in model.plan.bindings:
                get_attribute(model, binding.names["b"]).fill_(bias)
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, **CLOSE)
        assert (plain(**batch).logits - base(name)(**batch).logits).abs().max() > 1e-3


def test_a_mixture_of_prefixes_is_its_average_outside_training() -> None:
    model = randomised("llama", "apply mixture(prefix(length=3), n=3) to attn")
    plain = compiled("llama", "apply prefix(length=3) to attn")
    batch = inputs(base("llama"))
    with torch.no_grad():
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            for key, full in theirs.names.items():
                get_attribute(plain, full).copy_(get_attribute(model, ours.names[f"method.{key}"]).mean(0))
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, **CLOSE)
        model.train()
        assert not torch.allclose(model(**batch).logits, model(**batch).logits, atol=1e-4), "copies are picked"
    model(**batch).loss.backward()
    for parameter in model.trainable_parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_a_gate_lets_calibration_through() -> None:
    """The method under it starts from data as it does by itself."""
    batches = [inputs(base("llama"))]
    spec = "apply {} to attn.q"
    for inner in ("sparse(lora(r=2), by=snip)", "lora(r=2, init=eva)"):
        plain = compiled("llama", spec.format(inner), calibration=batches)
        model = compiled("llama", spec.format(f"gated({inner})"), calibration=batches)
        for ours, theirs in zip(model.plan.bindings, plain.plan.bindings, strict=True):
            for key, full in theirs.names.items():
                if "B" not in key:  # whose zeros are judged at numbers drawn later in one than in the other
                    assert torch.equal(get_attribute(model, ours.names[f"method.{key}"]), get_attribute(plain, full))


def test_a_gated_weight_that_claims_its_layer() -> None:
    """DoRA's change of the output goes through a gate as any other; its claim on the weight stands."""
    model = randomised("llama", "apply gated(dora(r=3)) to attn.q, attn.v")
    weights = [base("llama").get_parameter(binding.site.parameters[0]) for binding in model.plan.bindings]

    def dora(x: Tensor, y: Tensor, state: State) -> Tensor:
        weight = next(w for w in weights if len(w) == y.shape[-1] and torch.allclose(x @ w.t(), y))
        changed = weight + 16 / 3 * state["method.B"] @ state["method.A"]
        length = state["method.m"] / changed.detach().norm(dim=1)
        return torch.as_tensor(y + gate(x, state) * (length * (x @ changed.t()) - y))

    agree("llama", model, dora)
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(base("llama"), "apply gated(dora) to attn.q\napply lora to attn.q")
    assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"weight-claimed"}


def test_two_gates_at_one_place_over_different_methods() -> None:
    spec = "apply gated(adapter(size=3)) to attn, mlp\napply gated(prefix(length=2)) to attn"
    plan = peftc.plan(ZOO["llama"](), spec)
    assert len({binding.path for binding in plan.bindings}) == len(plan.bindings) == 6


def test_places_without_a_label_do_not_count_in_the_consistency() -> None:
    """What stands at padding, whose label is -100, changes nothing."""
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 7, generator=random) for _ in range(2))
    kept = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])
    other = torch.where(kept[..., None], q, torch.randn(2, 5, 7, generator=random))
    expected = symmetric_divergence(p[kept], q[kept])
    torch.testing.assert_close(symmetric_divergence(p, other, kept.flatten()), expected, rtol=1e-5, atol=1e-6)


def test_two_passes_without_logits_are_refused() -> None:
    model = BertForQuestionAnswering(BertConfig(**ZOO["bert"]().config.to_dict()))
    tokens = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": tokens, "start_positions": tokens[:, 0], "end_positions": tokens[:, 1]}
    two = peftc.compile(model, "apply mixture(lora(r=2)) to attn.q", example=example)
    two(**example).loss.backward()  # start_logits and end_logits are compared
    with pytest.raises(peftc.PeftcError, match="consistency=0"):
        peftc.plan(NoLogits(), "apply mixture(lora(r=2)) to head", example=tokens)


class NoLogits(nn.Module):
    """Returns a loss, and features by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Seq2SeqQuestionAnsweringModelOutput:
        features = self.head(self.table(tokens))
        return Seq2SeqQuestionAnsweringModelOutput(loss=features.square().mean(), encoder_last_hidden_state=features)
