"""What a module returns that is not traced: found out by running its own code at several sizes of what it is given.

It runs on numbers that stand for an input's, and on stand-ins for its weights where these have none. What comes back
says which sizes follow from which, and whether the module may be one operation: it must return new tensors, leave what
it was given as it was, and compute the same when it is called again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from transformers.exporters.utils import patch_attributes

from peftc.capture.untouched import untouched
from peftc.graph.ir import expression
from peftc.kernels.island import Call, Layout, called

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
UNKNOWN = 4  # a size that no example says
SCALES = 0.01, 100.0, -1.0  # of weights: what goes by their numbers may go another way
SETS = 64  # of symbols that are tried to be one
Values = Mapping[sympy.Symbol, int]
Recipe = tuple[Any, ...]  # how a size follows from those that are given


class NotToBeToldError(Exception):
    """A module cannot be one operation, and why."""


@dataclass(frozen=True)
class _Run:
    """What came of one: of each leaf of the result what it is, and the sizes of each tensor that was made."""

    results: tuple[tuple[str, Any], ...]
    spec: pytree.TreeSpec
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]
    made: tuple[Tensor, ...]


class Trials:
    """Of one call of a module in a trace: `given` and `numbers` are the tensors and sizes it is called with.

    `leaves` says what each leaf of its arguments is, `own` are the module's tensors, with numbers or without.
    """

    def __init__(
        self, skeleton: nn.Module, own: Mapping[str, Tensor], leaves: tuple[tuple[str, Any], ...],
        spec: pytree.TreeSpec, given: Sequence[Tensor], numbers: Sequence[Any],
    ) -> None:  # fmt: skip
        self.skeleton, self.own = skeleton, own
        self.leaves, self.spec, self.given, self.numbers = leaves, spec, given, numbers
        self.open: list[Any] = [size for tensor in given for size in tensor.shape if isinstance(size, torch.SymInt)]
        self.open += [number for number in numbers if isinstance(number, torch.SymInt)]

    def looks(self) -> Any:
        """What is equal of calls of which one is tried."""
        given = ((tuple(map(expression, one.shape)), one.dtype, one.device) for one in self.given)
        own = ((name, tuple(one.shape), one.dtype) for name, one in self.own.items())
        return str(self.spec), self.leaves, tuple(given), tuple(map(expression, self.numbers)), tuple(own)

    def call(self) -> tuple[Call, tuple[Recipe, ...]]:
        """How the module is called, and how the sizes of what it makes follow.

        Raises:
            NotToBeToldError: where it cannot be one operation.
        """
        problem: NotToBeToldError | None = None
        for fill in (1, 0):
            try:
                with alone(), untouched(self.skeleton):
                    return self._call(fill)
            except NotToBeToldError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _call(self, fill: int) -> tuple[Call, tuple[Recipe, ...]]:
        values = self._values()
        first = self._run(values, fill)
        for seed, scale in enumerate(SCALES, 1):
            if self._run(values, fill, scale=scale, seed=seed).sizes != first.sizes:
                raise NotToBeToldError("the sizes of what it returns depend on numbers")
        if not all(map(_equal, first.made, self._run(values, fill).made)):
            raise NotToBeToldError("it computes something else when it is called again")
        tried: list[Values] = [values]
        runs = [first]
        others = dict(values)
        for symbol in values:
            changed, run = self._varied(values, symbol, fill)
            tried.append(changed)
            runs.append(run)
            others |= {one: size for one, size in changed.items() if size != values[one]}
        if len(values) > 1:
            tried.append(others)
            runs.append(self._run(others, fill))
        runs.append(self._run(values, fill, training=False))
        tried.append(values)
        if any((run.results, run.layouts) != (first.results, first.layouts) for run in runs):
            raise NotToBeToldError("what it returns is another thing at other sizes, or in eval()")
        if not first.layouts:
            raise NotToBeToldError("it returns no tensor that it has made")
        known = [[_at(size, one) for one in tried] for size in self.open]
        recipes = tuple(_recipe([run.sizes[place] for run in runs], known) for place in range(len(first.sizes)))
        return Call(self.leaves, self.spec, first.results, first.spec, first.layouts), recipes

    def _varied(self, values: Values, symbol: sympy.Symbol, fill: int) -> tuple[Values, _Run]:
        """Another size for a symbol, with which the module runs; for others of the same size, too, where it must be so.

        Raises:
            NotToBeToldError: where it runs with no other.
        """
        alike = [one for one in values if one != symbol and values[one] == values[symbol]]
        sets = [together for count in range(len(alike) + 1) for together in combinations(alike, count)]
        problem = NotToBeToldError("it is called with too many sizes")
        for together in sets[:SETS]:
            for other in (2 * values[symbol], values[symbol] + 1):
                changed = {**values, **dict.fromkeys((symbol, *together), other)}
                try:
                    return changed, self._run(changed, fill)
                except NotToBeToldError as error:
                    problem = error
        raise problem

    def sizes(self, recipes: Sequence[Recipe]) -> list[Any]:
        """What the recipes come to here."""
        return [_made_by(recipe, self.open) for recipe in recipes]

    def _values(self) -> dict[sympy.Symbol, int]:
        """The size of the example that each symbol is."""
        hints = {expression(size): size.node.hint for size in self.open}
        symbols = sorted({one for size in self.open for one in expression(size).free_symbols}, key=str)
        return {symbol: int(hints.get(symbol) or UNKNOWN) for symbol in symbols}

    def _run(self, values: Values, fill: int, *, training: bool = True, scale: float = 1.0, seed: int = 0) -> _Run:
        """One run; `scale`: of the numbers that its weights are."""
        seeded(seed)
        device = next((one.device for one in self.own.values() if _has_numbers(one)), torch.device("cpu"))
        own = {name: _standing_for(one, scale) for name, one in self.own.items()}
        given = [numbers_like(one, [_at(size, values) for size in one.shape], fill, device) for one in self.given]
        numbers = [_at(number, values) for number in self.numbers]
        watched = [*given, *own.values()]
        versions = [tensor._version for tensor in watched]
        known = Call(self.leaves, self.spec, (), self.spec, ())
        try:
            args, kwargs = known.arguments(given, numbers)
            result = called(self.skeleton, training, own, args, kwargs)
        except Exception as error:  # it may do anything
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotToBeToldError(f"it fails by itself: {line}") from error
        if [tensor._version for tensor in watched] != versions:
            raise NotToBeToldError("it writes on what it is given, or on its own buffers")
        return _read(result, given, watched)


def _read(result: Any, given: Sequence[Tensor], there: Sequence[Tensor]) -> _Run:
    """What a module returned.

    Args:
        result: all of it.
        given: the tensors that it was called with.
        there: these, and its own.
    """
    leaves, spec = pytree.tree_flatten(result)
    made: list[Tensor] = []
    results: list[tuple[str, Any]] = []
    taken = {tensor.untyped_storage()._cdata for tensor in there}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if (same := next((place for place, one in enumerate(given) if one is leaf), None)) is not None:
                results.append(("tensor", same))
                continue
            if leaf.layout is not torch.strided or leaf.untyped_storage()._cdata in taken:
                raise NotToBeToldError("what it returns lies in the memory of something else")
            taken.add(leaf.untyped_storage()._cdata)
            results.append(("made", len(made)))
            made.append(leaf)
        elif type(leaf) in PLAIN:
            results.append(("constant", leaf))
        else:
            raise NotToBeToldError(f"it returns a {type(leaf).__name__}")
    sizes = tuple(int(size) for tensor in made for size in tensor.shape)
    return _Run(tuple(results), spec, tuple(map(Layout.of, made)), sizes, tuple(made))


def leaf_of(leaf: Any, given: list[Tensor], numbers: list[Any]) -> tuple[str, Any]:
    """What a leaf of a call's arguments is: `given` and `numbers` get those that are no constants.

    Raises:
        NotToBeToldError: on what may be anything.
    """
    if isinstance(leaf, Tensor):
        place = next((place for place, one in enumerate(given) if one is leaf), len(given))
        given[place:] = given[place:] or [leaf]
        return "tensor", place
    if isinstance(leaf, torch.SymInt | torch.SymBool):
        numbers.append(leaf if isinstance(leaf, torch.SymInt) else torch.sym_ite(leaf, 1, 0))
        return ("number" if isinstance(leaf, torch.SymInt) else "truth"), len(numbers) - 1
    if type(leaf) in PLAIN:
        return "constant", leaf
    raise NotToBeToldError(f"it is called with a {type(leaf).__name__}")


def _recipe(sizes: Sequence[int], known: Sequence[Sequence[int]]) -> Recipe:
    """How a size, as it was in each run, follows from others."""
    if len({*sizes}) == 1:
        return ("number", sizes[0])
    for place, others in enumerate(known):
        first = next(run for run in range(1, len(sizes) + 1) if run == len(sizes) or others[run] != others[0])
        if first == len(sizes):
            continue
        factor, left = divmod(sizes[first] - sizes[0], others[first] - others[0])
        rest = sizes[0] - factor * others[0]
        if not left and all(size == factor * other + rest for size, other in zip(sizes, others, strict=True)):
            return ("sum", place, factor, rest)
    for one, other in combinations_with_replacement(range(len(known)), 2):
        products = [first * second for first, second in zip(known[one], known[other], strict=True)]
        factor = sizes[0] // products[0] if products[0] else 0
        if factor and all(size == factor * product for size, product in zip(sizes, products, strict=True)):
            return ("product", one, other, factor)
    raise NotToBeToldError("the sizes of what it returns do not follow from those of what it is given")


def _made_by(recipe: Recipe, known: Sequence[Any]) -> Any:
    match recipe:
        case ("sum", place, factor, rest):
            size = known[place] if factor == 1 else factor * known[place]
            return size + rest if rest else size
        case ("product", one, other, factor):
            return known[one] * known[other] if factor == 1 else factor * known[one] * known[other]
        case _:
            return recipe[1]


@contextmanager
def alone() -> Iterator[None]:
    """Nothing of what runs here is for the trace, and no random number is drawn of the caller's."""
    ours, theirs = random.getstate(), numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(patch_attributes([(nn.Module, "__call__", lambda _traced: nn.Module._wrapped_call_impl)]))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.no_grad())
        try:
            yield
        finally:
            random.setstate(ours)
            numpy.random.set_state(theirs)


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _at(size: Any, values: Values) -> int:
    """A size with the symbols' values put in."""
    return int(sympy.sympify(expression(size)).xreplace(values))


def _has_numbers(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def _standing_for(tensor: Tensor, scale: float) -> Tensor:
    """A tensor with numbers: the module's own, or one that takes no memory; parameters times `scale`."""
    if _has_numbers(tensor):
        scaled = scale != 1 and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return tensor.detach() * scale if scaled else tensor.detach()
    like = torch.full((), 0.01 * scale if tensor.is_floating_point() else 0, dtype=tensor.dtype, device="cpu")
    return like.expand([int(size) for size in tensor.shape])


def numbers_like(like: Tensor, sizes: list[int], fill: int, device: torch.device) -> Tensor:
    if like.is_floating_point():
        return torch.rand(sizes, dtype=torch.float32, device=device).to(like.dtype)
    return torch.full(sizes, fill, dtype=like.dtype, device=device)
