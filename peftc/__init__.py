"""peftc: a declarative graph compiler for parameter-efficient fine-tuning."""

from pathlib import Path

if not (Path(__file__).parent / "passes").exists():  # run from a checkout, not installed
    __path__.append(str(Path(__file__).parent.parent))

from peftc.api import check, compile, plan, sites
from peftc.checkpoint import load
from peftc.errors import Diagnostic, PeftcError
from peftc.module import CompiledModule
from peftc.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "CompiledModule", "Diagnostic", "PeftcError", "Plan", "check", "compile", "load", "plan", "sites",
]  # fmt: skip
