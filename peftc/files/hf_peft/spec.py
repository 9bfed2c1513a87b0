"""Settings of a folder -> statements of the language. They are values: none of them ever becomes text that is read.

A setting that nothing here knows may mean another model: what is not known to mean nothing, and not read, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftc import language as ast
from peftc.diagnostics.source import Source, Span
from peftc.protocol.method import Method, methods

NOWHERE = Span(Source("", ""), 0, 0)
# What HF PEFT's folders say that changes nothing of what tensors mean once they are there, whatever it is: where they
# come from and what is done with them, how they started, and what only says more about another setting.
IDLE = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
    "corda_config", "eva_config", "init_ia3_weights", "init_logits_std", "init_vector_bank_bound", "init_weights",
    "lora_ga_config", "loftq_config",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
})  # fmt: skip
# Which modules are meant: `hf_peft/names.py` reads these.
NAMING = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "target_parameters"})
# Starts of LoRA by which the frozen weight is what they have left of it: HF PEFT works that out as it loads a folder.
OF_THE_WEIGHT = ("pissa", "olora")
# Of others, what is as good as nothing. The other starts of LoRA that are here leave the base model's weights alone.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, "gaussian", "eva", "mica", "orthogonal", *OF_THE_WEIGHT),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
}


# Of further ones the folder is half: A and B stand beside weights that the start changed, by data or by random numbers.
CHANGED = ("corda", "lora_ga", "loftq", "pissa_niter")


def of_kind(kind: Any) -> list[type[Method]]:
    """The methods that HF PEFT keeps in folders of a `peft_type`."""
    return [cls for cls in methods().values() if cls.peft_type is not None and cls.peft_type == kind]


def unknown(config: Mapping[str, Any], read: Iterable[str]) -> str | None:
    """A setting by which tensors may mean something else than peftc's, as words; `read` are those that it obeys."""
    known = IDLE | NAMING | {*read}
    for name, given in config.items():
        if name not in known and given not in (None, False, *PLAIN.get(name, ())):
            half = name == "init_lora_weights" and str(given).startswith(CHANGED)
            return f"{name}={given}" + (" (beside weights that this start has changed, and it lacks)" if half else "")
    return None


def spec_of(name: str, statements: Iterable[ast.Statement]) -> ast.Spec:
    """The statements as a spec, whose text, for diagnostics to point at, is made of them; `name` is its source's.

    Raises:
        PeftcError: where a statement cannot be said in the language.
        ValueError: where it would say something else.
    """
    made = ast.Spec(tuple(statements), NOWHERE.source, span=NOWHERE)
    read = ast.parse(Source(name, ast.unparse(made)))
    if read != made:
        raise ValueError("a setting cannot be said in the language")
    return read


def applied(
    method: str, settings: Mapping[str, Any], modules: Iterable[str | ast.Selector] = (), role: str = ""
) -> ast.Apply:
    """`apply METHOD(…) to "module", …`, or to a role, or to the whole input; settings of None are left out."""
    args = tuple(
        ast.Arg(ast.Name(name, span=NOWHERE), _value(name, given), span=NOWHERE)
        for name, given in settings.items()
        if given is not None
    )
    call = ast.Call(ast.Name(method, span=NOWHERE), args, span=NOWHERE)
    named = [_named(module) if isinstance(module, str) else module for module in modules]
    target = _together(named) if named else ast.Role(tuple(role.split(".")), span=NOWHERE) if role else None
    return ast.Apply(call, target, span=NOWHERE)


def trained(parameter: str) -> ast.Train:
    """`train "parameter"`."""
    return ast.Train(_named(parameter), span=NOWHERE)


def _together(items: list[ast.Selector]) -> ast.Selector:
    return items[0] if len(items) == 1 else ast.Union(tuple(items), span=NOWHERE)


def _named(name: str) -> ast.Selector:
    """A name that means itself."""
    if any(char in name for char in "*{},"):
        raise ValueError(f"{name!r} is no name of a module")
    return ast.Glob(name, span=NOWHERE)


def _value(name: str, given: Any) -> ast.Value:
    match given:
        case bool():
            return ast.Bool(given, span=NOWHERE)
        case int() | float():
            return ast.Number(given, span=NOWHERE)
        case str():
            return ast.String(given, span=NOWHERE)
    raise ValueError(f"{name} is {given!r}")
