"""Counts what a step would launch on CUDA: it runs on the meta device, where operations are sizes and no numbers.

One operation of ATen below its composites is one launch; so is one Triton kernel. An operation that is made of others
on every device is followed into them, as torch itself does it, and peftc's own run what they run on CUDA.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftc.bench.counting.sources import touched
from peftc.bench.counting.traffic import bytes_of, place, traffic
from peftc.bench.errors import NeedsValues
from peftc.bench.flops import formulas
from peftc.diagnostics.diagnostic import PeftcError
from peftc.kernels.common.operation import cuda_function

aten = torch.ops.aten
LOCK = threading.RLock()  # an operation of peftc's may call another
# Made of other operations, on every device that has no kernel of its own for them.
IMPLICIT = DispatchKey.CompositeImplicitAutograd
COMPOSED = (DispatchKey.CompositeExplicitAutograd, DispatchKey.CompositeExplicitAutogradNonFunctional)
# Operations that have a kernel on CUDA, and elsewhere are composed or what a backend makes of them.
OF_CUDA = frozenset(
    f"aten::{name}" for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "convolution", "convolution_backward")
)


@dataclass(frozen=True)
class Launch:
    """One launch: what it is a part of, bytes read and written, operations of products."""

    name: str
    read: int
    written: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read + self.written


class Meter(TorchDispatchMode):
    """Counts, while it is entered, what would be launched for the meta tensors' operations.

    `launches` has each kind of launch and how often it occurred, `waits` how often the host would wait for a value.

    Raises:
        PeftcError: `needs-values` where a model decides something by the numbers in a tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[Launch] = Counter()
        self.waits = 0
        self._formulas = formulas()
        self._outer: list[str] = []
        self._inside = 0  # peftc's own operations that are being run

    @property
    def flops(self) -> int:
        """Operations of products, of all launches."""
        return sum(launch.flops * count for launch, count in self.launches.items())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default):
            return self._value(func, args)
        if (function := cuda_function(func)) is not None:
            return self._own(func, function, args)
        if (key := _composed(func)) is not None:
            return self._parts(func, key, args, kwargs)
        result = func(*args, **kwargs)
        moved = traffic(func, args, kwargs, result)
        if moved is not None:
            self._add(self._name(func), moved, self._products(func, args, kwargs, result))
        return result

    def _value(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What the host is told of a tensor.

        A model asks for a truth when it looks for padding, or for texts packed into one row: all is as it should be.
        What peftc's operations ask for is answered so that they go their longest way.
        """
        self.waits += 1
        given = args[0]
        if func is aten._local_scalar_dense.default and given.dtype is torch.bool:
            return not self._inside
        if func is aten.nonzero.default and self._inside:
            found = given.new_empty((given.numel(), given.dim()), dtype=torch.int64)
            self._add(self._name(func), (bytes_of(given), bytes_of(found)))
            return found
        raise PeftcError(NeedsValues(operation=str(func)))

    def _own(self, func: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """One of peftc's: the products that its formula has and ATen's in it have not are those of its kernels."""
        before = self.flops
        largest: list[Launch] = []
        self._inside += 1
        try:
            with ExitStack() as stack:
                stack.enter_context(_told(func._schema.name.replace("::", "."), self._outer))
                stack.enter_context(self)
                stack.enter_context(_IsCuda())
                stack.enter_context(intercepted(lambda *launch: largest.append(self.launched(*launch))))
                result = function(*args)
        finally:
            self._inside -= 1
        rest = self._products(func, args, {}, result) - (self.flops - before)
        if rest > 0 and largest:
            self._give(max(largest, key=lambda launch: launch.bytes), rest)
        return result

    def _give(self, launch: Launch, flops: int) -> None:
        """Products for a launch that was counted without."""
        self.launches[launch] -= 1
        self.launches += Counter()  # without those of which none is left
        self.launches[Launch(launch.name, launch.read, launch.written, launch.flops + flops)] += 1

    def launched(self, kernel: Any, given: dict[str, Any]) -> Launch:
        """A launch of a Triton kernel."""
        used = touched(kernel, given)
        sizes = []
        for names in (used.read, used.written):
            found = {place(item): item for name, item in given.items() if name in names and isinstance(item, Tensor)}
            sizes.append(sum(map(bytes_of, found.values())))
        return self._add(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}", (sizes[0], sizes[1]))

    def _parts(self, func: Any, key: DispatchKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _told(func._schema.name.rpartition("::")[2], self._outer), self:
            return func._op_dk(key, *args, **kwargs)

    def _name(self, func: Any) -> str:
        return self._outer[0] if self._outer else func._schema.name.replace("aten::", "").replace("::", ".")

    def _products(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        formula = self._formulas.get(func._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))

    def _add(self, name: str, moved: tuple[int, int], flops: int = 0) -> Launch:
        launch = Launch(name, *moved, flops)
        if launch.bytes:  # of no elements nothing is launched
            self.launches[launch] += 1
        return launch


@lru_cache(maxsize=4096)
def _composed(func: Any) -> DispatchKey | None:
    """By which key an operation is made of others; None where each device has a kernel for it."""
    has: Any = torch._C._dispatch_has_kernel_for_dispatch_key
    name = func.name()
    if func.namespace != "aten" or has(name, "CPU") or name in OF_CUDA:
        return None
    if has(name, IMPLICIT.name):
        return IMPLICIT
    if _is_view(func) or name == "aten::copy_":
        return None
    return next((key for key in COMPOSED if has(name, key.name)), None)


def _is_view(func: Any) -> bool:
    """Whether all that comes back is in the memory of what was given, which stays as it was."""
    returned = [one.alias_info for one in func._schema.returns]
    return all(info is not None and not info.is_write for info in returned)


@contextmanager
def _told(name: str, outer: list[str]) -> Iterator[None]:
    """What is launched inside is a part of `name`."""
    outer.append(name)
    try:
        yield
    finally:
        outer.pop()


class _IsCuda(TorchFunctionMode):
    """To who asks, tensors are on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def intercepted(seen: Callable[[Any, dict[str, Any]], object]) -> Iterator[None]:
    """Triton kernels that this thread launches are told to `seen`, with their arguments by name, and not run."""
    import triton

    thread = threading.get_ident()
    with LOCK:
        launch = triton.JITFunction.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            seen(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)

        triton.JITFunction.run = run
        try:
            yield
        finally:
            triton.JITFunction.run = launch
