"""Why: what a statement matches and what its filters leave out, what a place is and by which evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from peftc import language as ast
from peftc.diagnostics.diagnostic import PeftcError, listed, suggest
from peftc.diagnostics.source import Span
from peftc.driver.errors import NothingToExplain
from peftc.planning.plan import Fitted
from peftc.planning.select import Selection
from peftc.protocol.site import Projection, Site
from peftc.protocol.sites import Sites
from peftc.show.evidence import evidence
from peftc.spec.resolve import Intentions
from peftc.spec.solved import chosen_for


@dataclass(frozen=True)
class Reason:
    """One place: its roles, why it has them, and the lines of the spec that reach it."""

    name: str
    roles: tuple[str, ...]
    facts: dict[str, Any]
    evidence: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Matched:
    """One statement: the places that it names, and what each of its filters leaves out of what stands before it.

    A `fit` names none; `note` says what it comes to.
    """

    statement: str
    file: str
    line: int
    places: tuple[str, ...]
    left_out: dict[str, tuple[str, ...]]
    note: str = ""


class Explainer:
    """Says why, of a spec on the places of a model.

    Raises:
        PeftcError: where the spec names something that the model does not have, or there is nothing at what is asked.
    """

    def __init__(self, sites: Sites, intentions: Intentions, fitted: Iterable[Fitted] = ()) -> None:
        """`intentions`: of a spec whose `fit` statements were solved; `fitted`: what was chosen for each."""
        self.sites = sites
        self.fitted = tuple(fitted)
        self.select = Selection(sites)
        self.targets = dict(_targets(intentions))
        self.matched = {span: {site.name for site in self._sites(target)} for span, target in self.targets.items()}
        if problems := self.select.problems:
            raise PeftcError(*dict.fromkeys(problems))

    def _sites(self, selector: ast.Selector) -> list[Site]:
        return self.select(selector, parameters=True)

    def line(self, number: int | None, file: str | None = None) -> list[Matched]:
        """The statements of one line, of one file or each, or all statements."""
        spans = [span for span in self.targets if self._is_at(span, number, file)]
        fits = [fit for fit in self.fitted if self._is_at(fit.span, number, file)]
        if not spans and not fits:
            asked = "any line" if number is None else f"line {number}"
            named = str(number) if self._named(str(number)) else None
            raise PeftcError(NothingToExplain(asked=asked, has="no statement that names places", place=named))
        return [*map(self._statement, spans), *(one for fit in fits for one in self._fit(fit, number is None))]

    @staticmethod
    def _is_at(span: Span, number: int | None, file: str | None) -> bool:
        return number is None or (span.line <= number <= span.end_line and file in (None, span.source.name))

    def _fit(self, fit: Fitted, chosen_too: bool) -> Iterator[Matched]:
        """What a `fit` comes to; and the statements that it chose, unless they are among the others."""
        yield Matched(fit.statement, fit.span.source.name, fit.span.line, (), {}, fit.told)
        chosen = [span for span in self.targets if span.source.name == chosen_for(fit.span)]
        yield from map(self._statement, [] if chosen_too else chosen)

    def _statement(self, span: Span) -> Matched:
        target = self.targets[span]
        left_out = {ast.unparse(part): tuple(names) for part, names in self._left_out(target) if names}
        places = tuple(site.name for site in self._sites(target))
        return Matched(" ".join(span.text.split()), span.source.name, span.line, places, left_out)

    def _left_out(self, selector: ast.Selector) -> Iterator[tuple[ast.Selector, list[str]]]:
        """Each part of a selector that takes something away from what stands before it, and what."""
        for part in ast.within(selector):
            yield from self._left_out(part)
        match selector:
            case ast.Filter(base) | ast.Except(base):
                kept = {site.name for site in self._sites(selector)}
                yield selector, [site.name for site in self._sites(base) if site.name not in kept]

    def name(self, asked: str) -> list[Reason]:
        """The places of that name, or whose names end with it."""
        found = self._named(asked)
        if not found:
            segments = asked.count(".") + 1  # as many of each name's as were asked for
            ends = (".".join(site.name.split(".")[-segments:]) for site in self.sites)
            near = suggest(asked, dict.fromkeys(ends))
            raise PeftcError(NothingToExplain(asked=f"'{asked}'", has="no place of that name", near=near))
        return [self._place(site) for site in found]

    def _named(self, asked: str) -> list[Site]:
        found = [site for site in self.sites if site.name == asked]
        return found or [site for site in self.sites if site.name.endswith(f".{asked}")]

    def _place(self, site: Site) -> Reason:
        reaching = [span for span, names in self.matched.items() if names & {site.name, *self._whole(site)}]
        return Reason(
            site.name, tuple(sorted(site.roles)), site.facts(), tuple(evidence(site, self.sites)),
            tuple(f"{span.source.name}:{span.line}: {' '.join(span.text.split())}" for span in reaching),
        )  # fmt: skip

    def _whole(self, site: Site) -> set[str]:
        """The names of the other places on the same weight: of a part the whole, of the whole its parts."""
        if not isinstance(site, Projection):
            return set()
        return {
            o.name for o in self.sites if isinstance(o, Projection) and o.weight == site.weight and o.overlaps(site)
        }

    def to_json(self, found: list[Reason] | list[Matched]) -> list[dict[str, Any]]:
        """As plain data."""
        return [asdict(one) for one in found]


def _targets(intentions: Intentions) -> Iterator[tuple[Span, ast.Selector]]:
    for one in (intentions, *intentions.tasks.values()):
        yield from ((item.span, item.target) for item in one.applications if item.target is not None)
        yield from ((item.span, item.target) for item in one.trainings)
        yield from ((item.span, item.target) for item in one.packings)
        yield from ((item.span, item.target) for item in one.recomputings)


def told(found: list[Reason] | list[Matched]) -> Iterator[str]:
    """In lines, for a reader."""
    for one in found:
        if isinstance(one, Matched):
            yield f"{one.file}:{one.line}: {one.statement}"
            yield f"  {one.note}" if one.note else f"  matches {len(one.places)}: {listed(one.places)}"
            for part, names in one.left_out.items():
                yield f"  {part} leaves out {len(names)}: {listed(names)}"
        else:
            yield f"{one.name}: {', '.join(one.roles) or 'no role'}"
            yield from (f"  {name} = {fact}" for name, fact in one.facts.items())
            yield from (f"  {line}" for line in one.evidence)
            yield from (f"  {line}" for line in one.statements or ("no statement reaches it",))
