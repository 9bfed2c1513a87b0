"""Where a kernel is moved along one to three dimensions: torch's convolutions, grouped, strided, dilated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, fx, torch
from peftc.protocol.site import Projection, Site, Use
from peftc.protocol.sites import site

if TYPE_CHECKING:
    from peftc.graph import ir
else:
    ir = Lazy("peftc.graph.ir")


@cache
def _operations() -> dict[Any, int]:
    """The operations, and how many dimensions the kernel of each has."""
    aten = torch.ops.aten
    named = {aten.conv1d: 1, aten.conv2d: 2, aten.conv3d: 3}
    return {getattr(packet, way): n for packet, n in named.items() for way in ("default", "padding")}


@site
@dataclass(frozen=True, eq=False, repr=False)
class Conv(Projection):
    """y = W * x + b, with W of shape [n_out, n_in / groups, *kernel]; channels are what a linear layer's features are.

    x is [batch, n_in, *places], and y [batch, n_out, *places].
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    kind = "conv"
    own_roles: ClassVar = ("conv",)
    fields: ClassVar = ("groups",)
    noun, nouns, written = "a convolution", "convolutions", "conv"
    features_last = False

    def facts(self) -> dict[str, Any]:
        way = {name: getattr(self, name) for name in ("kernel", "stride", "padding", "dilation", "groups")}
        return {**super().facts(), **way}

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return (self.n_out, self.each, *self.kernel)

    @property
    def each(self) -> int:
        """The channels that one of y's is made of."""
        return self.n_in // self.groups

    @property
    def taps(self) -> int:
        """How many numbers of one channel the kernel reads at once."""
        return math.prod(self.kernel)

    def convolve(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """x as the base convolves it, by another `weight` [n, n_in / groups, *kernel]."""
        made: Tensor = self._function(x, weight, None, self.stride, self.padding, self.dilation, groups or self.groups)
        return made

    def mix(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """Of channels x [batch, r, *places] others at each place, by `weight` [n, r / groups, 1, …]."""
        made: Tensor = self._function(x, weight, None, 1, 0, 1, groups or self.groups)
        return made

    def beside(self, vector: Tensor) -> Tensor:
        """A number a channel, [n], as it goes with y: [n, 1, …]."""
        return vector.reshape(-1, *(1 for _ in self.kernel))

    @property
    def _function(self) -> Any:
        return {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]

    @classmethod
    def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
        found: dict[str, list[fx.Node]] = defaultdict(list)
        for node in module.graph.nodes:
            if node.target in _operations() and _is_parameter(module, node.args[1]):
                found[str(node.args[1].target)].append(node)
        for weight, nodes in found.items():
            biases = [node.args[2] for node in nodes if len(node.args) > 2 and node.args[2] is not None]
            if not all(_is_parameter(module, bias) for bias in biases):
                continue
            made = [cls._at(weight, node) for node in nodes]
            first, uses = made[0], tuple(use for one in made for use in one.uses)
            mixed = any((one.facts(), one.bias) != (first.facts(), first.bias) for one in made)
            yield replace(first, uses=uses, mixed=mixed)

    @classmethod
    def _at(cls, weight: str, node: fx.Node) -> Conv:
        operands: list[Any] = [*node.args]
        n = _operations()[node.target]
        bias = operands[2] if len(operands) > 2 else None
        way: list[Any] = [*operands[3:], *(1, 0, 1, 1)[max(len(operands) - 3, 0) :]]
        stride, padding, dilation, groups = way
        n_out, each, *kernel = map(int, ir.value(operands[1]).shape)
        path = weight.rpartition(".")[0] or weight
        names = (weight, str(bias.target)) if isinstance(bias, fx.Node) else (weight,)
        return cls(
            path, path, frozenset(cls.own_roles), parameters=names, n_in=each * groups, n_out=n_out, weight=weight,
            owner=weight, bias=names[1] if len(names) > 1 else None,
            tied=any(user.target not in _operations() for user in operands[1].users),
            uses=(Use(node, node, 0),), kernel=tuple(kernel), stride=_each(stride, n),
            padding=padding if isinstance(padding, str) else _each(padding, n), dilation=_each(dilation, n),
            groups=groups,
        )  # fmt: skip

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        """A small one, a strided, dilated and grouped one with a bias, and a large one."""
        names: dict[str, Any] = {"weight": "sample.weight", "owner": "sample.weight", "n_in": 16, "n_out": 24}
        small = cls(
            "sample", "sample", frozenset(cls.own_roles), parameters=("sample.weight",), **names,
            kernel=(3, 5), stride=(1, 1), padding=(1, 2), dilation=(1, 1),
        )  # fmt: skip
        names = {"parameters": ("sample.weight", "sample.bias"), "bias": "sample.bias"}
        apart = replace(small, **names, kernel=(3,), stride=(2,), padding="valid", dilation=(3,), groups=2)
        return small, apart, replace(small, n_in=512, n_out=1024)

    def narrow(self, x: fx.Node, features: int) -> tuple[Any, ...]:
        made = ir.value(next(use.y for use in self.uses if use.x is x)).shape
        return (*made[: -1 - len(self.kernel)], features, *made[-len(self.kernel) :])


def undilated(site: Site) -> str | None:
    """Why HF PEFT's A, which reads neighbours, is another than ours at a dilated convolution, or None."""
    apart = isinstance(site, Conv) and any(d > 1 for k, d in zip(site.kernel, site.dilation, strict=True) if k > 1)
    return f"its A reads neighbours, where {site.name} reads numbers apart (dilation)" if apart else None


def planar(site: Conv) -> tuple[int, ...]:
    """The kernel's size, in two dimensions at least: so LyCORIS and HF PEFT keep the cores of a Tucker form."""
    return (*site.kernel, 1) if len(site.kernel) == 1 else site.kernel


def core(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """a b, [n, r] by [r, m]; with a core `t` [r, r, *kernel] a kernel [n, m, *kernel], of a [r, n] and b [r, m]."""
    return a @ b if t is None else torch.einsum("ij...,ip,jq->pq...", t, a, b)


def core_keeps(n: int, r: int, taps: int) -> int:
    """Numbers that the backward pass of `core` with a core needs: that as it is multiplied by a, and the product."""
    return (r * r * taps if r > 1 else 0) + n * r * taps


def _is_parameter(module: fx.GraphModule, operand: Any) -> bool:
    node = isinstance(operand, fx.Node) and operand.op == "get_attr"
    return node and isinstance(ir.get_attribute(module, str(operand.target)), torch.nn.Parameter)


def _each(given: Any, n: int) -> tuple[int, ...]:
    """A number a dimension; one number, or a list of one, is for all."""
    numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
    return numbers * n if len(numbers) == 1 else numbers
