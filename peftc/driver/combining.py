"""Several adapters made one, by their numbers: folders of HF PEFT, and artifacts of peftc."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import language as ast
from peftc.capture.checkpoints.references import Reference
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.compiled import CompiledModule
from peftc.driver.loading import built, load, load_peft
from peftc.driver.planned import plan_model
from peftc.files import artifact
from peftc.files.adapters.pairs import Pairs, pairs_in, write_pairs
from peftc.files.adapters.sums import HOWS, SPARSE, How, Pair
from peftc.files.errors import CannotCombine
from peftc.files.folder import current
from peftc.files.hf_peft import folder as peft_folder
from peftc.files.hf_peft.spec import NOWHERE, applied, spec_of, trained
from peftc.graph.ir import get_attribute
from peftc.graph.surroundings import ordinary_tensors
from peftc.protocol.site import Projection
from peftc.spec.resolve import resolve


@dataclass(frozen=True)
class Combined:
    """One adapter of several, as it was written. `ranks`: those that it has, the smallest first."""

    folder: str
    kind: str  # "peft" or "artifact"
    how: str
    weights: list[float]
    modules: int
    ranks: list[int]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


@ordinary_tensors()
def combine(
    folders: Sequence[str | Path],
    to: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    model: nn.Module | str | Path | Reference | None = None,
    trust_remote_code: bool = False,
) -> Combined:
    """Makes one LoRA adapter of several, of which each counts by its weight; a negative one takes away.

    Args:
        folders: of the adapters. Where all of them are HF PEFT's no base model is read, and one of its folders is
            written; where one is peftc's own, an artifact is.
        to: the folder that is written.
        weights: one for each; 1 by default.
        how: with W the weights and scales together, linear: A is the sum of sqrt(W) A and B of sqrt(W) B; ties and
            magnitude_prune: the same with each matrix's largest numbers alone, and dare with random ones; cat: A and B
            side by side, whose product is the sum of all W B A, of the sum of all ranks; svd: the nearest to that.
        density: the part of the numbers that ties, dare and magnitude_prune keep, above 0 and at most 1.
        rank: of svd; the largest of all by default.
        seed: of dare.
        model: the base model of artifacts, or a reference to it; the one they were made on by default.
        trust_remote_code: Python code that the base model's folder or hub id comes with may run.

    Raises:
        PeftcError: `cannot-combine` with all that stands in the way; what `peftc.load` and `peftc.load_peft` say of
            folders; `bad-artifact` and `cannot-write` as for `save`.
    """
    places = [Path(folder) for folder in folders]
    factors = [1.0] * len(places) if weights is None else [float(weight) for weight in weights]
    if problems := [*_misused(places, factors, how, density, rank)]:
        raise PeftcError(*problems)
    generator = torch.Generator().manual_seed(seed)
    own = [current(place, artifact.MANIFEST).exists() for place in places]
    if not any(own):
        files = [peft_folder.read_files(place) for place in places]
        adapters = [pairs_in(place, one) for place, one in zip(places, files, strict=True)]
    else:
        loaded = _loaded(places, own, model, trust_remote_code)
        adapters = [_pairs_of(place, compiled) for place, compiled in zip(places, loaded, strict=True)]
    if problems := [*_unlike(places, adapters, how)]:
        raise PeftcError(*problems)
    largest = max((pair.rank for adapter in adapters for pair in adapter.pairs.values()), default=0)
    made = _together(adapters, factors, How(how, density or 1.0, rank or largest, generator))
    if any(own):
        first = places[own.index(True)]
        _artifact(loaded[own.index(True)], artifact.read(first), made).save(to)
    else:
        write_pairs(Path(to), made, [one.config for one in files])
    ranks = sorted({pair.rank for pair in made.pairs.values()})
    return Combined(str(to), "artifact" if any(own) else "peft", how, factors, len(made.pairs), ranks)


def _misused(
    places: list[Path], weights: list[float], how: str, density: float | None, rank: int | None
) -> Iterator[CannotCombine]:
    """What is wrong whatever the folders hold."""
    if not places:
        yield CannotCombine(folder="", reason="there is no adapter")
    if how not in HOWS:
        yield CannotCombine(folder="", reason=f"there is no way called {how}", hint=f"one of {', '.join(HOWS)}")
    if len(weights) != len(places):
        reason = f"there are {len(weights)} weights for {len(places)} adapters"
        yield CannotCombine(folder="", reason=reason, hint="one weight for each, in their order")
    if how in SPARSE and (density is None or not 0 < density <= 1):
        reason = f"{how} needs a density, above 0 and at most 1: the part of the numbers that it keeps"
        yield CannotCombine(folder="", reason=reason)
    if density is not None and how not in SPARSE:
        yield CannotCombine(folder="", reason=f"{how} has no density", hint=f"{', '.join(SPARSE)} have one")
    if rank is not None and (how != "svd" or rank < 1):
        yield CannotCombine(folder="", reason="a rank, of at least 1, is for svd", hint="the others have A's and B's")


def _unlike(places: list[Path], adapters: list[Pairs], how: str) -> Iterator[CannotCombine]:
    """What does not go together in the adapters."""
    first: dict[str, tuple[Path, Pair]] = {}
    learned: dict[str, tuple[Path, Tensor]] = {}
    for place, adapter in zip(places, adapters, strict=True):
        if not adapter.pairs:
            yield CannotCombine(folder=str(place), reason="it has no pair of thin matrices")
        for module, pair in adapter.pairs.items():
            before, other = first.setdefault(module, (place, pair))
            sides = [(one.a.shape[-1], one.b.shape[-2]) for one in (other, pair)]
            if sides[0] != sides[1]:
                reason = f"{module} has {sides[1]} inputs and outputs, and {sides[0]} in '{before}'"
                yield CannotCombine(folder=str(place), reason=reason, hint="they were made on other base models")
                break
            if other.rank != pair.rank and how not in ("cat", "svd"):
                reason = f"{how} adds matrices of one rank: {module} has {pair.rank}, and {other.rank} in '{before}'"
                yield CannotCombine(folder=str(place), reason=reason, hint="cat and svd take any")
                break
        for name, tensor in adapter.learned.items():
            before, whole = learned.setdefault(name, (place, tensor))
            if whole is not tensor and not (whole.shape == tensor.shape and torch.equal(whole, tensor)):
                reason = f"it has a {name} of its own, and so has '{before}': no sum is made of what was trained whole"
                yield CannotCombine(folder=str(place), reason=reason)
                break


def _together(adapters: list[Pairs], weights: list[float], how: How) -> Pairs:
    """One adapter: at each module those that are there."""
    modules = {module for adapter in adapters for module in adapter.pairs}
    pairs = {}
    for module in sorted(modules, key=_by_number):
        there = [
            (adapter.pairs[module], w) for adapter, w in zip(adapters, weights, strict=True) if module in adapter.pairs
        ]
        pairs[module] = how.combined([pair for pair, _ in there], [weight for _, weight in there])
    return Pairs(pairs, {name: tensor for adapter in adapters for name, tensor in adapter.learned.items()})


def _by_number(module: str) -> list[tuple[int, str]]:
    """An order of names in which layer 10 comes behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _loaded(places: list[Path], own: list[bool], model: Any, trusted: bool) -> list[CompiledModule]:
    """All of them on one base model: that of the first artifact, where none is given."""
    first = own.index(True)
    begun = load(places[first], model, trust_remote_code=trusted)
    return [
        begun if at == first else (load if is_own else _of_peft)(place, begun.base)
        for at, (place, is_own) in enumerate(zip(places, own, strict=True))
    ]


def _of_peft(folder: Path, model: nn.Module) -> CompiledModule:
    return load_peft(model, folder)


def _pairs_of(folder: Path, compiled: CompiledModule) -> Pairs:
    """The pairs of a compiled model whose one method is LoRA.

    Raises:
        PeftcError: `cannot-combine`, once a statement.
    """
    plan, pairs, problems = compiled.plan, dict[str, Pair](), dict[Any, CannotCombine]()
    reason = "it has several tasks: save(task=…) writes one" if compiled.tasks else ""
    reason = "its frozen weights are packed" if plan.packed else reason
    if reason:
        raise PeftcError(CannotCombine(folder=str(folder), reason=reason))
    for binding in plan.bindings:
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        branch = binding.method.low_rank(binding.site, state) if "A0" not in state else None
        if branch is None or not isinstance(binding.site, Projection):
            reason = f"no sum is made of {binding.method!r}"
            problems[binding.statement] = CannotCombine(folder=str(folder), reason=reason, span=binding.span)
        else:
            pairs[binding.site.name] = Pair(branch.a, branch.b, branch.scale)
    if problems:
        raise PeftcError(*problems.values())
    return Pairs(pairs, {name: get_attribute(compiled, name).detach() for name in plan.trained})


def _artifact(compiled: CompiledModule, saved: artifact.Artifact, made: Pairs) -> CompiledModule:
    """The base model of an artifact compiled with what was combined."""
    sites = {site.name: site for site in compiled.plan.sites}
    by_rank: dict[int, list[str]] = {}
    for name, pair in made.pairs.items():
        by_rank.setdefault(pair.rank, []).append(name)
    statements: list[ast.Statement] = [
        applied("lora", {"r": rank, "alpha": float(rank)}, [_selecting(sites[name]) for name in names])
        for rank, names in by_rank.items()
    ]
    spec = spec_of("combined", [*statements, *map(trained, made.learned)])
    plan = plan_model(compiled.base, resolve(spec), saved.example(compiled.base), Timings())
    state: dict[str, Tensor] = dict(made.learned)
    for binding in plan.bindings:
        pair = made.pairs[binding.site.name]
        state |= {binding.names["A"]: pair.a, binding.names["B"]: pair.b}
    return built(saved.folder, plan, state)


def _selecting(site: Any) -> ast.Selector | str:
    """What means one site alone: its name, or of the rows of a fused weight the weight's name and the rows' role."""
    if site.rows is None:
        return str(site.name)
    role = next(role for role in site.roles if role.startswith("attn."))
    return ast.Intersect(
        (ast.Glob(site.path, span=NOWHERE), ast.Role(tuple(role.split(".")), span=NOWHERE)), span=NOWHERE
    )
