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
from peftc.files.hf_peft.modules import ModulesReader, modules_folder, unfit
from peftc.files.hf_peft.prefix import KIND, has_prefix, prefix_folder, read_prefix
from peftc.files.hf_peft.prompt import PROMPTS, has_prompt, prompt_folder, read_prompt
from peftc.files.hf_peft.spec import NAMING, of_kind, spec_of, unknown
from peftc.language import Spec
from peftc.planning.plan import Binding, Plan
from peftc.protocol.site import Projection
from peftc.runtime.module import Runtime

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
LARGEST_CONFIG = 4 << 20  # bytes


def save_pretrained(compiled: Runtime, folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained(base, folder)` reads.

    Raises:
        PeftcError: `cannot-export`, once a statement, where HF PEFT has no such adapter; `not-in-spec`, `bad-artifact`
            and `cannot-write` as for `save`.
    """
    config, tensors = exported(compiled)
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    files = {TENSORS: blob, CONFIG: json.dumps(config, indent=2).encode()}
    write_folder(folder, files)


def exported(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors that HF PEFT has for the adapter; of a model on the meta device they have no numbers.

    Raises:
        PeftcError: `cannot-export` and `not-in-spec` as for `save_pretrained`.
    """
    compiled.watch.refuse_unplanned(compiled)
    problems = _problems(compiled)
    if problems:
        raise PeftcError(*problems)
    if has_prompt(compiled):
        return prompt_folder(compiled)
    if has_prefix(compiled):
        return prefix_folder(compiled)
    return modules_folder(compiled)


@dataclass(frozen=True)
class Adapter:
    """What a folder of HF PEFT means: a spec, and the compiled model's tensors once the spec is planned.

    `state` may raise a PeftcError `bad-artifact`.
    """

    spec: Spec
    state: Callable[[Plan], dict[str, Tensor]]


def read(model: nn.Module, folder: Path) -> Adapter:
    """The adapter that HF PEFT saved at `folder`, for a base model.

    Raises:
        PeftcError: `bad-artifact` if the folder is incomplete, or holds a method or an option peftc does not have.
    """
    config, tensors = steadily(folder, (CONFIG, TENSORS), lambda: _read(folder))
    bad = partial(BadArtifact, folder=str(folder))
    kind = config.get("peft_type")
    read = [{*cls.peft_settings, *cls.peft_patterns.values()} for cls in of_kind(kind)]
    if not read:
        raise PeftcError(bad(reason=f"its peft_type={kind} is none that peftc has"))
    if option := unknown(config, set.union(*read)):
        raise PeftcError(bad(reason=f"its {option} is none that peftc has"))
    with _obeyed(bad, config):
        if kind in PROMPTS:
            statements, state = read_prompt(model, folder, config, tensors)
        elif kind == KIND:
            statements, state = read_prefix(folder, config, tensors)
        else:
            statements, state = ModulesReader(model, bad, config).read(tensors)
        spec = spec_of(f"{folder.name}/{CONFIG}", statements)
    return Adapter(spec, _obeyed(bad, config)(state))


@contextmanager
def _obeyed(bad: Callable[..., BadArtifact], config: dict[str, Any]) -> Iterator[None]:
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
    for span in compiled.plan.trained.values():
        found.setdefault(span, CannotExport(reason="it holds no parameters of the base model", span=span))
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads(read_file(current(folder, CONFIG), LARGEST_CONFIG))
        tensors = read_tensors(current(folder, TENSORS))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no settings")
        return config, tensors
    except (OSError, ValueError, RecursionError) as error:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"{type(error).__name__}: {error}")) from None
