"""What a captured graph takes for granted of its inputs' sizes, and whether a call keeps to it.

A model may ask for a size in Python and go one way or another (`if length > window`); the graph has the one way that
the example took. So every question about a size that is asked while a model is captured is written down with its
answer. Those that the model asks must be answered in every call as they were. Those that an operation of torch asks on
its way to a shape (where does a slice end, how many parts has a split) may be answered otherwise as long as the shapes
come out as captured: that is looked up, by computing them again, only for a call in which an answer is another one.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import sympy
import torch
import transformers
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter
from transformers.exporters.utils import patch_attributes

from peftc.capture.convention import LOSS_INPUTS
from peftc.capture.errors import OtherSizes
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.graph.ir import expression, fake_mode

TORCH = Path(torch.__file__).parent
HERE = f"{Path(__file__).parent}/"
# Code that asks in order to choose how something is computed, not what; torch's layers are a model's code, though.
OPERATIONS = (f"{TORCH}/", f"{Path(transformers.__file__).parent / 'integrations'}/", f"{Path(__file__).parents[1]}/")
LAYERS = f"{TORCH / 'nn'}/"
# How a tensor lies in memory changes no number.
LAYOUT = (f"{TORCH / '_prims_common'}/", f"{TORCH / '_prims'}/")


@dataclass(frozen=True)
class Question:
    """Something that was asked of sizes, and was so (`holds`); by which line of whose code."""

    holds: sympy.Basic
    file: str
    line: int

    @property
    def of_model(self) -> bool:
        """Whether the model asked; else an operation did."""
        return self.file.startswith(LAYERS) or not self.file.startswith(OPERATIONS)

    @property
    def where(self) -> str:
        """The line, as a reader looks it up."""
        return f"{self.file}:{self.line}: {linecache.getline(self.file, self.line).strip()}"


Asked = dict[ShapeEnv, dict[Question, None]]
LOCK = RLock()  # one listens at a time: what is asked is heard for all shape environments


@contextmanager
def listening() -> Iterator[Asked]:
    """Yields what is asked of the sizes of each shape environment, while it is asked."""
    heard: Asked = {}
    known: set[Any] = set()
    plumbing = frozenset(uninteresting_files())

    def listened(answer: Callable[..., sympy.Basic]) -> Callable[..., sympy.Basic]:
        def evaluate_expr(self: ShapeEnv, asked: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
            said = answer(self, asked, *args, **kwargs)
            frame = sys._getframe(1)
            while _is_ours(frame.f_code.co_filename, plumbing) and frame.f_back is not None:
                frame = frame.f_back
            key = self, asked, frame.f_code, frame.f_lineno
            if key not in known and asked.free_symbols:
                known.add(key)  # an unrolled loop asks the same a thousand times
                holds = {sympy.true: asked, sympy.false: sympy.Not(asked)}.get(said, sympy.Eq(asked, said))
                heard.setdefault(self, {})[Question(holds, frame.f_code.co_filename, frame.f_lineno)] = None
            return said

        return evaluate_expr

    with LOCK, patch_attributes([(ShapeEnv, "evaluate_expr", listened)]):
        yield heard


def _is_ours(file: str, plumbing: frozenset[str]) -> bool:
    """Whether a file is torch's plumbing, or of what listens along here: not who asks."""
    return file in plumbing or file.startswith(HERE)


@dataclass(frozen=True)
class Assumptions:
    """The sizes of each input, numbers or expressions in symbols, and what was so of the symbols.

    `fixing` are the model's questions that left a size no choice.
    """

    model: str
    inputs: Mapping[str, tuple[Any, ...]]
    symbols: frozenset[sympy.Symbol]
    questions: tuple[Question, ...]
    fixing: tuple[Question, ...]
    functions: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.Graph, model: str, heard: Asked) -> Assumptions:
        """Those of a captured graph; `heard` is what was asked meanwhile."""
        env = fake_mode(graph).shape_env
        assert env is not None
        inputs = {
            str(node.target): tuple(expression(size) for size in node.meta["val"].shape)
            for node in graph.find_nodes(op="placeholder")
            if isinstance(node.meta["val"], torch.Tensor)
        }
        symbols = {symbol for sizes in inputs.values() for size in sizes if not isinstance(size, int)
                   for symbol in size.free_symbols}  # fmt: skip
        asked = {question: env.replace(question.holds) for question in heard.get(env, ())}
        return cls(
            model=model,
            inputs=inputs,
            symbols=frozenset(symbols),
            questions=tuple(
                {
                    (now, question.of_model): Question(now, question.file, question.line)
                    for question, now in asked.items()
                    if now.free_symbols and now.free_symbols <= symbols and not question.file.startswith(LAYOUT)
                }.values()
            ),
            fixing=tuple(question for question, now in asked.items() if now == sympy.true and question.of_model),
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]], captured: fx.Graph, longer: Mapping[str, int]) -> None:
        """Refuses a call whose inputs have sizes that the graph was not captured for.

        Args:
            shapes: of each input that is given, by name.
            captured: the graph as it was before any pass.
            longer: of an input by name, how many positions the model sees beyond those of its second dimension.

        Raises:
            PeftcError: `other-sizes`, with the model's line.
        """
        sizes = self._bound(shapes)
        more = {self.inputs[name][1]: by for name, by in longer.items() if name in shapes}
        sizes = {symbol: size + more.get(symbol, 0) for symbol, size in sizes.items()}
        known = tuple(sizes)
        for question, holds in zip(self._asked(known, True), self._answer(known, True)(*sizes.values()), strict=True):
            if not holds:
                raise self._refusal(shapes, self._spelt(question.holds), question.where)
        # Operations were asked of sizes of at least two, and compute with one as with any.
        sizes = {symbol: max(size, 2) for symbol, size in sizes.items()}
        if all(self._answer(known, False)(*sizes.values())):
            return
        if where := _comes_out_otherwise(captured, sizes, shapes.keys()):
            raise self._refusal(shapes, "the shapes that its operations had", where)

    def _bound(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[sympy.Symbol, int]:
        """What each symbol is in a call, of those that its inputs tell."""
        sizes: dict[sympy.Symbol, int] = {}
        for name, shape in shapes.items():
            if len(shape) != len(self.inputs[name]):
                raise self._refusal(shapes, f"{name} of {len(self.inputs[name])} dimensions")
            for size, got in zip(self.inputs[name], shape, strict=True):
                if size in self.symbols:
                    sizes.setdefault(size, got)
        for name, shape in shapes.items():
            for place, (size, got) in enumerate(zip(self.inputs[name], shape, strict=True)):
                if size != got and sympy.sympify(size).xreplace(sizes) != got:
                    captured = f"{name}.shape[{place}] == {self._spelt(size)}"
                    raise self._refusal(shapes, captured, *self._fixed(size))
        return sizes

    def _fixed(self, size: Any) -> tuple[str, ...]:
        """The lines of the model that made a size a number, such as a loop over it."""
        return tuple(question.where for question in self.fixing if size in question.holds.args)

    def _asked(self, known: tuple[sympy.Symbol, ...], of_model: bool) -> list[Question]:
        """What can be answered when some symbols are known."""
        return [
            question
            for question in self.questions
            if question.of_model is of_model and question.holds.free_symbols <= set(known)
        ]

    def as_code(self, given: Iterable[str], longer: Mapping[str, int]) -> tuple[Any, Any, Any]:
        """Which sizes of inputs are which numbers; where the other sizes are read off, and how much is beyond each.

        The third is a function of these other sizes that answers all that was asked, and whether they fit each other.
        """
        fixed: list[tuple[str, int, int]] = []
        read: dict[sympy.Symbol, tuple[str, int, int]] = {}
        fitting: list[sympy.Basic] = []
        for name in given:
            more = longer.get(name, 0)
            for place, size in enumerate(self.inputs[name]):
                if isinstance(size, int):
                    fixed.append((name, place, size))
                    continue
                symbol = size if size in self.symbols and size not in read else sympy.Symbol(f"{name}_{place}")
                read[symbol] = (name, place, more if place == 1 else 0)
                if symbol is not size:
                    fitting.append(sympy.Eq(size, symbol))
        known = tuple(read)
        by_model = _function(known, fitting + [question.holds for question in self._asked(known, True)])
        by_operations = _function(known, [question.holds for question in self._asked(known, False)])

        def answered(*sizes: int) -> list[Any]:
            """Operations were asked of sizes of at least two, and compute with one as with any."""
            return [*by_model(*sizes), *by_operations(*[max(size, 2) for size in sizes])]

        return tuple(fixed), tuple(read.values()), answered

    def _answer(self, known: tuple[sympy.Symbol, ...], of_model: bool) -> Any:
        """A function of the known symbols' values that answers all that was asked."""
        key = (known, of_model)
        if key not in self.functions:
            asked = [question.holds for question in self._asked(known, of_model)]
            self.functions[key] = _function(known, asked)
        return self.functions[key]

    def _spelt(self, size: Any) -> str:
        """An expression with each symbol as what one reads it off."""
        if isinstance(size, int):
            return str(size)
        names = {
            symbol: sympy.Symbol(f"{name}.shape[{place}]")
            for name, sizes in reversed(list(self.inputs.items()))
            for place, symbol in reversed(list(enumerate(sizes)))
            if symbol in self.symbols
        }
        return str(PythonPrinter().doprint(size.xreplace(names)))

    def _refusal(self, shapes: Mapping[str, tuple[int, ...]], captured: str, *where: str) -> PeftcError:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return PeftcError(OtherSizes(model=self.model, given=given, captured=captured, where=where))


@dataclass(frozen=True)
class SizeCheck:
    """Holds calls to what the capture of a graph took for granted, each set of sizes once.

    `captured` and `longer` are as `Assumptions.check` takes them. `known`: what was wrong with which sizes.
    """

    assumptions: Assumptions
    captured: fx.Graph
    longer: Mapping[str, int]
    known: dict[tuple[Any, ...], tuple[Diagnostic, ...]] = field(default_factory=dict)
    traced: dict[bool, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = list(self.assumptions.inputs)
        for labelled in (True, False):
            given = [name for name in names if labelled or name not in LOSS_INPUTS]
            self.traced[labelled] = self.assumptions.as_code(given, self.longer)

    def refusal(self, given: Mapping[str, Any]) -> PeftcError | None:
        """What speaks against a call with these inputs (`other-sizes`), if anything does."""
        shapes = {name: value.shape for name, value in given.items() if isinstance(value, torch.Tensor)}
        sizes = (*shapes.keys(), *shapes.values())
        if sizes not in self.known:
            try:
                self.assumptions.check(shapes, self.captured, self.longer)
            except PeftcError as error:  # whose traceback holds the inputs
                self.known[sizes] = error.diagnostics
            else:
                self.known[sizes] = ()
        return PeftcError(*self.known[sizes]) if self.known[sizes] else None

    def seen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call in the sizes in which the model sees them."""
        return {
            name: torch.cat([value, value[:, :1].expand(-1, self.longer[name])], 1) if name in self.longer else value
            for name, value in given.items()
        }

    def holds_traced(self, given: Mapping[str, Any]) -> bool:
        """Whether the sizes are those that the capture was for, in code that `torch.compile` can trace.

        What operations ask must be answered as it was: that shapes come out as captured cannot be looked up here.
        """
        fixed, read, answer = self.traced[all(name in given for name in LOSS_INPUTS)]
        return all(given[name].shape[place] == size for name, place, size in fixed) and all(
            answer(*[given[name].shape[place] + more for name, place, more in read])
        )


def _function(symbols: tuple[sympy.Symbol, ...], asked: list[sympy.Basic]) -> Any:
    """A function of the symbols' values that answers all that is asked."""
    return sympy.lambdify(list(symbols), asked, modules=[{"math": math, "torch": torch}], printer=PythonPrinter())


def _comes_out_otherwise(graph: fx.Graph, sizes: Mapping[sympy.Symbol, int], given: Container[str]) -> str:
    """Where the graph computes a tensor at `sizes` that has not the shape it was captured with; "" if nowhere.

    What is made of inputs that are not `given`, and what the body of a higher-order operator makes, is left out.
    """
    known: dict[fx.Node, Any] = {}
    same: dict[str, Any] = {}  # equal blocks ask the same
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in graph.nodes:
            claimed = node.meta.get("val")
            if node.op in ("placeholder", "get_attr"):
                absent = node.op == "placeholder" and node.target not in given
                if isinstance(claimed, torch.Tensor) and not absent:
                    known[node] = torch.empty(_at(claimed.shape, sizes), dtype=claimed.dtype, device=claimed.device)
                continue
            if node.op != "call_function" or any(argument not in known for argument in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            key = f"{node.target} {pytree.tree_map(_signature, (args, kwargs))}"
            try:
                known[node] = same[key] if key in same else same.setdefault(key, node.target(*args, **kwargs))
            except Exception as error:
                return f"{_line(node)} ({str(error).splitlines()[0]})"
            if _shapes(known[node]) != [_at(shape, sizes) for shape in _shapes(claimed)]:
                return _line(node)
    return ""


def _shapes(computed: Any) -> list[tuple[Any, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(computed) if isinstance(leaf, torch.Tensor)]


def _at(shape: Iterable[Any], sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """A shape with the symbols' values put in."""
    return tuple(int(sympy.sympify(expression(size)).xreplace(sizes)) for size in shape)


def _signature(given: Any) -> Any:
    return (tuple(given.shape), given.dtype) if isinstance(given, torch.Tensor) else given


def _line(node: fx.Node) -> str:
    """The line of the model that a node comes from."""
    lines = str(node.meta.get("stack_trace", "")).strip().splitlines()
    return " ".join(line.strip() for line in lines[-2:]) or node.name
