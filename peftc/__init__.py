"""peftc: a declarative graph compiler for parameter-efficient fine-tuning."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "passes").exists():  # run from a checkout, not installed
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from peftc.api import compile, plan, sites
    from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
    from peftc.distributed.fsdp import shard
    from peftc.distributed.tensor_parallel import tensor_parallel
    from peftc.distributed.unread import compile_sharded
    from peftc.driver.combining import combine
    from peftc.driver.compiled import CompiledModule
    from peftc.driver.loading import load, load_peft
    from peftc.planning.plan import Plan
    from peftc.spec.check import check

__version__ = "0.1.0"
__all__ = [
    "CompiledModule", "Diagnostic", "PeftcError", "Plan", "check", "combine", "compile", "compile_sharded", "load",
    "load_peft", "plan", "shard", "sites", "tensor_parallel",
]  # fmt: skip

_HOME = {
    "CompiledModule": "driver.compiled",
    "Diagnostic": "diagnostics.diagnostic",
    "PeftcError": "diagnostics.diagnostic",
    "Plan": "planning.plan",
    "check": "spec.check",
    "combine": "driver.combining",
    "compile": "api",
    "compile_sharded": "distributed.unread",
    "load": "driver.loading",
    "load_peft": "driver.loading",
    "plan": "api",
    "shard": "distributed.fsdp",
    "sites": "api",
    "tensor_parallel": "distributed.tensor_parallel",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `peftc --help` and `peftc check` do not wait for transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'peftc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peftc.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
