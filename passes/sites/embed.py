"""Where rows of a table are looked up by numbers: torch's embeddings, of tokens, positions, kinds of segments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, fx, torch
from peftc.protocol.site import Projection, Site, Use
from peftc.protocol.sites import site

if TYPE_CHECKING:
    from peftc.graph import ir
else:
    ir = Lazy("peftc.graph.ir")

# HF PEFT's names of what stands beside a table -> ours.
TENSORS = {"lora_embedding_A": "A", "lora_embedding_B": "B"}


@site
@dataclass(frozen=True, eq=False, repr=False)
class Embedding(Projection):
    """y = W e_x, with e_x a column of the unit matrix: of the table, which is W transposed, row x.

    x [...] are whole numbers, y [..., n_out]. No gradient goes to row `padding`, and where it is `by_frequency`, a
    row's is divided by how often it was looked up. `others`: modules that look into the same table, too.
    """

    padding: int | None = None
    by_frequency: bool = False
    others: tuple[str, ...] = ()

    kind = "embed"
    own_roles: ClassVar = ("embed",)
    fields: ClassVar = ("tokens", "width")
    noun, nouns, written = "an embedding", "embeddings", "embed"
    features_last = False

    def facts(self) -> dict[str, Any]:
        return {"tokens": self.n_in, "width": self.n_out, "padding": self.padding, "by_frequency": self.by_frequency}

    def look_up(self, x: Tensor, A: Tensor) -> Tensor:
        """A e_x for A [r, n_in], as the base looks into its table: [..., r]."""
        return F.embedding(x, A.t(), self.padding, scale_grad_by_freq=self.by_frequency)

    @property
    def unmergeable(self) -> str | None:
        """Why no table does the same, or None."""
        return f"{self.others[0]} looks into the same table, which would change there, too" if self.others else None

    @classmethod
    def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
        found: dict[str, list[Embedding]] = defaultdict(list)
        looking: dict[str, set[str]] = defaultdict(set)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
            table: Any = node.args[0]
            is_there = isinstance(table, fx.Node) and table.op == "get_attr"
            if is_there and isinstance(ir.get_attribute(module, str(table.target)), torch.nn.Parameter):
                made = cls._at(node, table, ir.own_name(str(table.target), ir.module_path(node), names))
                found[made.name].append(made)
                looking[made.weight].add(made.name)
        for name, (first, *more) in found.items():
            uses = tuple(use for one in (first, *more) for use in one.uses)
            mixed = any(one.facts() != first.facts() for one in more)
            yield replace(first, uses=uses, mixed=mixed, others=tuple(sorted(looking[first.weight] - {name})))

    @classmethod
    def _at(cls, node: fx.Node, table: fx.Node, owner: str) -> Embedding:
        further: list[Any] = [*node.args[2:4], *(-1, False)[max(len(node.args) - 2, 0) :]]
        padding, by_frequency = further
        tokens, width = map(int, ir.value(table).shape)
        path = owner.rpartition(".")[0] or owner
        tied = any(user.target is not node.target or user.args[0] is not table for user in table.users)
        return cls(
            path, path, frozenset(cls.own_roles), parameters=(str(table.target),), n_in=tokens, n_out=width,
            weight=str(table.target), owner=owner, transposed=True, tied=tied, uses=(Use(node, node, 1),),
            padding=None if padding == -1 else padding, by_frequency=by_frequency,
        )  # fmt: skip

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        """One of tokens, and one of few positions."""
        names: dict[str, Any] = {"weight": "sample.weight", "owner": "sample.weight", "transposed": True}
        roles = frozenset(cls.own_roles)
        tokens = cls("sample", "sample", roles, parameters=("sample.weight",), n_in=99, n_out=32, padding=3, **names)
        return tokens, replace(tokens, n_in=24, n_out=40, padding=None)

    @staticmethod
    def undropped(dropout: float) -> str | None:
        """Why there is no dropout on x, where it is asked for."""
        return "dropout is on numbers that enter a layer, and here rows of a table are looked up" if dropout else None

    def narrow(self, x: fx.Node, features: int) -> tuple[Any, ...]:
        return (*x.meta["val"].shape, features)
