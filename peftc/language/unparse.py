"""Syntax tree to text: the inverse of reading, up to white space and comments."""

from __future__ import annotations

import re

from peftc.language.build import ESCAPES
from peftc.language.tree import (
    Apply,
    Arg,
    Bool,
    Call,
    Checkpoint,
    Except,
    Fit,
    Freeze,
    Glob,
    Group,
    InLayers,
    InStack,
    Intersect,
    Let,
    ListValue,
    Name,
    Node,
    Number,
    Quantize,
    Regex,
    Require,
    Role,
    Selector,
    Spec,
    Statement,
    String,
    Task,
    Train,
    Union,
    Use,
    Value,
    Where,
)


def unparse(node: Node) -> str:
    """Canonical text of a node; of a whole specification, one that `parse` reads back to an equal tree."""
    match node:
        case Spec(statements):
            return "".join(f"{unparse(statement)}\n" for statement in statements)
        case Statement():
            return _statement_text(node)
        case Selector():
            return _selector_text(node)
        case Arg(name, value):
            return f"{name.text}={unparse(value)}" if name else unparse(value)
        case Value():
            return _value_text(node)
    raise TypeError(f"no syntax node: {node!r}")


def _statement_text(statement: Statement) -> str:
    match statement:
        case Apply(method, target):
            return f"apply {_method_text(method)}" + (f" to {unparse(target)}" if target else "")
        case Quantize(target, storage):
            return f"quantize {unparse(target)} with {_method_text(storage)}"
        case Train(target):
            return f"train {unparse(target)}"
        case Freeze(target):
            return f"freeze {unparse(target)}"
        case Checkpoint(target):
            return f"checkpoint {unparse(target)}"
        case Let(name, value):
            return f"let {name.text} = {unparse(value)}"
        case Task(name, body):
            inside = "".join(f"    {line}\n" for inner in body for line in unparse(inner).split("\n"))
            return f"task {name.text} {{\n{inside}}}"
        case Group(names, call):
            return f"group {', '.join(name.text for name in names)} = {_method_text(call)}"
        case Require(quantity, op, number):
            return f"require {_method_text(quantity)} {op} {unparse(number)}"
        case Fit(quantity, op, number, using):
            tools = f" using {', '.join(map(_method_text, using))}" if using else ""
            return f"fit {_method_text(quantity)} {op} {unparse(number)}{tools}"
        case Use(path):
            return f"use {unparse(path)}"
    raise TypeError(f"no statement: {statement!r}")


def _method_text(call: Call) -> str:
    """A call where only a method can stand: there it needs no brackets."""
    return unparse(call) if call.args else call.name.text


def _value_text(value: Value) -> str:
    match value:
        case Name(text):
            return text
        case Number(number, unit):
            return f"{number!r}{'' if unit in (None, '%') else ' '}{unit or ''}"
        case Bool(truth):
            return "true" if truth else "false"
        case String(text):
            return _quoted(text)
        case ListValue(items):
            return f"[{', '.join(map(unparse, items))}]"
        case Call(name, args):
            return f"{name.text}({', '.join(map(unparse, args))})"
    raise TypeError(f"no value: {value!r}")


def _quoted(text: str) -> str:
    escapes = {value: f"\\{letter}" for letter, value in ESCAPES.items()}
    return '"' + "".join(escapes.get(char) or (f"\\u{ord(char):04x}" if char < " " else char) for char in text) + '"'


_BINDING: dict[type[Selector], int] = {Union: 0, Except: 1, Intersect: 2}  # the others bind tightest


def _selector_text(selector: Selector, binding: int = 0) -> str:
    """The text of a selector, in brackets if it binds more loosely than its place asks for."""
    if _BINDING.get(type(selector), 3) < binding:
        return f"({_selector_text(selector)})"
    match selector:
        case Union(items):
            return ", ".join(_selector_text(item, 1) for item in items)
        case Except(base, removed):
            return f"{_selector_text(base, 1)} except {_selector_text(removed, 2)}"
        case Intersect(items):
            return " & ".join(_selector_text(item, 3) for item in items)
        case InLayers(base, start, stop, step):
            bounds = ["" if bound is None else str(bound) for bound in (start, stop, step)]
            return f"{_selector_text(base, 3)} in layers[{':'.join(bounds[: 2 if step is None else 3])}]"
        case InStack(base, name):
            return f"{_selector_text(base, 3)} in {name.text}"
        case Where(base, quantity, op, value):
            return f"{_selector_text(base, 3)} where {quantity.text} {op} {unparse(value)}"
        case Role():
            return selector.text
        case Glob(pattern):
            return _quoted(pattern)
        case Regex(pattern):
            slashes_escaped = re.sub(r"(\\.)|/", lambda part: part[1] or r"\/", pattern)
            return f"/{slashes_escaped}/"
    raise TypeError(f"no selector: {selector!r}")
