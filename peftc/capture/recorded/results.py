"""What a model returns, as text and back: pytree's own, but for what has it import a module that a file names."""

from __future__ import annotations

import json
from typing import Any

from torch.utils import _pytree as pytree

from peftc.capture.recorded.errors import NotRecordedError

KINDS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
LIBRARY = "transformers."


def spec_as_text(spec: pytree.TreeSpec) -> str:
    """How a result is put together.

    Raises:
        NotRecordedError: where there is more in it than containers and results of transformers.
    """
    text = pytree.treespec_dumps(spec)
    _check(json.loads(text)[1])
    return text


def spec_of_text(text: str) -> pytree.TreeSpec:
    """The same, read.

    Raises:
        NotRecordedError: where it is none of those that are written.
    """
    version, told = json.loads(text)
    _check(told)
    return pytree.treespec_loads(json.dumps([version, told]))


def _check(told: Any) -> None:
    """An enum among the keys of a dict, or what a defaultdict makes, is looked up in a module by its name."""
    kind, context = told["type"], told["context"]
    if kind is not None and (kind not in KINDS and not kind.startswith(LIBRARY)):
        raise NotRecordedError(f"a {kind} is returned")
    if context is not None:
        json.loads(context, object_hook=_refused)
    for inner in told["children_spec"]:
        _check(inner)


def _refused(found: dict[str, Any]) -> Any:
    raise NotRecordedError(f"{found} is a key of what is returned")
