"""Random specs that a model can be compiled with, drawn from the registries and from what the model offers.

No method, parameter, storage or role is named here: what is added under `passes` is drawn without a line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftc.capture.capture import Captured
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.planning.planner import make_plan
from peftc.protocol.method import Method, Stage, kinds, methods
from peftc.protocol.params import Configured, Param, registered
from peftc.protocol.site import Block, Linear, Site
from peftc.protocol.sites import Sites
from peftc.protocol.storage import Storage
from peftc.spec.check import intend
from peftc.spec.groups import GROUPINGS
from variants import spelt

NUMBERS = (0, 1, 2, 3, 4, 6, 8, 32, 64)  # sizes of which models 32 wide have some
FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.5)
TRIES = 12  # statements that are drawn for a spec, of which those that the planner refuses are left out


@dataclass
class Drawn:
    """A spec that the planner takes, and what it said of statements that it did not take."""

    lines: list[str] = field(default_factory=list)
    taken: int = 0  # statements, but for those that name something
    refused: list[tuple[str, PeftcError]] = field(default_factory=list)

    @property
    def spec(self) -> str:
        return "\n".join(self.lines)


def draw(seed: int, captured: Captured, sites: Sites) -> Drawn:
    """One to five statements, each of which the planner took beside those before it; the same for the same seed."""
    return _Drawing(random.Random(seed), captured, sites).spec()


def without_place(error: PeftcError) -> list[Diagnostic]:
    """What an error says of no place in the spec: that nothing trains is of all of it."""
    return [problem for problem in error.diagnostics if problem.span is None and problem.code != "nothing-trains"]


@dataclass
class _Drawing:
    random: random.Random
    captured: Captured
    sites: Sites
    lets: dict[str, list[Site]] = field(default_factory=dict)  # names of selectors, and sites of the kind they name
    groups: list[str] = field(default_factory=list)

    def spec(self) -> Drawn:
        drawn = Drawn()
        wanted = self.random.randint(1, 5)
        for _ in range(TRIES):
            kinds_of_statement = [self.apply] * 6 + [self.train] * 2
            if drawn.taken:  # alone they train nothing
                kinds_of_statement += [self.quantize] * 2 + [self.checkpoint, self.freeze, self.require]
            names = [self.random.choice([self.let, self.group])()] if self.chance(0.3) else []
            lines = [*drawn.lines, *names, self.random.choice(kinds_of_statement)()]
            try:
                make_plan(self.captured, self.sites, intend("\n".join(lines)))
            except PeftcError as error:
                drawn.refused.append(("\n".join(lines), error))
                self._forget(names)
            else:
                drawn.lines = lines
                drawn.taken += 1
            if drawn.taken == wanted:
                break
        return drawn

    def _forget(self, lines: Sequence[str]) -> None:
        """What was defined for a statement that was refused."""
        defined = {name for line in lines for name in re.findall(r"\b[nG]\d+\b", line.partition("=")[0])}
        self.lets = {name: sites for name, sites in self.lets.items() if name not in defined}
        self.groups = [name for name in self.groups if name not in defined]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    # Statements

    def apply(self) -> str:
        cls = self.random.choice([*methods().values()])
        call = self.call(cls)
        try:
            (application,) = intend(f"apply {call} to linear").applications
        except PeftcError:  # parameters that do not go together: for the planner to say
            return f"apply {call} to {self.role_of(self.linears())}"
        method = application.method
        if method.stage is Stage.SEQUENCE and self.chance(0.9):
            return f"apply {call}"
        fitting = [site for site in self.sites if isinstance(site, kinds(method)) and not method.refuses(site)]
        return f"apply {call} to {self.selector(fitting or self.linears())}"

    def train(self) -> str:
        return f"train {self.selector(self.parametered())}"

    def freeze(self) -> str:
        return f"freeze {self.selector(self.parametered())}"

    def quantize(self) -> str:
        storage = self.call(self.random.choice([*registered(Storage).values()]))
        return f"quantize {self.selector(self.linears())} with {storage}"

    def checkpoint(self) -> str:
        return f"checkpoint {self.selector([site for site in self.sites if isinstance(site, Block)])}"

    def require(self) -> str:
        return self.random.choice(
            ["require trainable <= 100%", "require trainable >= 1", "require total < 1M",
             "require memory(batch=2, seq=16) <= 1 GiB", "require trainable <= 5%"]
        )  # fmt: skip

    def let(self) -> str:
        name = f"n{len(self.lets)}"
        sites = self.random.choice([self.linears(), self.parametered()])
        line = f"let {name} = {self.selector(sites)}"
        self.lets[name] = sites
        return line

    def group(self) -> str:
        names = [f"G{len(self.groups) + place}" for place in range(self.random.randint(1, 2))]
        self.groups += names
        return f"group {', '.join(names)} = {self.random.choice([*GROUPINGS])}(layers)"

    def linears(self) -> list[Site]:
        return [site for site in self.sites if isinstance(site, Linear)]

    def parametered(self) -> list[Site]:
        return [site for site in self.sites if site.parameters]

    # Selectors

    def selector(self, sites: list[Site], depth: int = 0) -> str:
        """Something that means some of `sites`, mostly."""
        shapes: list[Callable[[list[Site]], str]] = [self.atom] * 4
        if depth < 2:
            shapes += [self.union, self.filtered, self.filtered, self.difference, self.intersection]
        text = self.random.choice(shapes)(sites)
        return f"({text})" if depth and re.search(r",|&| except ", text) else text

    def atom(self, sites: list[Site]) -> str:
        one = self.random.choice(sites)
        named = [name for name, meant in self.lets.items() if meant[0].kind == one.kind]
        if named and self.chance(0.5):
            return self.random.choice(named)
        pattern = self.random.choice([self.role_of, self.role_of, self.name_of, self.regex_of])
        return pattern([one])

    def role_of(self, sites: list[Site]) -> str:
        one = self.random.choice(sites)
        if not one.roles:
            return self.name_of([one])
        role = self.random.choice(sorted(one.roles))
        stem, dot, _ = role.rpartition(".")
        return f"{stem}.*" if dot and stem not in ("self", "cross") and self.chance(0.3) else role

    def name_of(self, sites: list[Site]) -> str:
        name = self.random.choice(sites).name
        layer = self.random.choice([".*.", ".{0,1}.", r"\g<0>"])
        return '"' + re.sub(r"\.[0-9]+\.", layer, name.replace("[", "*").replace("]", "")) + '"'

    def regex_of(self, sites: list[Site]) -> str:
        name = re.escape(self.random.choice(sites).name)
        return f"/^{re.sub(r'[0-9]+', '[0-9]+', name)}$/"

    def union(self, sites: list[Site]) -> str:
        return f"{self.selector(sites, 1)}, {self.selector(sites, 2)}"

    def difference(self, sites: list[Site]) -> str:
        return f"{self.selector(sites, 1)} except {self.selector(sites, 2)}"

    def intersection(self, sites: list[Site]) -> str:
        one = self.random.choice(sites)  # most atoms of one site have it in common
        return f"{self.role_of([one])} & {self.random.choice([self.name_of, self.regex_of])([one])}"

    def filtered(self, sites: list[Site]) -> str:
        base = self.selector(sites, 1)
        one = self.random.choice(sites)
        filters = [f"in layers[{self.layers()}]"] * 3
        filters += [f"in {one.stack}"] if one.stack else []
        filters += [f"in {self.random.choice(self.groups)}"] if self.groups else []
        if facts := [(name, fact) for name, fact in one.facts().items() if isinstance(fact, int)]:
            name, fact = self.random.choice(facts)
            filters.append(f"where {name} {self.random.choice(['==', '>=', '<='])} {fact}")
        return f"{base} {self.random.choice(filters)}"

    def layers(self) -> str:
        return self.random.choice(["0", "1", "-1", ":1", "1:", "-1:", ":", "::2", "::-1", "0:2"])

    # Calls

    def call(self, cls: type[Configured], depth: int = 0) -> str:
        """With some of its parameters, by either of their names."""
        given = []
        for place, parameter in enumerate(cls.parameters.values()):
            if not parameter.required and not self.chance(0.35):
                continue
            value = self.value(parameter, depth)
            if value is not None:
                positional = place == 0 and parameter.nested and self.chance(0.5)
                name = parameter.alias if parameter.alias and self.chance(0.3) else parameter.name
                given.append(value if positional else f"{name}={value}")
        return f"{cls.name}({', '.join(given)})" if given or self.chance(0.2) else cls.name

    def value(self, parameter: Param, depth: int) -> str | None:
        """None for what is better left out: a word that may be a file's name."""
        if parameter.nested:
            inner = [*registered(parameter.nested).values()]
            if depth and parameter.nested is Method:  # combinators stand in no combinator
                inner = [cls for cls in inner if not any(p.nested is Method for p in cls.parameters.values())]
            return self.call(self.random.choice(inner), depth + 1)
        if parameter.choices:
            return self.random.choice(parameter.choices)
        if parameter.kind is bool:
            return spelt(self.chance(0.5))
        if parameter.kind is str:
            return None
        numbers: tuple[Any, ...] = NUMBERS if parameter.kind is int else FRACTIONS
        allowed = [number for number in numbers if parameter.problem(number) is None]
        return spelt(self.random.choice(allowed)) if allowed else None
