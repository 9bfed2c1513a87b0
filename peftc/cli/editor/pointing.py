"""What somebody points at: what it is, in Markdown, and where it is defined."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from peftc import language as ast
from peftc.cli.editor.document import Document
from peftc.cli.editor.offers import configured
from peftc.diagnostics.diagnostic import PeftcError, listed
from peftc.diagnostics.source import Source, Span
from peftc.protocol.method import Method, kinds
from peftc.protocol.params import Configured, Param
from peftc.spec.resolve import resolve

MOST_SITES = 6  # that are named
# The places that a selector without names means, and the same for `train`, which takes parameters, too.
Match = Callable[[ast.Selector, bool], str | None]
_WRAPPED = re.compile(r"(?<!\n)\n(?=\w|`)")


@dataclass(frozen=True)
class Pointed:
    """What is at a place, and the characters that it is written with."""

    text: str
    span: Span


def hover(document: Document, offset: int, match: Match | None = None) -> Pointed | None:
    """What there is to say of what stands at `offset`. `match` says in words which places of a model are meant."""
    around = document.enclosing(offset)
    if not around:
        return _word(document.source, offset)
    node, outer = around[-1], [None, *around][-2]
    known = document.definitions(offset)
    told: list[str] = []
    match outer, node:
        case ast.Call(name), ast.Name(text) if name is node:
            told += _named(text, known) or _configured(configured(text))
        case ast.Arg(name), ast.Name(text) if name is node:
            told += _parameter(around, known, text)
        case _, ast.Role(parts):
            told += _named(".".join(parts), known)
        case ((ast.InStack() | ast.Group()), ast.Name(text)):
            told += _named(text, known)
    selector = next((one for one in around[::-1] if isinstance(one, ast.Selector)), None)
    if match and selector is not None and isinstance(node, ast.Selector | ast.Name) and not isinstance(outer, ast.Call):
        told += filter(None, [_matched(document, around, selector, offset, match)])
    return Pointed("\n\n".join(told), node.span) if told else None


def _word(source: Source, offset: int) -> Pointed | None:
    """What a method is whose line cannot be read, as while it is written."""
    for word in re.finditer(r"\w+", source.text):
        if word.start() <= offset <= word.end() and (told := _configured(configured(word[0]))):
            return Pointed("\n\n".join(told), Span(source, *word.span()))
    return None


def definition(document: Document, offset: int) -> Span | None:
    """Where the name at `offset` is given, or the file that is used there begins."""
    around = document.enclosing(offset)
    match around:
        case [*_, ast.Use(spec=ast.Spec(source=source)), ast.String()]:
            return Span(source, 0, 0)
        case [*_, ast.Role(parts)]:
            name = ".".join(parts)
        case [*_, (ast.Call() | ast.InStack() | ast.Let() | ast.Group()), ast.Name(name)]:
            pass
        case _:
            return None
    return _place(name, document.definitions(offset))


def _place(name: str, known: dict[str, ast.Let | ast.Group]) -> Span | None:
    match known.get(name):
        case ast.Let(given):
            return given.span
        case ast.Group(names):
            return next(one.span for one in names if one.text == name)
    return None


def _named(name: str, known: dict[str, ast.Let | ast.Group]) -> list[str]:
    """The line that gives a name."""
    found = known.get(name)
    return [_code(ast.unparse(found)), f"defined at {found.span}"] if found else []


def _configured(cls: type[Configured] | None) -> list[str]:
    if cls is None:
        return []
    summary = _WRAPPED.sub(" ", inspect.getdoc(cls) or "")
    places = f"attaches to {' and '.join(kind.written for kind in kinds(cls))}" if issubclass(cls, Method) else ""
    parameters = "\n".join(f"- {_told(one)}" for one in cls.parameters.values())
    return [
        *filter(None, (f"**{cls.name}**, a {cls.noun}", _code(cls.formula), summary, cls.paper, places, parameters))
    ]


def _parameter(around: list[ast.Node], known: dict[str, ast.Let | ast.Group], name: str) -> list[str]:
    """Of the innermost call around it."""
    call = next(one for one in around[::-1] if isinstance(one, ast.Call))
    let = known.get(call.name.text)
    method = let.value.name.text if isinstance(let, ast.Let) and isinstance(let.value, ast.Call) else call.name.text
    cls = configured(method)
    return [_told(one) for one in cls.parameters.values() if name in (one.name, one.alias)] if cls else []


def _told(one: Param) -> str:
    name = f"`{one.name}` (`{one.alias}`)" if one.alias else f"`{one.name}`"
    shown = str(one.default).lower() if isinstance(one.default, bool) else str(one.default)
    default = "required" if one.required else "" if one.default is None else f"{shown} by default"
    return "; ".join(filter(None, (f"{name}: {one.doc}", f"expects {one.expects}", default)))


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _matched(
    document: Document, around: list[ast.Node], selector: ast.Selector, offset: int, match: Match
) -> str | None:
    """The places of a model that a selector means there; None where it has a mistake."""
    defined = dict.fromkeys(document.definitions(offset).values())
    probe = ast.Train(selector, span=selector.span)
    try:
        found = resolve(ast.Spec((*defined, probe), Source("", ""), span=selector.span))
        return match(found.trainings[-1].target, any(isinstance(one, ast.Train | ast.Freeze) for one in around))
    except PeftcError:
        return None


def told_places(names: list[str], model: str) -> str:
    """How many places a selector means, and the first of them."""
    count = "1 place" if len(names) == 1 else f"{len(names)} places"
    return f"{count} of {model}: {listed(names, MOST_SITES)}" if names else f"no place of {model}"
