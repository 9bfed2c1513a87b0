"""Is a compiled model what it says? Held against eager PyTorch, which knows nothing of peftc.

The reference of a method with a weight form is the base model itself, called with its weights as the method's
definition changes them, with gradients through that: `torch.func.functional_call`. Everything is compared in float32
to 1e-5 of the largest number of a tensor, and what float32 can't tell is asked again in float64.
"""

from __future__ import annotations

import copy
import inspect
import re
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftc
from peftc.capture.inputs import example_inputs
from peftc.graph.ir import get_attribute
from peftc.protocol.site import Projection
from sweep.tiny import NotBuilt, tiny_model


@dataclass(frozen=True)
class Spec:
    """A statement and the roles that it is for, those of them that a model has; `instead` where it has none."""

    statement: str
    roles: tuple[str, ...]
    instead: str | None = None

    def on(self, offered: Collection[str]) -> str | None:
        """As a spec for a model with these roles, None where there is nothing for it."""
        present = [role for role in self.roles if any(fnmatch(one, role) for one in offered)]
        what = ", ".join(present) or self.instead
        return None if what is None else self.statement.format(what)


SPECS = {
    "lora": Spec("apply lora(r=4) to {}", ("attn.q", "attn.v", "attn.o", "mlp.*"), "linear"),
    "linear": Spec("apply lora(r=4) to {}", ("linear",)),
    "prefix": Spec("apply prefix(length=4) to {}", ("attn",)),
    "adapter": Spec("apply adapter(size=8) to {}", ("attn", "mlp")),
    "ia3": Spec("apply ia3 to {}", ("attn.k", "attn.v", "mlp.down"), "linear"),
    "dora": Spec("apply dora(r=4) to {}", ("attn.q", "attn.v", "mlp.down"), "linear"),
    "prompt": Spec("apply prompt(length=4) to {}", ("embed",)),
    "norm": Spec("train {}", ("norm",)),
    "nf4": Spec("quantize linear except head with nf4\napply lora(r=4) to {} except head", ("linear",)),
}
STARTS_ELSEWHERE = ("prefix", "prompt", "nf4")  # not the base model at first
STRICT, ROUGH = 1e-5, 1e-4
IN_FLOAT64 = 1e-6  # models compute norms and angles in float32 all the same
HARMLESS = 1e-7  # of the largest: what is left of a gradient that cancels

Batch = dict[str, Any]


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
    try:
        made = example_inputs(copy.deepcopy(base))
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
                return verdict.add("not-built", f"eager: {type(error).__name__}: {error}".splitlines()[0][:200])
    start = time.process_time()
    try:
        text = SPECS[verdict.spec].on({role for site in peftc.sites(base) for role in site.roles})
        if text is None:
            return verdict.add("absent", f"there is no {' or '.join(SPECS[verdict.spec].roles)}")
        torch.manual_seed(0)
        compiled = peftc.compile(base, text)
    except peftc.PeftcError as error:
        return verdict.add("refused", _told(error))
    taken = compiled.plan.captured.example
    usable = [{name: one for name, one in batch.items() if name in taken.kwargs | taken.constants} for batch in usable]
    if (took := time.process_time() - start) > 20:
        verdict.reasons.append(f"compiled in {took:.0f} CPU seconds")
    verdict.islands = [island.path for island in compiled.plan.captured.islands]
    _shaken_and_compared(verdict, text, base, compiled, usable)
    for problem in wrong_roles(compiled):
        verdict.add("role", problem)


def _fails_on_text(base: PreTrainedModel) -> str | None:
    """What eager mode says of the plainest tokens, where a model reads."""
    if base.main_input_name != "input_ids":
        return None
    try:
        with torch.no_grad():
            _called(base, {"input_ids": torch.full((2, 8), 5)})
    except Exception as error:
        return f"eager: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _shaken_and_compared(
    verdict: Verdict, text: str, base: PreTrainedModel, compiled: Any, batches: list[Batch]
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
        again = peftc.compile(wide, text)
        fresh = [] if spec in STARTS_ELSEWHERE else _starts(wide, again, many, IN_FLOAT64)
        again.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in compiled.state_dict().items()})
        sure = fresh + _compared(spec, wide, again, many, IN_FLOAT64)
    except Exception:  # not in float64
        sure = _compared(spec, base, compiled, batches, ROUGH)
    for problem in sure:
        verdict.add("wrong", problem)


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


# ---- Batches -------------------------------------------------------------------------------------------------------


def varied(base: PreTrainedModel, example: Mapping[str, Any], rows: int, more: int, seed: int) -> Batch:
    """The example with other numbers: `rows` rows, texts longer by `more` tokens, padding in the first row."""
    random = torch.Generator().manual_seed(seed)
    text = example.get("input_ids")
    batch: Batch = {}
    for name, value in example.items():
        if not torch.is_tensor(value) or value.dim() == 0:
            batch[name] = value
            continue
        one = value
        if value.shape[0] == 2 and rows != 2:
            one = torch.cat([value, value[:1].expand(rows - 2, *value.shape[1:])])
        elif value.shape[0] % 2 == 0 and rows != 2:  # rows of patches, or images, of all texts in a row
            half = value[: value.shape[0] // 2]
            one = torch.cat([half] * rows)
        along_text = torch.is_tensor(text) and value.dim() >= 2 and value.shape[1] == text.shape[1]
        by_token = not value.is_floating_point() and value.dim() == 2
        if more and by_token and (along_text or "decoder" in name or name == "labels"):
            one = torch.cat([one, one[:, -1:].expand(-1, more)], 1)
        batch[name] = _drawn(base, name, one, random)
    mask = batch.get("attention_mask")
    if torch.is_tensor(mask) and mask.dim() == 2 and "input_ids" in batch and mask.shape == batch["input_ids"].shape:
        mask[0, -1 if base.config.is_encoder_decoder else 0] = 0
    return batch


def _drawn(base: PreTrainedModel, name: str, value: Tensor, random: torch.Generator) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=random).to(value.dtype)
    if name == "labels" and value.dim() == 1:
        return torch.randint(0, 2, value.shape, generator=random)
    if name in ("input_ids", "decoder_input_ids", "labels"):
        special = _special_tokens(base.config)
        drawn = torch.randint(4, 24, value.shape, generator=random)
        keep = torch.tensor([[int(t) in special or int(t) < 0 for t in row] for row in value.tolist()])
        return torch.where(keep, value, drawn)
    return value.clone()


def _special_tokens(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if type(value) is int and re.search("token_id|token_index", name):
            found.add(value)
        elif hasattr(value, "to_dict"):
            found |= _special_tokens(value)
    return found


# ---- Numbers -------------------------------------------------------------------------------------------------------


def _outputs(result: Any) -> dict[str, Tensor]:
    found = {name: result[name] for name in ("loss", "logits") if name in result and torch.is_tensor(result[name])}
    return found or {name: value for name, value in result.items() if torch.is_tensor(value)}


def _compared(spec: str, base: PreTrainedModel, compiled: Any, batches: list[Batch], close: float) -> list[str]:
    """What differs."""
    problems: list[str] = []
    by_weight = all(isinstance(b.site, Projection) and not b.method.unmergeable for b in compiled.plan.bindings)
    for training in (False, True):
        for place, batch in enumerate(batches):
            compiled.train(training)
            base.train(training)
            where = f"{'training' if training else 'shaken'}, batch {place}"
            torch.manual_seed(3)
            actual, gradients = _ask_with_gradients(compiled, batch)
            if spec != "nf4" and by_weight:
                torch.manual_seed(3)
                expected, theirs = _reference(base, compiled, batch)
                problems += _differences(where, actual, expected, close)
                problems += _differences(f"{where}, gradient of", gradients, theirs, close)
            elif not all(gradient.isfinite().all() for gradient in gradients.values()):
                problems.append(f"{where}: a gradient is not finite")
    base.eval()
    if by_weight and spec != "nf4":
        merged = compiled.eval().merge().eval()
        problems += _differences("merged", _ask(merged, batches[0]), _ask(compiled, batches[0]), close)
    return problems


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


def _reference(base: PreTrainedModel, compiled: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
        changed, shifted = binding.method.fold(site, weight[..., rows, :].clone(), part, state)
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


def _differences(where: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], close: float) -> list[str]:
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
        if not error <= close * float(other.abs().max()) + HARMLESS * max(largest, 1e-3):
            problems.append(f"{where} {name}: differs by {error:.1e} of {float(other.abs().max()):.1e}")
    return problems[:3]


# ---- Roles ---------------------------------------------------------------------------------------------------------

OBVIOUS = {
    "attn.q": r"(attn|attention)\w*\.(\w+\.)?(q_proj|query|q_lin|wq|to_q)$",
    "attn.k": r"(attn|attention)\w*\.(\w+\.)?(k_proj|key|k_lin|wk|to_k)$",
    "attn.v": r"(attn|attention)\w*\.(\w+\.)?(v_proj|value|v_lin|wv|to_v)$",
    "attn.o": r"(attn|attention)\w*\.(\w+\.)?(o_proj|out_proj|out_lin|wo|to_out)$",
    "mlp.gate": r"(mlp|ffn|feed_forward)\.(\w+\.)?(gate_proj|wi_0|w1_gate)$",
    "mlp.up": r"(mlp|ffn|feed_forward)\.(\w+\.)?(up_proj|fc1|dense_h_to_4h|c_fc|wi_1)$",
    "mlp.down": r"(mlp|ffn|feed_forward)\.(\w+\.)?(down_proj|fc2|dense_4h_to_h|wo)$",
}  # fmt: skip
NONE_OF_THESE = re.compile(r"(router|gate)$|(router|gate)\.(weight|proj|layer|classifier)$")


def wrong_roles(compiled: Any) -> list[str]:
    """Sites whose role and obvious name disagree."""
    problems = []
    for site in compiled.plan.sites:
        if not isinstance(site, Projection) or site.within or re.search(r"norm\w*\.mlp|indexer", site.name):
            continue
        named = {role for role, pattern in OBVIOUS.items() if re.search(pattern, site.name)}
        has = {role for role in site.roles if role.startswith(("attn.", "mlp."))}
        if named and not named & has:
            problems.append(f"{site.name} has the roles {sorted(has) or 'none'}, not {sorted(named)}")
        if NONE_OF_THESE.search(site.name) and has & {"attn.q", "attn.k", "attn.v", "attn.o"}:
            problems.append(f"{site.name} has the roles {sorted(has)}")
    return problems[:4]
