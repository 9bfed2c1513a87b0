"""Is a compiled model what it says? Held against eager PyTorch, which knows nothing of peftc.

The reference of a method with a weight form is the base model itself, called with its weights as the method's
definition changes them, with gradients through that: `torch.func.functional_call`. Everything is compared in float32
to 1e-5 of the largest number of a tensor, and what float32 can't tell is asked again in float64.
"""

from __future__ import annotations

import copy
import inspect
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

import peftc
from peftc.capture.inputs import example_inputs
from peftc.graph.ir import get_attribute
from peftc.planning.errors import NoMatch, NoSequence, WrongSite
from peftc.protocol.site import Projection
from sweep.batches import Batch, varied
from sweep.exceptions import EXAMPLES
from sweep.naming import wrong_roles
from sweep.prompted import prompted
from sweep.specs import SPECS, Spec
from sweep.tiny import NotBuilt, tiny_model

STARTS_ELSEWHERE = ("prefix", "prompt", "nf4")  # not the base model at first
STRICT, ROUGH = 1e-5, 1e-4
IN_FLOAT64 = 5e-6  # models compute norms and angles in float32 all the same, which adds up in gradients
Expected = tuple[dict[str, Tensor], dict[str, Tensor]]  # outputs, gradients
HARMLESS = 1e-7  # of the largest: what is left of a gradient that cancels


@dataclass
class Verdict:
    """What became of one spec on one type: right, wrong, role, refused, traceback, timeout, not-built or absent."""

    head: str
    kind: str
    spec: str
    verdict: str = "right"
    reasons: list[str] = field(default_factory=list)
    islands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0

    def add(self, verdict: str, reason: str) -> None:
        """The first verdict that is not `right` stands; reasons are kept together."""
        if self.verdict == "right":
            self.verdict = verdict
        self.reasons.append(reason)


def judge(head: str, kind: str, spec: str, options: Mapping[str, Any] | None = None) -> Verdict:
    """One spec on a tiny model of one type."""
    verdict = Verdict(head, kind, spec)
    start = time.process_time()
    try:
        _judge(verdict, options or {})
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        verdict.add("traceback", f"{type(error).__name__} at {where}: {error}".strip()[:400])
    verdict.seconds = round(time.process_time() - start, 2)
    return verdict


def _judge(verdict: Verdict, options: Mapping[str, Any]) -> None:
    try:
        base = tiny_model(verdict.head, verdict.kind, options)
    except NotBuilt as error:
        return verdict.add("not-built", str(error))
    verdict.parameters = sum(p.numel() for p in base.parameters())
    given = EXAMPLES[verdict.kind](base) if verdict.kind in EXAMPLES else None
    try:
        made = example_inputs(copy.deepcopy(base), given)
    except peftc.PeftcError as error:
        if (fails := _fails_on_text(base)) is not None:
            return verdict.add("not-built", fails)
        return verdict.add("refused", _told(error))
    fixed = {name: value for name, value in made.constants.items() if name != "use_cache"}  # sizes of images
    example, rows = {**made.kwargs, **fixed}, 2 if fixed else 3
    batches = [varied(base, example, rows=2, more=0, seed=1), varied(base, example, rows=rows, more=3, seed=2)]
    usable = []
    for batch in batches:
        try:
            with torch.no_grad():
                result = _called(base, batch)
            assert all(t.isfinite().all() for t in _outputs(result).values()), "it is not finite"
            usable.append(batch)
        except Exception as error:
            if not usable and batch is batches[0]:
                return verdict.add("not-built", _eager(error))
    try:
        with torch.no_grad():
            _called(base.train(), usable[0])
    except Exception as error:
        return verdict.add("not-built", f"in training, {_eager(error)}")
    finally:
        base.eval()
    try:
        text, compiled, took = _compiled(base, SPECS[verdict.spec], given)
    except peftc.PeftcError as error:
        no_place = all(isinstance(one, NoSequence) for one in error.diagnostics)
        return verdict.add("absent" if no_place else "refused", _told(error))
    if compiled is None:
        return verdict.add("absent", f"there is no {' or '.join(SPECS[verdict.spec].roles)}")
    taken = compiled.plan.captured.example
    usable = [{name: one for name, one in batch.items() if name in taken.kwargs | taken.constants} for batch in usable]
    if took > 20:
        verdict.reasons.append(f"compiled in {took:.0f} CPU seconds")
    verdict.islands = [island.path for island in compiled.plan.captured.islands]
    _shaken_and_compared(verdict, text, base, compiled, usable, given)
    for problem in wrong_roles(compiled):
        verdict.add("role", problem)


def _compiled(base: PreTrainedModel, spec: Spec, example: Batch | None) -> tuple[str, Any, float]:
    """The spec on all its roles, or on those that a refusal says the model has, without experts where one says that the
    method is for none; what became of it; its CPU seconds.
    """
    tried: set[str | None] = set()
    text: str | None = spec.statement.format(", ".join(spec.roles))
    while text is not None:
        torch.manual_seed(0)
        start = time.process_time()
        try:
            compiled = peftc.compile(base, text, example=example)
        except peftc.PeftcError as error:
            lacking = [one for one in error.diagnostics if isinstance(one, NoMatch)]
            tried.add(text)
            if lacking:
                text = spec.on(lacking[0].has)
            elif any(isinstance(one, WrongSite) and one.instead for one in error.diagnostics):
                text = f"{text} except expert"
            if text in tried:
                raise
        else:
            return text, compiled, time.process_time() - start
    return "", None, 0.0


def _fails_on_text(base: PreTrainedModel) -> str | None:
    """What eager mode says of the plainest tokens, where a model reads."""
    if base.main_input_name != "input_ids":
        return None
    try:
        with torch.no_grad():
            _called(base, {"input_ids": torch.full((2, 8), 5)})
    except Exception as error:
        return _eager(error)
    return None


def _eager(error: Exception) -> str:
    return f"eager: {type(error).__name__}: {error}".splitlines()[0][:200]


def _shaken_and_compared(
    verdict: Verdict, text: str, base: PreTrainedModel, compiled: Any, batches: list[Batch], example: Batch | None
) -> None:
    spec = verdict.spec
    problems = [] if spec in STARTS_ELSEWHERE else _starts(base, compiled, batches, STRICT)
    _shake(compiled)
    problems += _compared(spec, base, compiled, batches, STRICT)
    if not problems:
        return
    wide, many = copy.deepcopy(base).double(), [_wide(batch) for batch in batches]
    try:  # by roundings, or wrong?
        assert all(t.isfinite().all() for batch in many for t in _ask(wide, batch).values())
        torch.manual_seed(0)
        again = peftc.compile(wide, text, example=example and _wide(example))
        fresh = [] if spec in STARTS_ELSEWHERE else _starts(wide, again, many, IN_FLOAT64)
        again.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in compiled.state_dict().items()})
        sure = fresh + _compared(spec, wide, again, many, IN_FLOAT64, _nudged(wide))
    except Exception:  # not in float64
        sure = _compared(spec, base, compiled, batches, ROUGH, _nudged(base))
    for problem in sure:
        verdict.add("wrong", problem)


def _nudged(base: PreTrainedModel) -> list[PreTrainedModel]:
    """The model with other roundings of its weights to float32: what these move no comparison can tell."""
    twins = [copy.deepcopy(base) for _ in range(3)]
    for seed, twin in enumerate(twins):
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in twin.parameters():
                if weight.is_floating_point():
                    size = torch.finfo(torch.float32).eps * weight.abs().mean()
                    weight.add_(torch.randn(weight.shape, generator=random).to(weight.dtype) * size)
    return twins


def _starts(base: PreTrainedModel, compiled: Any, batches: list[Batch], close: float) -> list[str]:
    """Where an untrained method is no identity."""
    compiled.eval()
    pairs = [(_ask(compiled, batch), _ask(base, batch)) for batch in batches]
    return [p for i, (a, b) in enumerate(pairs) for p in _differences(f"start, batch {i}", a, b, close)]


def _wide(batch: Batch) -> Batch:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def _told(error: peftc.PeftcError) -> str:
    told = [f"{one.code}: {str(one).splitlines()[0]}" for one in error.diagnostics]
    return "; ".join(dict.fromkeys(told))[:600]


# ---- Numbers -------------------------------------------------------------------------------------------------------


def _outputs(result: Any) -> dict[str, Tensor]:
    found = {name: result[name] for name in ("loss", "logits") if name in result and torch.is_tensor(result[name])}
    return found or {name: value for name, value in result.items() if torch.is_tensor(value)}


def _compared(
    spec: str,
    base: PreTrainedModel,
    compiled: Any,
    batches: list[Batch],
    close: float,
    nudged: Sequence[PreTrainedModel] = (),
) -> list[str]:
    """What differs, by more than the `nudged` do."""
    problems: list[str] = []
    by_weight = all(isinstance(b.site, Projection) and not b.method.unmergeable for b in compiled.plan.bindings)
    refer = _reference if by_weight and spec != "nf4" else _in_front if spec == "prompt" else _nothing
    for training in (False, True):
        for place, batch in enumerate(batches):
            compiled.train(training)
            _trains(base, training)
            where = f"{'training' if training else 'shaken'}, batch {place}"
            torch.manual_seed(3)
            actual, gradients = _ask_with_gradients(compiled, batch)
            torch.manual_seed(3)
            if found := refer(base, compiled, batch):
                expected, theirs = found
                moved = []
                for twin in nudged:
                    _trains(twin, training)
                    torch.manual_seed(3)
                    moved.append(refer(twin, compiled, batch) or found)
                problems += _differences(where, actual, expected, close, [one for one, _ in moved])
                problems += _differences(f"{where}, gradient of", gradients, theirs, close, [one for _, one in moved])
            elif not all(gradient.isfinite().all() for gradient in gradients.values()):
                problems.append(f"{where}: a gradient is not finite")
    base.eval()
    if by_weight and spec != "nf4":
        merged = compiled.eval().merge().eval()
        problems += _differences("merged", _ask(merged, batches[0]), _ask(compiled, batches[0]), close)
    return problems


def _trains(base: nn.Module, training: bool) -> None:
    """As `train(training)`, but for batch norms, which keep to their running statistics in a compiled model."""
    base.train(training)
    for module in base.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _shake(compiled: Any) -> None:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)


def _called(model: Any, batch: Batch) -> Any:
    """The base model makes no cache, which it would where it is not told, and compiled ones do not."""
    caches = isinstance(model, PreTrainedModel) and "use_cache" in inspect.signature(model.forward).parameters
    return model(**batch, **({"use_cache": False} if caches else {}))


def _ask(model: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return _outputs(_called(model, batch))


def _total(outputs: Mapping[str, Tensor]) -> Tensor:
    """The loss, or one that reads all that there is."""
    if "loss" in outputs:
        return outputs["loss"]
    random = torch.Generator().manual_seed(7)
    parts = [
        (v * torch.randn(v.shape, generator=random).to(v.dtype)).mean() for v in outputs.values() if v.requires_grad
    ]
    total = sum(parts)
    assert isinstance(total, Tensor)
    return total


def _ask_with_gradients(compiled: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    compiled.zero_grad()
    outputs = _outputs(compiled(**batch))
    _total(outputs).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in compiled.trainable_parameters().items()}
    return {n: v.detach() for n, v in outputs.items()}, {n: g.clone() for n, g in found.items()}


def _nothing(base: PreTrainedModel, compiled: Any, batch: Batch) -> Expected | None:
    """Of a method that neither changes weights nor stands in front of the tokens: it has its own tests."""


def _in_front(base: PreTrainedModel, compiled: Any, batch: Batch) -> Expected | None:
    """The base model with a prompt in front of its tokens, where it takes embeddings."""
    ((name, prompt),) = compiled.trainable_parameters().items()
    leaf = prompt.detach().clone().requires_grad_()
    if (result := prompted(base, leaf, batch)) is None:
        return None
    outputs = _outputs(result)
    (gradient,) = torch.autograd.grad(_total(outputs), [leaf])
    return {n: v.detach() for n, v in outputs.items()}, {name: gradient}


def _reference(base: PreTrainedModel, compiled: Any, batch: Batch) -> Expected | None:
    """The base model with its weights as the definitions change them."""
    plan = compiled.plan
    leaves = {name: p.detach().clone().requires_grad_() for name, p in compiled.trainable_parameters().items()}
    own = dict(base.named_parameters(remove_duplicate=False))
    made: dict[str, Tensor] = {}
    for name in plan.trained:
        for alias in plan.captured.aliases.get(name, [name]):
            made[alias] = leaves[name]
    for binding in plan.bindings:
        site = binding.site
        state = {name: leaves.get(full, get_attribute(compiled, full)) for name, full in binding.names.items()}
        names = plan.captured.aliases.get(site.owner, [site.owner]) if not site.tied else [site.owner]
        stored = made.get(site.owner, own[site.owner].detach()).clone()
        weight = stored.transpose(-2, -1) if site.transposed else stored
        shape = weight.shape
        weight = weight.reshape(*site.batch, -1, site.n_in) if weight.dim() != 2 + len(site.batch) else weight
        rows = list(site.rows if site.rows is not None else range(site.n_out))
        bias = None if site.bias is None else made.get(site.bias, own[site.bias].detach()).clone()
        part = None if bias is None else bias[..., rows]
        changed, shifted = _defined(binding.method, site, weight[..., rows, :].clone(), part, state)
        weight = weight.index_copy(-2, torch.tensor(rows), changed).reshape(shape)
        for name in names:
            made[name] = weight.transpose(-2, -1) if site.transposed else weight
        if bias is not None and shifted is not None:
            made[site.bias] = bias.index_copy(-1, torch.tensor(rows), shifted)
    caches = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    outputs = _outputs(torch.func.functional_call(base, made, kwargs={**batch, **caches}, tie_weights=False))
    gradients = torch.autograd.grad(_total(outputs), [*leaves.values()], allow_unused=True)
    found = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), gradients, strict=True)}
    return {n: v.detach() for n, v in outputs.items()}, found


def _defined(
    method: Any, site: Projection, weight: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """A weight as its method defines it; DoRA's lengths are constants to the gradient (its paper, section 4.3)."""
    if method.name != "dora":
        changed, shifted = method.fold(site, weight, bias, state)
        return changed, shifted
    directed = weight + method.scale * state["B"] @ state["A"]
    return (state["m"] / directed.detach().norm(dim=1))[:, None] * directed, bias


def _differences(
    where: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    close: float,
    moved: Sequence[Mapping[str, Tensor]] = (),
) -> list[str]:
    """`moved`: what else could be expected; each step of a model rounds, not its weights alone, so four times that."""
    problems = []
    if missing := expected.keys() - actual.keys() - ({"logits"} if "training" in where and "loss" in actual else set()):
        return [f"{where}: it does not return {sorted(missing)}"]
    largest = max((float(other.abs().max()) for other in expected.values() if other.numel()), default=0.0)
    for name, other in expected.items():
        if name not in actual:  # logits, which a step in training does not keep
            continue
        if actual[name].shape != other.shape:
            problems.append(f"{where} {name}: of shape {list(actual[name].shape)}, not {list(other.shape)}")
            continue
        if not other.numel():
            continue
        error = float((actual[name] - other).abs().max())
        known = 4 * max((float((one[name] - other).abs().max()) for one in moved), default=0.0)
        if not error <= max(close * float(other.abs().max()), known) + HARMLESS * max(largest, 1e-3):
            problems.append(f"{where} {name}: differs by {error:.1e} of {float(other.abs().max()):.1e}")
    return problems[:3]
