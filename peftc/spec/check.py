"""What can be done with a spec alone: read it, check it."""

from __future__ import annotations

from pathlib import Path

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.source import Source
from peftc.language import Spec, parse, parse_file
from peftc.spec.resolve import Intentions, resolve

SpecLike = Intentions | Spec | str | Path


def check(spec: Spec | str | Path) -> list[Diagnostic]:
    """Everything wrong with a spec that can be known without a model; an empty list if nothing is."""
    try:
        intend(spec)
    except PeftcError as error:
        return list(error.diagnostics)
    return []


def intend(spec: SpecLike) -> Intentions:
    """What a spec wants: a path ending in `.peft`, spec text, a parsed spec, or what this returned before.

    Raises:
        PeftcError: with everything that is wrong and can be known without a model.
    """
    return spec if isinstance(spec, Intentions) else resolve(as_spec(spec))


def as_spec(spec: Spec | str | Path) -> Spec:
    """A parsed spec from a path ending in `.peft` or from text."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Path) or (spec.endswith(".peft") and "\n" not in spec):
        return parse_file(spec)
    return parse(Source("<spec>", spec))
