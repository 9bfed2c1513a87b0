"""Types of `outputs` -> JSON schemas."""

from __future__ import annotations

import inspect
import types
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from peftc.cli.schemas.outputs import OPEN, OUTPUTS, Errors

DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def schema(command: str) -> dict[str, Any]:
    """Of what a command prints with `--json`: its data, or the mistakes that kept it from them."""
    definitions: dict[str, Any] = {}
    made = _schema(OUTPUTS[command] if OUTPUTS[command] is Errors else OUTPUTS[command] | Errors, definitions)
    return {"$schema": DRAFT, "title": f"peftc {command} --json", **made, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if is_typeddict(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # which stands for it where it is in itself
            definitions[kind.__name__] |= _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    arguments = get_args(kind)
    if get_origin(kind) in (types.UnionType, Union):
        return {"anyOf": [_schema(each, definitions) for each in arguments]}
    if get_origin(kind) is list:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if kind is Any:
        return {}
    raise TypeError(f"no schema is known for {kind}")


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Of a TypedDict: what stands in no type stands in no output, but for those that are open."""
    fields = get_type_hints(kind, include_extras=True)
    optional = {name for name, each in fields.items() if get_origin(each) is NotRequired}
    described = inspect.cleandoc(kind.__doc__ or "")
    return {
        "type": "object",
        **({"description": described} if described and not described.startswith("dict(") else {}),
        "properties": {
            name: _schema(get_args(each)[0] if name in optional else each, definitions)
            for name, each in fields.items()
        },
        "required": [name for name in fields if name not in optional],
        "additionalProperties": kind in OPEN,
    }  # fmt: skip
