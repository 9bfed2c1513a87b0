"""What can be done with a spec alone: read it, check it."""

from __future__ import annotations

from pathlib import Path

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, in_file_order
from peftc.diagnostics.source import Source
from peftc.language import Spec
from peftc.language.parse import Reading, read, read_file
from peftc.spec import errors as say
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
        PeftcError: with everything that is wrong and can be known without a model: of a text with mistakes what could
            be read is looked at, too.
    """
    if isinstance(spec, Intentions):
        return spec
    return understood(Reading(spec) if isinstance(spec, Spec) else _read(spec))


def understood(reading: Reading) -> Intentions:
    """The same of what could be read of a text."""
    try:
        found = resolve(reading.spec)
    except PeftcError as error:
        problems = [problem for problem in error.diagnostics if not _follows(problem, reading.lost)]
        raise PeftcError(*in_file_order([*reading.problems, *problems])) from None
    reading.whole()
    return found


def as_spec(spec: Spec | str | Path) -> Spec:
    """A parsed spec from a path ending in `.peft` or from text."""
    return spec if isinstance(spec, Spec) else _read(spec).whole()


def _read(spec: str | Path) -> Reading:
    if isinstance(spec, Path) or (spec.endswith(".peft") and "\n" not in spec):
        return read_file(spec)
    return read(Source("<spec>", spec))


def _follows(problem: Diagnostic, lost: frozenset[str | None]) -> bool:
    """Whether a name is unknown only because what would define it could not be read."""
    named = isinstance(problem, say.UnknownMethod | say.UnknownRole | say.UnknownStack)
    return named and (None in lost or problem.name in lost)  # type: ignore[attr-defined]
