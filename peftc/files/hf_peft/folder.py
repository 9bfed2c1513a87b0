"""HF PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, written and read.

A folder of HF PEFT holds one method on whole modules. What does not fit that is refused, not approximated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from peftc.capture.checkpoints.ondisk import read_tensors
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.reading import read_file
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.folder import current, steadily, write_folder
from peftc.files.hf_peft.card import CARD, card, is_ours
from peftc.files.hf_peft.modules import ModulesReader, modules_folder
from peftc.files.hf_peft.norms import NORMS, has_norms, norms_folder, read_norms
from peftc.files.hf_peft.places.layers import unfit
from peftc.files.hf_peft.saved import (
    SAVED,
    TYING,
    Saved,
    entries_of,
    read_saved,
    saved_modules,
    without_adapter_name,
)  # fmt: skip
from peftc.files.hf_peft.sequences.prefix import KIND, KINDS, has_prefix, prefix_folder, read_prefix
from peftc.files.hf_peft.sequences.prompt import PROMPTS, has_prompt, prompt_folder, read_prompt
from peftc.files.hf_peft.spec import NAMING, of_kind, spec_of, unknown
from peftc.files.hf_peft.tokens import KIND as TOKENS
from peftc.files.hf_peft.tokens import has_tokens, read_tokens, tokens_folder
from peftc.language import Spec
from peftc.planning.plan import Binding, Plan
from peftc.protocol.site import Projection
from peftc.runtime.module import Runtime

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
REWRITE = "peft.PeftModel.from_pretrained(model, folder).save_pretrained(folder) writes safetensors in its place"
LARGEST_CONFIG = 4 << 20  # bytes


def save_pretrained(compiled: Runtime, folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained(base, folder)` reads, and a model card where there is none of others.

    Raises:
        PeftcError: `cannot-export`, once a statement, where HF PEFT has no such adapter; `not-in-spec`, `bad-artifact`
            and `cannot-write` as for `save`.
    """
    config, tensors = exported(compiled)
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    files = {TENSORS: blob, CONFIG: json.dumps(config, indent=2).encode()}
    if is_ours(folder):
        files[CARD] = card(compiled, config).encode()
    write_folder(folder, files)


def exported(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors that HF PEFT has for the adapter; of a model on the meta device they have no numbers.

    Raises:
        PeftcError: `cannot-export` and `not-in-spec` as for `save_pretrained`.
    """
    compiled.watch.refuse_unplanned(compiled)
    if has_norms(compiled):
        return norms_folder(compiled)
    if problems := _problems(compiled):
        raise PeftcError(*problems)
    if has_tokens(compiled):
        return tokens_folder(compiled)
    if has_prompt(compiled):
        return prompt_folder(compiled)
    if has_prefix(compiled):
        return prefix_folder(compiled)
    settings, tensors = saved_modules(compiled)
    return modules_folder(compiled, settings, tensors)


@dataclass(frozen=True)
class Adapter:
    """What a folder of HF PEFT means: a spec, and the compiled model's tensors once the spec is planned.

    `state` may raise a PeftcError `bad-artifact`.
    """

    spec: Spec
    state: Callable[[Plan], dict[str, Tensor]]


@dataclass(frozen=True)
class Files:
    """What the two files of a folder hold, as it is there."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read(model: nn.Module, folder: Path, files: Files | None = None) -> Adapter:
    """The adapter that HF PEFT saved at `folder`, for a base model; `files` where they have been read.

    Raises:
        PeftcError: `bad-artifact` if the folder is incomplete, or holds a method or an option peftc does not have.
    """
    files = read_files(folder) if files is None else files
    config, tensors = {**files.config}, files.tensors
    bad = partial(BadArtifact, folder=str(folder))
    kind = config.get("peft_type")
    read = [cls.obeyed() for cls in of_kind(KIND if kind in KINDS else kind)]
    if not read and kind != NORMS:
        raise PeftcError(bad(reason=f"its peft_type={kind} is none that peftc has"))
    by_modules = kind not in (*PROMPTS, KIND)
    if by_modules:
        try:
            config |= {SAVED: entries_of(config)}
        except ValueError as error:
            raise PeftcError(bad(reason=f"its {error} is none that peftc has")) from None
    saving = {SAVED, TYING} if config.get(SAVED) and by_modules else set[str]()
    if option := unknown(config, saving.union(*read)):
        raise PeftcError(bad(reason=f"its {option} is none that peftc has"))
    saved = Saved()
    with obeyed(bad, config):
        tensors = without_adapter_name(model, tensors)
        if by_modules:
            saved = read_saved(model, bad, config, tensors)
            tensors = saved.rest
        if kind in PROMPTS:
            statements, state = read_prompt(model, folder, config, tensors)
        elif kind == NORMS:
            statements, state = read_norms(model, bad, config, tensors)
        elif kind == TOKENS:
            statements, state = read_tokens(model, bad, config, tensors)
        elif kind in KINDS:
            statements, state = read_prefix(folder, config, tensors)
        else:
            statements, state = ModulesReader(model, bad, config, saved.learned.keys()).read(tensors)
        spec = spec_of(f"{folder.name}/{CONFIG}", [*statements, *saved.statements])
    return Adapter(
        spec, obeyed(bad, config)(lambda plan: {**(saved.state(plan) if saved.learned else {}), **state(plan)})
    )


def read_files(folder: Path) -> Files:
    """The settings and tensors of a folder of HF PEFT, as they are there.

    Raises:
        PeftcError: `bad-artifact` if one of the files is missing or damaged.
    """
    return steadily(folder, (CONFIG, TENSORS), lambda: _read(folder))


@contextmanager
def obeyed(bad: Callable[..., BadArtifact], config: dict[str, Any]) -> Iterator[None]:
    """What obeying settings may raise, as a PeftcError `bad-artifact`: an odd value ends in any of Python's errors."""
    try:
        yield
    except PeftcError:
        raise
    except TimeoutError:
        patterns = ", ".join(sorted(name for name in config if name in NAMING or name.endswith("_pattern")))
        raise PeftcError(bad(reason=f"matching its {patterns} takes too long")) from None
    except Exception as error:
        raise PeftcError(bad(reason=f"its settings are damaged ({type(error).__name__}: {error})")) from None


def _problems(compiled: Runtime) -> list[CannotExport]:
    found: dict[Any, CannotExport] = {}
    first = compiled.plan.bindings[0].method if compiled.plan.bindings else None
    for binding in compiled.plan.bindings:
        if (reason := _reason(compiled.base, binding, type(first))) and binding.statement not in found:
            found[binding.statement] = CannotExport(reason=reason, span=binding.span)
    if has_prefix(compiled):
        for span in compiled.plan.trained.values():
            reason = "beside a prefix it holds no parameters of the base model"
            found.setdefault(span, CannotExport(reason=reason, span=span))
    return list(found.values())


def _reason(base: nn.Module, binding: Binding, first: type[Any]) -> str | None:
    if binding.method.peft_type is None:
        return f"it has no {binding.method!r}"
    if reason := binding.method.unexportable(binding.site):
        return reason
    if type(binding.method) is not first:
        return f"one folder holds one method, and {first.name} comes first"
    site = binding.site
    if isinstance(site, Projection) and site.rows is not None:
        return f"it adapts whole modules, and {site.name} is a part of one"
    return unfit(base, site) if isinstance(site, Projection) else None


def _read(folder: Path) -> Files:
    try:
        config = json.loads(read_file(current(folder, CONFIG), LARGEST_CONFIG))
        if not current(folder, TENSORS).exists() and (folder / PICKLED).exists():
            raise ValueError(f"it has {PICKLED}, a pickle, which peftc does not read: {REWRITE}")
        tensors = read_tensors(current(folder, TENSORS))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no settings")
        return Files(config, tensors)
    except (OSError, ValueError, RecursionError) as error:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"{type(error).__name__}: {error}")) from None
