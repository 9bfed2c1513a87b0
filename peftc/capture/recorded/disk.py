"""Captured graphs on disk: what was captured once is read, as long as the code and the model are the same.

One file a graph, named by the digest of what determines it: a safetensors file with the constants of the model's code,
and in its header a digest of all of it, and the graph as JSON. It runs nothing when it is read.
`$PEFTC_GRAPHS` is the folder, "" for none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import fx, nn
from torch.utils import _pytree as pytree

from peftc.capture.assumptions import Asked, Question
from peftc.capture.inputs import Example
from peftc.capture.recorded.errors import NotRecordedError
from peftc.capture.recorded.expressions import as_lists, from_lists
from peftc.capture.recorded.graphs import Reader, as_told, symbols_of
from peftc.capture.recorded.key import key_of
from peftc.capture.recorded.results import spec_as_text, spec_of_text
from peftc.diagnostics import debug
from peftc.graph.ir import aliases_of, fake_mode, flat, get_attribute, tensors

VARIABLE = "PEFTC_GRAPHS"
MOST = 256  # files; those that were not read for longest go first
NAME = re.compile(r"\w+(\.\w+)*")
PART = ".part"  # what a file is called while it is written
LEFT = 24 * 3600  # seconds after which nobody writes it any more


@dataclass(frozen=True)
class Program:
    """What `torch.export` made of a model: its graph over the model's tensors, what it returns, what was asked."""

    module: fx.GraphModule
    result: pytree.TreeSpec
    asked: Asked


@dataclass(frozen=True)
class Record:
    """Where the graph of a model on an example is, or would be; `file` is None where there is none to be had."""

    file: Path | None
    model: nn.Module = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Record:
        """The one of a model, as it is now."""
        try:
            folder = folder_of_graphs()
            file = folder and folder / f"{key_of(model, example)}.safetensors"
        except Exception as error:  # a model may hold anything; it is captured then
            debug.tell(2, [f"no record is kept of {type(model).__name__}: {error}"])
            return cls(None, model)
        return cls(file, model)

    def read(self, example: Example) -> Program | None:
        """The program, in a context that is prepared to export the model; None where there is none, or it is unfit."""
        if self.file is None:
            return None
        try:
            if not self.file.is_file():
                return None
            with safe_open(self.file, "pt") as opened:
                constants = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                digest, _, text = opened.metadata()["graph"].partition(" ")
            if digest != digest_of(text, constants):
                raise NotRecordedError("it is damaged")
            program = _program(json.loads(text), constants, self.model, example)
            with suppress(OSError):  # a folder that is there to be read alone
                os.utime(self.file)
        except Exception as error:  # a file may say anything
            debug.tell(1, [f"{self.file.name} is not read: {error}"])
            return None
        return program

    def draft(self, program: Program) -> Callable[[], None]:
        """What is to be called to write a program, as it is now."""
        if self.file is None:
            return lambda: None
        try:
            content = _content(program, self.model)
        except Exception as error:  # such as pytree's of what it cannot write
            debug.tell(2, [f"no record is kept of {type(self.model).__name__}: {error}"])
            return lambda: None
        file = self.file
        return lambda: _write(file, content)


def folder_of_graphs() -> Path | None:
    """Where the files lie, None for no such folder."""
    if (chosen := os.environ.get(VARIABLE)) is not None:
        return Path(chosen).expanduser() if chosen else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftc" / "graphs"


def _content(program: Program, model: nn.Module) -> bytes:
    graph, own = program.module.graph, tensors(model)
    symbols = {symbol: place for place, symbol in enumerate(symbols_of(graph))}
    env = fake_mode(graph).shape_env
    questions = [
        [as_lists(question.holds, symbols), question.file, question.line] for question in program.asked.get(env, ())
    ] if env is not None else []  # fmt: skip
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    constants = {name: get_attribute(program.module, name) for name in read if name not in own}
    if not all(map(NAME.fullmatch, constants)):
        raise NotRecordedError("a constant of the code has a name that no code has")
    if not all(type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta for value in constants.values()):
        raise NotRecordedError("a constant of the code is no tensor with numbers")
    told = {"result": spec_as_text(program.result), "questions": questions, "nodes": as_told(graph)}
    copies = {name: value.detach().contiguous().clone() for name, value in constants.items()}
    text = json.dumps(told)
    return save(copies, metadata={"graph": f"{digest_of(text, copies)} {text}"})


def digest_of(graph: str, constants: Mapping[str, torch.Tensor]) -> str:
    """Tells a file in which something is another number than it was."""
    digest = hashlib.sha256(graph.encode())
    for name in sorted(constants):
        digest.update(name.encode() + constants[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _program(told: Any, constants: Mapping[str, torch.Tensor], model: nn.Module, example: Example) -> Program:
    inputs = _inputs(example)
    own = tensors(model)
    if not all(map(NAME.fullmatch, constants)):  # they get into the code that fx makes of a graph
        raise NotRecordedError("a constant has a name that no code has")
    read = {
        target: own[target] if target in own else constants[target]
        for op, _, target, *_ in told["nodes"]
        if op == "get_attr"
    }
    reader = Reader(inputs, read)
    symbols = symbols_of(inputs)
    holds: list[sympy.Basic] = [from_lists(one, symbols) for one, _, _ in told["questions"]]
    reader.learn(holds)
    graph = reader.read(told["nodes"])
    asked = {Question(one, file, line): None for one, (_, file, line) in zip(holds, told["questions"], strict=True)}
    module = flat(aliases_of(read), graph)
    return Program(module, spec_of_text(told["result"]), {reader.env: asked})


def _inputs(example: Example) -> fx.Graph:
    """A graph that takes what the example has and returns it, with fake values of sizes that are open as they are."""

    class Same(nn.Module):
        def forward(self, *args: Any, **given: Any) -> Any:
            return args, given

    same = Same()
    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in example.kwargs]
    vars(same)["forward"] = _with_signature(same.forward, inspect.Signature(names))
    shapes = example.dynamic_shapes()
    program = torch.export.export(same, (), example.kwargs, dynamic_shapes=shapes, strict=False)
    return cast(fx.Graph, program.graph)


def _with_signature(forward: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    def called(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    vars(called)["__signature__"] = signature
    return called


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all; that it cannot be written is nobody's fault."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=PART)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(temporary, file)
        except BaseException:  # also an interrupt
            Path(temporary).unlink(missing_ok=True)
            raise
        for left in file.parent.glob(f"*{PART}"):
            if left.stat().st_mtime < time.time() - LEFT:
                left.unlink(missing_ok=True)
        known = sorted(file.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)
        for old in known[:-MOST]:
            old.unlink(missing_ok=True)
