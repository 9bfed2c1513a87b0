"""Selector x sites -> the sites it means, in the order of the forward pass.

Parts of a fused weight are sets of its rows, and the set operations respect that: a whole weight less its q rows is
its k and v rows, and a union of a weight with one of its parts is the weight.
"""

from __future__ import annotations

import difflib
import operator
from collections import defaultdict
from collections.abc import Iterable

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.planning import errors as say
from peftc.protocol.site import Parameters, Projection, Site
from peftc.protocol.sites import Absence, Sites
from peftc.spec.groups import Group, InGroup

COMPARE = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class Selection:
    """Evaluates selectors against one model; problems collect in `problems`."""

    def __init__(self, sites: Sites, *, parameters: bool = False) -> None:
        """`parameters`: name patterns also mean single parameters, as `train` wants it."""
        self.sites = sites
        self.parameters = parameters
        self.problems: list[Diagnostic] = []
        self.order = {site.name: index for index, site in enumerate(sites)}

    def __call__(self, selector: ast.Selector) -> list[Site]:
        """The sites `selector` means; empty only if a problem says why."""
        found = self._evaluate(selector)
        return sorted(found, key=lambda site: self.order.get(site.name, len(self.order)))

    def _evaluate(self, selector: ast.Selector, may_be_empty: bool = False) -> list[Site]:
        before = len(self.problems)
        found = self._meaning(selector, may_be_empty)
        excused = may_be_empty and isinstance(selector, ast.Role | ast.Union)
        if not found and not excused and len(self.problems) == before:
            self.problems.append(self._no_match(selector))
        return found

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
        pattern = selector.regex()
        matches = pattern.fullmatch if isinstance(selector, ast.Glob) else pattern.search
        found = [site for site in self.sites if matches(site.name)]
        if self.parameters:
            known = {site.name for site in found}
            single = [name for name in self.sites.parameters if matches(name) and name not in known]
            found += [Parameters(name, name.rpartition(".")[0], frozenset(), parameters=(name,)) for name in single]
        return _without_parts(found)

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
        return {block for _, blocks in self._stacks() for block in blocks[bounds]}

    def _group(self, found: list[Site], group: Group, selector: InGroup) -> set[str]:
        """The blocks of one group of layers, each stack in which something was found grouped for itself."""
        chosen: set[str] = set()
        concerned = {site.block for site in found}
        for stack, blocks in self._stacks():
            if concerned.isdisjoint(blocks):
                continue
            if len(blocks) < group.count:
                self.problems.append(
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
            self.problems.append(
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
        if isinstance(selector, ast.Glob):
            near = difflib.get_close_matches(selector.pattern, names, n=3, cutoff=0.4)
        elif isinstance(selector, ast.Role):
            has = tuple(self.sites.roles())
            near = difflib.get_close_matches(selector.text, has, n=3)
            absent = tuple(
                f"{item.name}: {item.reason}" for item in self.sites.absent if _is_about(item, selector.parts)
            )
        return say.NoMatch(model=self.sites.model, near=tuple(near), has=has, absent=absent, span=selector.span)


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
