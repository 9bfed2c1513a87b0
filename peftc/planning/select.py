"""Selector x sites -> the sites it means, in the order of the forward pass.

Parts of a fused weight are sets of its rows, and the set operations respect that: a whole weight less its q rows is
its k and v rows, and a union of a weight with one of its parts is the weight.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.language import globs, words
from peftc.language.matching import SECONDS, Clock, compiled
from peftc.planning import errors as say
from peftc.protocol.site import Parameters, Projection, Site
from peftc.protocol.sites import Absence, Sites
from peftc.spec.groups import Group, InGroup

COMPARE = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
MOST_NEAR = 20  # mistakes for which names that are near are looked up, which takes long in a large model


class Selection:
    """Evaluates selectors against one model; problems collect in `problems`.

    Each is evaluated once: a name made by `let` is the same selector wherever it stands.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.parameters = False
        self.problems: list[Diagnostic] = []
        self.order = {site.name: index for index, site in enumerate(sites)}
        self.clock = Clock()
        self._known: dict[tuple[int, bool, bool], _Found] = {}
        self._complaints = 0  # how often something was found to be wrong, again or for the first time

    def __call__(self, selector: ast.Selector, *, parameters: bool = False) -> list[Site]:
        """The sites `selector` means; empty only if a problem says why.

        `parameters`: name patterns also mean single parameters, as `train` wants it.

        Raises:
            PeftcError: `slow-pattern` where a regular expression takes too long to match.
        """
        self.parameters = parameters
        found = self._evaluate(selector)
        return sorted(found, key=lambda site: self.order.get(site.name, len(self.order)))

    def _evaluate(self, selector: ast.Selector, may_be_empty: bool = False) -> list[Site]:
        key = (id(selector), may_be_empty, self.parameters)
        if key not in self._known:
            before = self._complaints
            sites = self._meaning(selector, may_be_empty)
            excused = may_be_empty and isinstance(selector, ast.Role | ast.Union)
            if not sites and not excused and self._complaints == before:
                self._complain(self._no_match(selector))
            self._known[key] = _Found(selector, sites, self._complaints > before)
        found = self._known[key]
        self._complaints += found.wrong
        return found.sites

    def _complain(self, problem: Diagnostic) -> None:
        self.problems.append(problem)
        self._complaints += 1

    def _meaning(self, selector: ast.Selector, may_be_empty: bool) -> list[Site]:
        match selector:
            case ast.Role():
                return _without_parts(site for site in self.sites if _has_role(site, selector.parts))
            case ast.Glob() | ast.Regex():
                return self._named(selector)
            case ast.Union(items):
                return _without_parts([site for item in items for site in self._evaluate(item, may_be_empty)])
            case ast.Intersect(items):
                found, *others = [self._evaluate(item, may_be_empty) for item in items]
                for other in others:
                    found = _intersection(found, other)
                return found
            case ast.Except(base, removed):
                # A role that is not there need not be left out; a name that is not there is a mistake.
                return self._difference(self._evaluate(base, may_be_empty), self._evaluate(removed, may_be_empty=True))
            case ast.InLayers(base):
                chosen = self._layers(selector)
                return [site for site in self._evaluate(base, may_be_empty) if site.block in chosen]
            case InGroup(base, group):
                found = self._evaluate(base, may_be_empty)
                chosen = self._group(found, group, selector)
                return [site for site in found if site.block in chosen]
            case ast.InStack(base, name):
                return self._in_stack(self._evaluate(base, may_be_empty), name)
            case ast.Where(base, field, op, value):
                assert isinstance(value, ast.Number)
                found = self._evaluate(base, may_be_empty)
                facts = [(site, site.facts().get(field.text)) for site in found]
                return [site for site, fact in facts if fact is not None and COMPARE[op](fact, value.scaled)]
        raise AssertionError(f"no meaning for {selector}")

    def _named(self, selector: ast.Glob | ast.Regex) -> list[Site]:
        names = [site.name for site in self.sites] + [*(self.sites.parameters if self.parameters else ())]
        matching = set(self._matching(selector, dict.fromkeys(names)))
        found = [site for site in self.sites if site.name in matching]
        single = [name for name in self.sites.parameters if name in matching] if self.parameters else []
        known = {site.name for site in found}
        found += [
            Parameters(name, name.rpartition(".")[0], frozenset(), parameters=(name,))
            for name in single if name not in known
        ]  # fmt: skip
        return _without_parts(found)

    def _matching(self, selector: ast.Glob | ast.Regex, names: Iterable[str]) -> list[str]:
        if isinstance(selector, ast.Glob):
            return [*filter(selector.regex().fullmatch, names)]
        pattern = compiled(selector.pattern)
        try:
            return [name for name in names if self.clock.found(pattern, name)]
        except TimeoutError:
            raise PeftcError(*self.problems, say.SlowPattern(seconds=SECONDS, span=selector.span)) from None

    @cached_property
    def _stacks(self) -> list[tuple[str | None, list[str]]]:
        """The name of each stack of layers, and its blocks in order."""
        stacks: dict[str, dict[int, str]] = defaultdict(dict)
        names: dict[str, str | None] = {}
        for site in self.sites:
            if site.block is not None and site.layer is not None:
                path = site.block.rpartition(".")[0]
                stacks[path][site.layer] = site.block
                names[path] = site.stack
        return [(names[path], [block for _, block in sorted(blocks.items())]) for path, blocks in stacks.items()]

    def _layers(self, selector: ast.InLayers) -> set[str]:
        """The blocks of every layer in the slice, each stack counted for itself."""
        bounds = slice(selector.start, selector.stop, selector.step)
        return {block for _, blocks in self._stacks for block in blocks[bounds]}

    def _group(self, found: list[Site], group: Group, selector: InGroup) -> set[str]:
        """The blocks of one group of layers, each stack in which something was found grouped for itself."""
        chosen: set[str] = set()
        concerned = {site.block for site in found}
        for stack, blocks in self._stacks:
            if concerned.isdisjoint(blocks):
                continue
            if len(blocks) < group.count:
                self._complain(
                    say.FewerLayersThanGroups(
                        model=self.sites.model, stack=stack, layers=len(blocks), groups=group.count,
                        defined=group.name.span, span=selector.span,
                    )
                )  # fmt: skip
            else:
                chosen.update(group.of(blocks))
        return chosen

    def _in_stack(self, found: list[Site], name: ast.Name) -> list[Site]:
        stacks = sorted({site.stack for site in self.sites if site.stack})
        if name.text not in stacks:
            self._complain(
                say.NoSuchStack(model=self.sites.model, name=name.text, stacks=tuple(stacks), span=name.span)
            )
        return [site for site in found if site.stack == name.text]

    def _difference(self, found: list[Site], removed: list[Site]) -> list[Site]:
        names = {site.name for site in removed}
        whole_removed = {_weight(site) for site in removed if _rows(site) is None}
        parts_removed = {_weight(site) for site in removed if _rows(site) is not None}
        result: list[Site] = []
        for site in found:
            if site.name in names or (_rows(site) is not None and _weight(site) in whole_removed):
                continue
            if _rows(site) is None and _weight(site) is not None and _weight(site) in parts_removed:
                result += [
                    part
                    for part in self.sites
                    if _weight(part) == _weight(site) and _rows(part) is not None and part.name not in names
                ]
            else:
                result.append(site)
        return _without_parts(result)

    def _no_match(self, selector: ast.Selector) -> Diagnostic:
        names = [site.name for site in self.sites]
        if self.parameters:
            names += self.sites.parameters
        near: list[str] = []
        has: tuple[str, ...] = ()
        absent: tuple[str, ...] = ()
        many = len(self.problems) >= MOST_NEAR
        instead: tuple[str, ...] = ()
        if isinstance(selector, ast.Glob) and not many:
            instead = tuple(self._instead(selector.pattern))
            near = difflib.get_close_matches(selector.pattern, names, n=3, cutoff=0.4)
        elif isinstance(selector, ast.Role) and not many:
            has = tuple(self.sites.roles())
            near = difflib.get_close_matches(selector.text, has, n=3)
            absent = tuple(
                f"{item.name}: {item.reason}" for item in self.sites.absent if _is_about(item, selector.parts)
            )
        return say.NoMatch(
            model=self.sites.model, near=tuple(near), has=has, absent=absent, instead=instead, span=selector.span
        )

    def _instead(self, pattern: str) -> Iterator[str]:
        """What says what a pattern seems to mean: a name matches as a whole here, and elsewhere by its end."""
        ending = re.compile(globs.regex(f"**.{pattern}"))
        if found := [site for site in self.sites if ending.fullmatch(site.name)]:
            yield f'"**.{pattern}"'
            roles = frozenset.intersection(*(site.roles for site in found)) - {"linear"}
            yield from sorted(roles, key=lambda role: (role.count("."), role))[:1]
        elif brought := words.meant(pattern) or words.SELECTORS.get(pattern.rpartition(".")[2]):
            yield brought.here


@dataclass(frozen=True)
class _Found:
    """What a selector means, and whether something was wrong with it. It holds the selector: its id is the key."""

    selector: ast.Selector
    sites: list[Site]
    wrong: bool


def _has_role(site: Site, parts: tuple[str, ...]) -> bool:
    if parts[-1] == "*":
        prefix = ".".join(parts[:-1]) + "."
        return any(role.startswith(prefix) and "." not in role[len(prefix) :] for role in site.roles)
    role = ".".join(parts)
    return role in site.roles or f"{role}.attn" in site.roles


def _is_about(absence: Absence, parts: tuple[str, ...]) -> bool:
    """Whether the role that is absent is one that a selector means, or a part of the sublayer that it means."""
    sublayer, _, projection = absence.role.partition(".")
    return sublayer in parts and (parts[-1] in (sublayer, "*", projection) or sublayer == "mlp")


def _weight(site: Site) -> str | None:
    return site.weight if isinstance(site, Projection) else None


def _rows(site: Site) -> tuple[int, ...] | None:
    return site.rows if isinstance(site, Projection) else None


def _without_parts(found: Iterable[Site]) -> list[Site]:
    """Each site once, and no part of a fused weight beside the whole of it."""
    unique = {site.name: site for site in found}
    whole = {_weight(site) for site in unique.values() if _rows(site) is None}
    return [site for site in unique.values() if _rows(site) is None or _weight(site) not in whole]


def _intersection(left: list[Site], right: list[Site]) -> list[Site]:
    """Sites of both sides; a part of one side where the other has the whole."""
    result = []
    for one, other in ((left, right), (right, left)):
        names = {site.name for site in other}
        whole = {_weight(site) for site in other if _rows(site) is None}
        result += [
            site for site in one
            if site.name in names or (_rows(site) is not None and _weight(site) in whole)
        ]  # fmt: skip
    return _without_parts(result)
