"""What a folder of HF PEFT means, as the text of a spec: of its files alone, no base model is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftc import language as ast
from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact
from peftc.files.hf_peft import biases, groups
from peftc.files.hf_peft.folder import Files, obeyed
from peftc.files.hf_peft.names import Names, grouped
from peftc.files.hf_peft.norms import COPY, NORMS
from peftc.files.hf_peft.saved import PREFIX, SAVED, TYING, entries_of, without_adapter_name
from peftc.files.hf_peft.sequences.prefix import KIND, KINDS, PARTS
from peftc.files.hf_peft.sequences.prompt import PROMPTS, TENSOR, embeddings
from peftc.files.hf_peft.spec import NOWHERE, OF_THE_WEIGHT, applied, of_kind, spec_of, unknown
from peftc.files.hf_peft.tokens import KIND as TOKENS
from peftc.files.hf_peft.tokens import chosen_by
from peftc.protocol.method import methods

# Settings that narrow what a list of names means.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
ROOT = "base_model."
WRAPPED_BIAS = ".base_layer.bias"
COPIES = (".base_layer.weight", WRAPPED_BIAS)  # of the base model's own, beside what adapts it


def converted(place: Path, files: Files) -> str:
    """The text of a spec, with comments where the folder says something that no spec does.

    Raises:
        PeftcError: `bad-artifact` where peftc has not what the folder holds.
    """
    bad = partial(BadArtifact, folder=str(place))
    kind = files.config.get("peft_type")
    read = [cls.obeyed() for cls in of_kind(KIND if kind in KINDS else kind)]
    if not read and kind != NORMS:
        raise PeftcError(bad(reason=f"its peft_type={kind} is none that peftc has"))
    if option := unknown(files.config, {SAVED, TYING}.union(*read)):
        raise PeftcError(bad(reason=f"its {option} is none that peftc has"))
    with obeyed(bad, files.config):
        statements = _statements(place, files, kind)
        text = ast.unparse(spec_of(place.name, statements)).rstrip()
    return "\n".join([*_comments(place, files.config), text, ""])


def _comments(place: Path, config: Mapping[str, Any]) -> list[str]:
    lines = [f"what {place.name} holds, HF PEFT's {config.get('peft_type')}"]
    lines += [f"base model: {name}" for name in [config.get("base_model_name_or_path")] if name]
    lines += [f"for: {kind}" for kind in [config.get("task_type")] if kind]
    started = config.get("init_lora_weights", True)
    if started not in (True, False, None, "mica", *OF_THE_WEIGHT):
        lines.append(f"no counterpart: init_lora_weights={started}, by which it started")
    for name in ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "revision"):
        if config.get(name):
            lines.append(f"no counterpart: {name}={config[name]}")
    return [f"# {' '.join(line.split())}" for line in lines]


def _statements(place: Path, files: Files, kind: Any) -> list[ast.Statement]:
    config, tensors = {**files.config}, without_adapter_name(nn.Module(), files.tensors)
    learns = config.get(biases.SETTING) not in (None, biases.NONE)
    wrapped = [key.removesuffix(WRAPPED_BIAS) + biases.END for key in tensors if learns and key.endswith(WRAPPED_BIAS)]
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(COPIES)}

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadArtifact(folder=str(place), reason=reason))

    if kind == TOKENS:
        return [chosen_by(config)]
    if kind in PROMPTS or kind in KINDS:
        own, is_prefix = embeddings(config, tensors, bad), kind in KINDS
        width = 2 * int(config["token_dim"]) if is_prefix else 0
        state = dict(zip(PARTS, own[:, :width].chunk(2, 1), strict=True)) if is_prefix else {TENSOR: own}
        name, settings = next(
            (cls.name, found[0])
            for cls in of_kind(KIND if is_prefix else PROMPTS[0])
            if (found := cls.from_peft(config, "", state)) is not None
        )
        rest = [key.removeprefix(ROOT) for key in tensors if key != TENSOR]
        return [applied(name, _plain(name, settings), role="attn" if is_prefix else ""), *_trained(rest)]
    names = [key.removeprefix(PREFIX) for key in tensors if key.startswith(PREFIX)]
    if kind == NORMS:
        return _trained(name.replace(COPY, ".") for name in names)
    adapted, rest = _adapted(config, tensors, kind)
    if not adapted:
        raise bad(f"what it holds ({', '.join(sorted(tensors)[:3])}) is no {kind} that peftc has")
    narrowed = any(config.get(name) not in (None, [], {}) for name in NARROWING) or len(adapted) > 1
    whole = isinstance(config.get("target_modules"), list) and not narrowed and not config.get(SAVED)
    made: list[ast.Statement] = []
    for (name, given, _), modules in adapted.items():
        chosen = [f"**.{_one_of(config['target_modules'])}"] if whole else _globs(modules)
        selectors = [ast.Glob(glob, span=NOWHERE) for glob in chosen]
        made.append(applied(name, _plain(name, dict(given)), selectors))
    ends = tuple(entries_of(config))
    odd = [key for key in rest if not _is_saved(key, ends) and not key.endswith((".bias", "embed_tokens.weight"))]
    shared = {ROOT + theirs for cls in of_kind(kind) for theirs in (*cls.peft_shared, *cls.peft_numbered)}
    if odd := [key for key in odd if key not in shared and key.rpartition(".")[0] not in shared]:
        raise bad(f"its {odd[0]} belongs to nothing that peftc has")
    return [*made, *_trained(key.removeprefix(PREFIX) for key in (*rest, *wrapped) if key.startswith(PREFIX))]


Found = dict[tuple[str, tuple[tuple[str, Any], ...], str], list[str]]


def _adapted(config: dict[str, Any], tensors: Mapping[str, Tensor], kind: Any) -> tuple[Found, list[str]]:
    """The modules of each method with its settings, those apart that share apart, and the keys that are of none."""
    names, found, rest = Names(nn.Module(), config), defaultdict[Any, list[str]](list), {*tensors}
    inside: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        for end in range(1, len(parts)) if key.startswith(PREFIX) else ():
            inside[".".join(parts[:end])][".".join(parts[end:])] = tensor
    for module, own in sorted(inside.items(), key=lambda item: -item[0].count(".")):
        if not all(f"{PREFIX}{module}.{name}" in rest for name in own):
            continue
        for cls in of_kind(kind):
            settings = names.settings(module, cls.peft_patterns)
            known = cls.from_peft(settings, module, own)
            if known is not None and own:
                apart = groups.entry(config, module) if cls.peft_apart else ""
                found[cls.name, tuple(known[0].items()), apart].append(module)
                rest -= {f"{PREFIX}{module}.{name}" for name in own}
                break
    return found, [key for key in tensors if key in rest]


def _plain(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that are not the method's own defaults."""
    cls = methods()[name]
    return {key: value for key, value in settings.items() if key == "r" or cls.parameters[key].default != value}


def _is_saved(key: str, ends: tuple[str, ...]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(ends) for end in range(2, len(parts))) if ends else False


def _trained(parameters: Iterable[str]) -> list[ast.Statement]:
    """`train` for whole parameters."""
    globs = [ast.Glob(glob, span=NOWHERE) for glob in _globs([*parameters])]
    if not globs:
        return []
    return [ast.Train(globs[0] if len(globs) == 1 else ast.Union(tuple(globs), span=NOWHERE), span=NOWHERE)]


def _globs(names: list[str]) -> list[str]:
    """Patterns that mean these names and no other."""
    found = [(before, _one_of(numbers), _one_of(afters)) for before, numbers, afters in grouped(names)]
    return [".".join(filter(None, parts)) for parts in found]


def _one_of(choices: list[str]) -> str:
    """A choice of texts, numbers in their order; none of none."""
    chosen = sorted({choice for choice in choices if choice}, key=lambda text: (text.isdigit(), text.zfill(9), text))
    return chosen[0] if len(chosen) == 1 else f"{{{','.join(chosen)}}}" if chosen else ""
