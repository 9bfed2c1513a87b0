"""The kinds of place in a model that a method can attach to. `peftc.roles` finds them, `passes/sites` more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from peftc.protocol import Tensor, fx, torch


@dataclass(frozen=True, slots=True)
class Use:
    """One place in the graph where a linear weight is applied.

    `op` is the node that multiplies (its first tensor operand is x); `y` is the node that has the bias too.
    They are the same node for `aten.linear` and `aten.addmm`. In a grouped product, `offsets` [experts] is where each
    expert's tokens end among the sorted ones. Of a weight that some rows of are multiplied by, `first` is their first.
    """

    op: fx.Node
    y: fx.Node
    x_index: int
    offsets: fx.Node | None = None
    first: int = 0

    @property
    def x(self) -> fx.Node:
        """The input as the graph has it now: rewriting an earlier site may have changed it."""
        return cast("fx.Node", self.op.args[self.x_index])


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the model. `name` is unique; `path` is the module under which methods keep their state.

    `name` begins with `path`, and there is no need that a module stands there. From `parameters`, those that the place
    has, or from the name where it has none, follow `layer`, `stack` and `block`: nobody else gives these.

    A kind of place says in words what it is: `noun` one of it, `nouns` what attaches there attaches to, `written` what
    a spec says for it. `own_roles` are the words by which selectors name it, of which each site has some for its
    `roles`; `fields` are the names in `facts` that `where` may ask for.

    A new kind is a frozen dataclass in a file under `passes/sites`, with what a place has as fields, registered by
    `peftc.protocol.sites.site`: it gives the words, `find`, `samples`, and what a method there `reads` and `changes`. A
    method's rewrite is handed the first value that the site reads and the first that it changes, as other methods have
    left them, and what it returns is read in place of that one. A `SublayerMethod` whose `site` is the kind is one for
    it (`from ..sites.FILE import KIND`); a kind that is a `Sublayer` takes the methods of sublayers as it is.
    """

    name: str
    path: str
    roles: frozenset[str]
    layer: int | None = None
    stack: str | None = None
    block: str | None = None
    parameters: tuple[str, ...] = ()

    kind: ClassVar[str] = "site"
    own_roles: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()
    noun, nouns, written = "a site", "sites", "where its method does"

    def facts(self) -> dict[str, Any]:
        """The numbers `where` may ask for, and `--json` prints.

        All that a rewrite looks at, too: it is traced once for places whose facts and values are alike.
        """
        return {}

    @classmethod
    def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
        """Every place of this kind in a captured graph; those of `peftc.protocol.site` are found by `peftc.roles`.

        Nodes have their fake value in `meta["val"]`; `peftc.graph.ir` has what reads them. Operations are ATen's, as
        `torch.export` leaves them, not decomposed. `names`: all that the model calls each parameter of the graph.
        """
        return iter(())

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        """Small ones of this kind in no model, with all that a method's state may depend on, for its names to be known.

        Empty where a method has to see a model first: what its rewrite asks for is not checked then.
        """
        return ()

    def reads(self) -> tuple[fx.Node, ...]:
        """The base model's values that a branch here reads; those it keeps for the backward pass are among them."""
        return ()

    def changes(self) -> tuple[fx.Node, ...]:
        """The base model's values that become others where a method acts here: from there on gradients flow."""
        return ()

    def narrow(self, x: fx.Node, features: int) -> tuple[Any, ...]:
        """The shape of what a branch that reads `x` makes of it on its way: `features` a token."""
        return (*x.meta["val"].shape[:-1], features)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name} {sorted(self.roles)}>"


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Site):
    """y = x Wᵀ + b, with W of shape [*batch, n_out, n_in] (`transposed`: stored as [*batch, n_in, n_out]).

    `rows` are the output features this site owns in a fused weight (None: all of them), in weight order;
    `n_out` counts only those. `weight` is the tensor's name in the graph, `owner` the layer's own name for it: they
    differ where the tensor is `tied` to another layer's. `mixed`: the weight is applied in two ways, such as itself and
    its transpose, so that no one change of it is this layer's. `within`: islands that read it; methods change that.
    """

    n_in: int = 0
    n_out: int = 0
    weight: str = ""
    owner: str = ""
    bias: str | None = None
    transposed: bool = False
    rows: tuple[int, ...] | None = None
    tied: bool = False
    mixed: bool = False
    uses: tuple[Use, ...] = ()
    within: tuple[fx.Node, ...] = ()
    features_last: ClassVar[bool] = True  # of x and y; elsewhere no site is a part, and each use is of all the weight

    def facts(self) -> dict[str, Any]:
        return {"in_features": self.n_in, "out_features": self.n_out}

    def reads(self) -> tuple[fx.Node, ...]:
        return tuple(use.x for use in self.uses)

    def changes(self) -> tuple[fx.Node, ...]:
        return (*(use.y for use in self.uses), *self.within)

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions of the weight, and of every matrix of a method here."""
        return ()

    @property
    def is_part(self) -> bool:
        """Whether it is some rows of a fused weight, and not all of it."""
        return self.rows is not None

    def overlaps(self, other: Projection) -> bool:
        """Whether this and another site of the same weight have rows in common."""
        return self.rows is None or other.rows is None or not set(self.rows).isdisjoint(other.rows)

    @property
    def slice(self) -> tuple[int, int] | None:
        """`rows` as a half-open range where they are one, which they are in most fused weights."""
        if self.rows is None or self.rows[-1] - self.rows[0] + 1 != len(self.rows):
            return None
        return self.rows[0], self.rows[-1] + 1


@dataclass(frozen=True, eq=False, repr=False)
class Linear(Projection):
    """One matrix W [n_out, n_in], the same for every token."""

    kind = "linear"
    noun, nouns, written = "a linear layer", "linear layers", "linear layers"

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        """A small one, one with a bias that leads down from a feed-forward's middle, and a large one."""
        names: dict[str, Any] = {"weight": "sample.weight", "owner": "sample.weight", "n_in": 128, "n_out": 64}
        small = cls("sample", "sample", frozenset({"linear"}), parameters=("sample.weight",), **names)
        biased = replace(small, parameters=("sample.weight", "sample.bias"), bias="sample.bias")
        return small, replace(biased, roles=frozenset({"linear", "mlp.down"})), replace(small, n_in=2048, n_out=512)


@dataclass(frozen=True, eq=False, repr=False)
class Experts(Projection):
    """A stack of matrices W [experts, n_out, n_in], one for each token that the router sends there.

    x [tokens x choices, n_in] is sorted by expert, and one grouped product serves all of them.
    """

    experts: int = 0

    kind = "experts"
    noun, nouns, written = "a stack of experts", "stacked expert weights", "stacked experts"

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "experts": self.experts}

    @property
    def batch(self) -> tuple[int, ...]:
        return (self.experts,)

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        names: dict[str, Any] = {"weight": "sample", "owner": "sample", "n_in": 128, "n_out": 64, "experts": 2}
        return (cls("sample", "sample", frozenset({"expert"}), parameters=("sample",), **names),)


@dataclass(frozen=True, eq=False, repr=False)
class Sublayer(Site):
    """A sublayer (attention or feed-forward): `x` enters it, `h` leaves it just before the residual add.

    `repeated`: it runs more than once, and these are the values of one run.
    """

    width: int = 0
    entry_width: int = 0
    entry: Use | None = None
    h: fx.Node | None = None
    repeated: bool = False

    kind = "module"
    noun, nouns, written = "a sublayer", "attn and mlp", "attn, mlp"

    def facts(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        return (cls("sample", "sample", frozenset({"mlp"}), parameters=("sample.weight",), width=128, entry_width=64),)

    def reads(self) -> tuple[fx.Node, ...]:
        return () if self.entry is None else (self.entry.x,)

    def changes(self) -> tuple[fx.Node, ...]:
        return () if self.h is None else (self.h,)


@dataclass(frozen=True, slots=True)
class Reading:
    """A cross attention, as what it does to values: `out` is their product with the weights, at operand `values`.

    A rewrite may give the same weights, masks and all, values of its own.
    """

    out: fx.Node
    values: int


@dataclass(frozen=True, eq=False, repr=False)
class Block(Site):
    """One of a model's repeated blocks: `x` is the hidden state that enters it, `h` the one that leaves it.

    Both are [..., width], and None where no residual stream runs through the block. `top`: no block of its container
    follows. `readers`: the containers of the blocks that depend on `h` further up, other than its own; `reading`: the
    attention by which it reads the blocks in container `source`. `repeated`: it runs more than once.

    What one statement names in one container is a chain: `before` and `after` are the block's neighbours in it,
    `memory` is the last block of the chain that its cross attention reads. `feeds`: another chain's blocks read this.
    """

    width: int = 0
    x: fx.Node | None = None
    h: fx.Node | None = None
    top: bool = False
    repeated: bool = False
    readers: tuple[str, ...] = ()
    reading: Reading | None = None
    source: str | None = None
    before: Block | None = None
    after: Block | None = None
    memory: Block | None = None
    feeds: bool = False

    kind = "block"
    noun, nouns, written = "a block", "block", "block"

    def facts(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        """The only one of a chain, the last of one, and one that reads another chain."""
        alone = cls("sample.0", "sample.0", frozenset({"block"}), parameters=("sample.weight",), width=128, top=True)
        return alone, replace(alone, before=alone), replace(alone, memory=alone)

    def reads(self) -> tuple[fx.Node, ...]:
        """What leaves the block; at the first of a chain what enters it; what an attention to another chain reads."""
        entering = [self.x] if self.before is None else []
        attention = self.reading.out.args if self.reading and self.memory else ()
        nodes = [node for node in attention if isinstance(node, fx.Node)]
        operands = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        return tuple(node for node in (self.h, *entering, *operands) if node is not None)

    def changes(self) -> tuple[fx.Node, ...]:
        return () if self.h is None else (self.h,)

    @property
    def container(self) -> str:
        """The path of the module that holds the blocks."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, eq=False, repr=False)
class Sequence(Site):
    """The embedded input [batch, length, width], at the node where embeddings given by hand would enter.

    `tokens` is the input that counts its positions. `filled`: each input with an entry a position, and what stands
    there at a prompt's positions; `position_ids` goes on counting instead. `positions`: the longest sequence that the
    model has positions for (None: any). `length`: the number of positions where the graph has it as a constant, as
    for an image. `in_front`: whether a prompt stands before the input or, where the model reads its own tokens by
    their place and no position matters any more, behind it. `obstacle`: why no prompt fits in, if none does.
    """

    width: int = 0
    vocabulary: int | None = None
    positions: int | None = None
    tokens: str = ""
    filled: tuple[tuple[str, int], ...] = ()
    position_ids: str | None = None
    mask: str | None = None
    length: int | None = None
    in_front: bool = True
    obstacle: str | None = None
    embeddings: fx.Node | None = None
    tokenize: Callable[[str], list[int] | None] = lambda _text: None

    kind = "sequence"
    noun, nouns, written = "a sequence", "the whole input", "the whole input"

    def facts(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        names = ("sample.weight",)
        return (cls("sample", "sample", frozenset(), parameters=names, width=128, vocabulary=100, tokens="input_ids"),)

    def changes(self) -> tuple[fx.Node, ...]:
        return () if self.embeddings is None else (self.embeddings,)

    def join(self, prompt: Tensor, x: Tensor) -> Tensor:
        """`prompt` [k, d] and every row of `x` [B, S, d] as one sequence [B, k + S, d]."""
        rows = prompt.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([rows, x] if self.in_front else [x, rows], 1)


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """The operands of one attention, wherever it is spelt out, and the node with its result.

    `scores` is the node that multiplies q with k and `softmax` the one behind it; both are None where one fused
    operation does everything.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    scores: fx.Node | None = None
    softmax: fx.Node | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Sublayer):
    """A sublayer whose attention is understood: softmax(q kᵀ) v with q of `heads` heads.

    Keys have `kv_heads` heads of `key_width` features each, values of `value_width`. The attention reads k and v with
    heads of its own count; `groups` says which key head each of them is, where it is one. `key` and `value` are the
    layers that project them. `positions` is how many tokens the model can count, where a table of learned positions
    says so. `obstacle`: why nothing can stand beside its keys, if so.
    """

    pattern: AttentionPattern | None = None
    heads: int = 0
    kv_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    groups: tuple[int, ...] = ()
    key: Linear | None = None
    value: Linear | None = None
    cross: bool = False
    positions: int | None = None
    obstacle: str | None = None

    kind = "attention"
    noun, nouns, written = "a sublayer", "attn", "attn"

    def facts(self) -> dict[str, Any]:
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "head_width": self.key_width}
        return {**super().facts(), **heads}

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        layer = Linear("sample.k", "sample.k", frozenset(), parameters=("sample.k",), n_in=128, n_out=64, weight="k")
        heads: dict[str, Any] = {"heads": 4, "kv_heads": 4, "key_width": 16, "value_width": 16, "groups": (0, 1, 2, 3)}
        return (
            cls(
                "sample", "sample", frozenset({"attn"}), parameters=("sample.k",), width=128, entry_width=128,
                key=layer, value=layer, **heads,
            ),
        )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Parameters(Site):
    """Existing parameters with no place for a new branch: norms, biases, embeddings, convolutions."""

    kind = "parameters"
    noun, nouns, written = "an existing parameter", "existing parameters", "existing parameters"
