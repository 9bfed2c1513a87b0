"""What there is to choose from, as tables: methods, storages, the ways of making a matrix."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peftc.protocol import torch
from peftc.protocol.method import Method, kinds, methods
from peftc.protocol.parameterisation import Parameterisation
from peftc.protocol.params import Configured, registered
from peftc.protocol.storage import storages
from peftc.show.screen import Hung
from peftc.spec.calls import KINDS

_WRAPPED = re.compile(r"(?<!\n)\n(?=\w|`)")  # a line break within a paragraph


def methods_table(*, papers: bool = True) -> Table:
    """Every method with its formula, sites, parameters and, where there are columns enough, paper."""
    table = Table(show_lines=True)
    for heading in ("method", "formula", "attaches to", "parameters", *(["paper"] if papers else [])):
        table.add_column(heading, overflow="fold")
    if not papers:
        table.caption = "papers: peftc methods NAME"
    for name, cls in methods().items():
        paper = [cls.paper] if papers else []
        table.add_row(name, cls.formula, _places(cls), ", ".join(cls.parameters), *paper)
    return table


def methods_by_place() -> str:
    """The registry as the README's table: the methods of each kind of place."""
    found: dict[str, list[str]] = {}
    for name, cls in methods().items():
        found.setdefault(_places(cls), []).append(f"`{name}`")
    return "\n".join(
        ["| at | methods |", "|---|---|", *(f"| {at} | {', '.join(names)} |" for at, names in found.items())]
    )


def _places(cls: type[Method]) -> str:
    return " and ".join(kind.written for kind in kinds(cls))


def parameterisations_markdown() -> str:
    """The ways of making a matrix, as the documentation's table."""
    lines = ["| matrix | formula | parameters | paper |", "|---|---|---|---|"]
    for name, cls in registered(Parameterisation).items():
        assert issubclass(cls, Parameterisation)
        parameters = ", ".join(f"`{parameter}`" for parameter in cls.parameters)
        lines.append(f"| `{name}` | {cls.formula} | {parameters} | {cls.paper} |")
    return "\n".join(lines)


def storages_table() -> Table:
    """Every storage with its formula, parameters and paper."""
    return _table("quantize SELECTOR with", "storage", storages())


def parameterisations_table() -> Table:
    """Every way of making a matrix, for the methods that have some."""
    return _table("adapter(weight=…)", "matrix", registered(Parameterisation))


def _table(title: str, first: str, known: Mapping[str, type[Configured]]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in (first, "formula", "parameters", "paper"):
        table.add_column(heading, overflow="fold")
    for name, cls in known.items():
        table.add_row(name, cls.formula, ", ".join(cls.parameters), cls.paper)
    return table


def storages_markdown() -> str:
    """How frozen weights may lie in memory, as a table; the bits are those of a weight of 4096 by 4096."""
    lines = ["| storage | formula | parameters | bits a weight | paper |", "|---|---|---|---|---|"]
    for name, cls in storages().items():
        parameters = ", ".join(f"`{parameter}`" for parameter in cls.parameters)
        settings = [{}, *({each: True} for each, parameter in cls.parameters.items() if parameter.kind is bool)]
        packed = [cls(**given).buffers((4096, 4096), torch.bfloat16).values() for given in settings]
        bits = ", ".join(f"{8 * sum(buffer.bytes for buffer in buffers) / 4096**2:.2f}" for buffers in packed)
        lines.append(f"| `{name}` | {cls.formula} | {parameters} | {bits} | {cls.paper} |")
    return "\n".join(lines)


def described() -> list[dict[str, Any]]:
    """Methods, storages and parameterisations as plain data."""
    return [
        {**_described(name, cls), **_described_places(cls)} for kind in KINDS for name, cls in registered(kind).items()
    ]


def _described(name: str, cls: type[Configured]) -> dict[str, Any]:
    return {
        "name": name, "noun": cls.noun, "summary": inspect.getdoc(cls), "formula": cls.formula, "paper": cls.paper,
        "parameters": _described_parameters(cls),
    }  # fmt: skip


def _described_places(cls: type[Configured]) -> dict[str, Any]:
    if not issubclass(cls, Method):
        return {}
    names = [kind.kind for kind in kinds(cls)]
    return {"site": names[0], "sites": names, "merges": cls.unmergeable is None}


def _described_parameters(cls: type[Configured]) -> dict[str, dict[str, Any]]:
    return {
        parameter.name: {
            "default": None if parameter.required else parameter.default,
            "required": parameter.required,
            "doc": parameter.doc,
            "expects": parameter.expects,
            **({"alias": parameter.alias} if parameter.alias else {}),
        }
        for parameter in cls.parameters.values()
    }


def page(name: str) -> Group:
    """A method, a storage or a way of making a matrix: what it is, and each parameter."""
    cls = next(registered(kind)[name] for kind in KINDS if name in registered(kind))
    if not issubclass(cls, Method):
        return _page(cls, (cls.formula, cls.paper, f"a {cls.noun}, such as {cls.such_as}"))
    merges = "can be merged" if cls.unmergeable is None else f"cannot be merged: {cls.unmergeable}"
    return _page(cls, (cls.formula, cls.paper, f"attaches to {_places(cls)}", merges))


def _page(cls: type[Configured], facts: tuple[str, ...]) -> Group:
    table = Table("parameter", "default", "meaning", "expects")
    for parameter in cls.parameters.values():
        name = f"{parameter.name} ({parameter.alias})" if parameter.alias else parameter.name
        shown = "required" if parameter.required else _default(parameter.default)
        table.add_row(name, shown, parameter.doc, parameter.expects)
    summary = _WRAPPED.sub(" ", inspect.getdoc(cls) or "")
    lines = (f"  {fact}" for fact in facts if fact)
    return Group(Text(f"{cls.name}: {summary}"), *map(Hung, lines), table)


def _default(default: Any) -> str:
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
