"""What a method is: one class that says what it learns, what it means and how it runs; and the registry of them.

A method is written once, in one file under `passes/methods`. Its fields become the language's parameters, the command
line's help and the README's table; `state` the counts of `peftc plan`; `delta` merging and the tests' oracle; `rewrite`
is traced and spliced into the graph. `peftc.protocol.stages` has a base class for each place where a method can act.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, TypeVar, cast, get_args

from peftc.protocol import F, Tensor, torch
from peftc.protocol.operands import check_operands, check_state, wanted
from peftc.protocol.params import REQUIRED, Configured, Param, demand, param, register, registered
from peftc.protocol.site import Linear, Site
from peftc.protocol.storage import Storage

__all__ = [
    "PLAIN", "REQUIRED", "Data", "Here", "Init", "LowRank", "Method", "Param", "Place", "Stage", "State", "Step",
    "kinds", "method", "methods", "param",
]  # fmt: skip

Init = Callable[[Tensor], Tensor]
M = TypeVar("M", bound="type[Method]")
Multiply = Callable[[Tensor, Tensor], Tensor]  # x, W -> x Wᵀ


class Stage(enum.IntEnum):
    """When a method's rewrite runs, whatever the order in the file. Within a stage, the file's order holds."""

    WEIGHT, OUTPUT, MODULE, ATTENTION, SEQUENCE = 1, 2, 3, 4, 5


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ."""
    return F.linear(x, weight)


class Data(enum.Enum):
    """What a method wants to see of calibration batches before it starts; `calibrate` is given it, summed over them."""

    INPUTS = "x\u1d40x of the site's inputs, [n_in, n_in]"
    WEIGHT_GRADIENTS = "squares of each example's gradient of the weight, [n_out, n_in]"
    STATE_GRADIENTS = "the state of `probe()` as it starts and its gradients, by name"


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a method keeps at a site, under `PATH.METHOD.NAME`. `init` fills it in place, as `torch.nn.init`.

    `dtype` is that of the weights it stands beside (fp32 beside half precision), unless it is given. Of indices `below`
    says how many things they choose from: it is asked of what was saved, which others may have written.
    """

    shape: tuple[int, ...]
    init: Init = lambda tensor: torch.nn.init.zeros_(tensor)
    trainable: bool = True
    dtype: torch.dtype | None = None
    below: int | None = None


@dataclass(frozen=True, slots=True)
class Here:
    """What is known of a place only where a method is put there.

    `product`: how the base multiplies, for the matrices of a branch: x, W -> x Wᵀ, for stacked experts each token with
    its own. `storage`: what the frozen weight is packed in once a method has taken its part out; None for a dense one.
    """

    product: Multiply = linear
    storage: Storage | None = None


PLAIN = Here()


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale B A d(x), all that a method adds to a product: A [r, n_in], B [n_out, r], d a dropout in training."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, eq=False)
class Place:
    """One site of a statement, with the method's tensors there, live: `state` by the method's own names."""

    site: Site
    state: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the optimiser that has just been made. `number` counts from 1 to `total`, where that is known."""

    number: int
    optimizer: torch.optim.Optimizer
    total: int | None = None

    def forget(self, tensor: Tensor) -> None:
        """Drops what the optimiser remembers of a tensor, such as Adam's moments."""
        self.optimizer.state.pop(tensor, None)


class _Starting:
    """Where a method's tensors start from, if `State.init` does not say it all."""

    data: Data | None = None

    def missing(self, site: Any) -> str | None:
        """What `initialise` needs and cannot get at, such as a tokenizer, or None."""
        return None

    def initialise(self, site: Any, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        """Fills state from the frozen weight [*batch, n_out, n_in], where the method starts from it."""

    def reads(self) -> tuple[str, str] | None:
        """A safetensors file that state starts from, and how the names of that state begin; None for no file."""
        return None

    def calibrate(self, site: Any, weight: Tensor, data: Any, state: dict[str, Tensor]) -> None:
        """Fills state, which `initialise` has filled already, from what `data` says the batches showed."""

    def probe(self) -> Method:
        """The method whose state's gradients `Data.STATE_GRADIENTS` asks for."""
        raise NotImplementedError


class _Training:
    """What a method does while the model trains, beside its place in the graph."""

    scheduled: bool = False

    def rate(self, state: str) -> float:
        """The learning rate of one state tensor, as a multiple of the base rate."""
        return 1.0

    def penalty(self, site: Any, state: Mapping[str, Tensor]) -> Tensor:
        """What is added to the loss in training for one site, a scalar. Only a method that has one defines it."""
        raise NotImplementedError

    @property
    def consistency(self) -> float:
        """The weight of a consistency loss between two passes of each training step; 0 for a single pass."""
        return 0.0

    def on_step(self, step: Step, places: Sequence[Place]) -> bool:
        """Called once a statement after each step of the optimiser, where `scheduled`; gradients are still there.

        Returns whether it changed state that `prepare` reads.
        """
        return False

    def warmth(self, step: int) -> float:
        """The multiple of the learning rate at a step (from 1), where `scheduled`."""
        return 1.0

    def misfit(self, total: int | None) -> str | None:
        """Why the method's schedule does not fit a training of `total` steps (None: nobody knows), or None."""
        return None


class _InHFPeft:
    """How HF PEFT's folders hold the method, for those that it has: by names, where these say it all."""

    peft_type: ClassVar[str | None] = None
    peft_tensors: ClassVar[Mapping[str, str]] = {}  # their names of a module's tensors -> those of our state
    peft_shared: ClassVar[Mapping[str, str]] = {}  # their names of what `shared` returns -> ours
    peft_numbered: ClassVar[tuple[str, ...]] = ()  # those of a module's that lie together, by the module's number
    peft_values: ClassVar[Mapping[str, str]] = {}  # their settings -> our parameters, with their defaults
    peft_settings: ClassVar[tuple[str, ...]] = ()  # further ones that `from_peft` obeys; what else counts is refused
    peft_patterns: ClassVar[Mapping[str, str]] = {}  # such that may differ by module -> where theirs say that
    peft_bias: ClassVar[str | None] = None  # their word for it that biases of the adapted modules learn, too
    peft_apart: ClassVar[bool] = False  # whether modules that other entries of target_modules choose share nothing
    peft_transposed: ClassVar[bool] = True  # whether theirs stands on a transposed weight, too

    def unexportable(self, site: Any) -> str | None:
        """Why HF PEFT has no such adapter at `site`, although `peft_type` says it has the method, or None."""
        odd = getattr(site, "transposed", False) and not self.peft_transposed
        return f"it has {type(self).__name__} on no transposed weight" if odd else None

    def to_peft(self, site: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's settings and tensors for one module; only where `peft_type` says it has the method."""
        settings = {theirs: getattr(self, ours) for theirs, ours in self.peft_values.items()}
        return {"peft_type": self.peft_type, **settings}, {t: state[ours] for t, ours in self.peft_tensors.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Parameters and state from HF PEFT's settings and one module's tensors; None if they are another method's.

        What the settings say counts: where a tensor is not of the shape that follows, the folder is refused.
        """
        if set(tensors) != set(cls.peft_tensors):
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        return values, {ours: tensors[theirs] for theirs, ours in cls.peft_tensors.items()}

    @classmethod
    def obeyed(cls) -> set[str]:
        """All settings of theirs that count."""
        return {*cls.peft_values, *cls.peft_settings, *cls.peft_patterns.values()}


class _Acting:
    """What the compiler asks of every method about its place; the base classes of the stages say what each is for."""

    identity: bool = True
    unmergeable: str | None = None
    indivisible: str | None = None
    windowed: bool = False

    def rewrite(self, *given: Any, **operands: Any) -> Any:
        """See the base class of the stage."""
        raise NotImplementedError

    def rewrites_input(self, site: Any) -> bool:
        """See `OutputMethod`."""
        return False

    def rewrite_input(self, *given: Any, **operands: Any) -> Tensor:
        """See `OutputMethod`."""
        raise NotImplementedError

    @property
    def prepares(self) -> bool:
        """Whether `prepare` may return another weight than it is given."""
        return type(self).prepare is not _Acting.prepare

    def prepare(self, site: Any, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> Tensor:
        """See `WeightMethod`."""
        return weight

    def delta(self, site: Any, **state: Tensor) -> Tensor:
        """See `WeightMethod`."""
        raise NotImplementedError

    def fold(
        self, site: Any, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """See `WeightMethod`."""
        change = self.delta(site, **state)
        return (weight.to(change.dtype) + change).to(weight.dtype), bias  # rounded once, where all of it is known

    def low_rank(self, site: Any, state: Mapping[str, Tensor]) -> LowRank | None:
        """The branch that `rewrite` adds, where it does nothing else: those of several tasks are computed as one."""
        return None

    def unmergeable_at(self, site: Any) -> str | None:
        """Why no plain weight does the same at `site`, or None; `unmergeable` is why none does anywhere."""
        return self.unmergeable

    def adds_bias(self, site: Any) -> bool:
        """Whether `fold` needs a bias to put something in, which a layer may not have."""
        return False

    def claims_weight(self) -> str | None:
        """See `WeightMethod`."""
        return None

    def claims_upstream(self) -> str | None:
        """Why nothing that the method's output depends on may learn (no gradient passes through it), or None."""
        return None

    def changes(self, site: Any) -> bool:
        """Whether the site's output becomes another; a link of a chain may only read it."""
        return True

    def keeps(self, site: Any) -> int | None:
        """Features a token that the rewrite keeps for the backward pass; None where its narrow products are all."""
        return None

    def keeps_dense(self, site: Any) -> int:
        """Numbers that it keeps besides, each time the site is used: of dense matrices that it makes of its state."""
        return 0

    def extend(self, *given: Any, **operands: Any) -> tuple[Tensor, Tensor]:
        """See `AttentionMethod`."""
        raise NotImplementedError

    @property
    def attends_apart(self) -> bool:
        """Whether what `extend` makes is attended to under a softmax of its own, for `rewrite` to take in."""
        return type(self).rewrite is not _Acting.rewrite

    def gate(self, *given: Any, **operands: Any) -> Tensor:
        """(site, x, y, changed, *state): what passes of an attention's result without and with the method's keys.

        x enters the sublayer. Only a combinator that gates others defines it.
        """
        raise NotImplementedError

    @property
    def has_gate(self) -> bool:
        """Whether it lets through a part of what another method does."""
        return type(self).gate is not _Acting.gate

    def takes_positions(self, site: Any) -> int:
        """See `AttentionMethod`."""
        return 0

    def lengthens(self, site: Any) -> int:
        """See `SequenceMethod`."""
        return 0


class Method(_Starting, _Training, _InHFPeft, _Acting, Configured):
    """Base of every method; to write one, take the base class of its stage from `peftc.protocol.stages`.

    A subclass, under `@method`, gives `name`, `formula`, `paper`, a docstring, its parameters (`param`), and

    - `state(site)`: the tensors it keeps at a site, shapes and starts, no data
    - `rewrite(…)`: what it computes, in plain PyTorch, with the operands that the stage's base class lists
    - `delta` or `fold`: what that is as a weight; or `unmergeable`, why no plain weight does the same

    and, where it is so: `site` (the kinds of place it takes, other than its stage's), `refuses` (why it cannot attach),
    `shared` (tensors of all sites together), `identity = False` (it changes the model from the start), `indivisible`
    (why a combinator cannot take its state apart), and what `_Starting`, `_Training` and `_InHFPeft` list.
    """

    site: type[Site] | UnionType = Linear  # or several kinds: Linear | Experts
    stage: Stage = Stage.WEIGHT
    # The rewrites that may be defined: by name, what they are given first, and what may be asked for beside state.
    rewrites: ClassVar[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {}

    noun = "method"
    such_as = "lora(r=8)"
    folder = "methods"

    @property
    def label(self) -> str:
        """What the state lies under in the model, and what there may be once at a place."""
        return self.name

    def refuses(self, site: Any) -> str | None:
        """Why this method cannot attach to `site`, a site of its kind, or None."""
        return None

    def state(self, site: Any) -> dict[str, State]:
        """The tensors the method keeps at `site`: shapes and initialisation, no data."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Any]) -> dict[str, State]:
        """The tensors the method keeps once for all the sites of its statement, asked for by name like the others."""
        return {}

    def shares(self, sites: Sequence[Any]) -> list[dict[str, State]]:
        """`shared` site by site, where sites share in groups: what is one object is one tensor."""
        return [self.shared(sites)] * len(sites)

    @classmethod
    def check(cls) -> None:
        """Raises TypeError where the class lacks what every method has, or a rewrite is not given what it takes."""
        demand(cls, Method, rewrites="take the base class of its stage from peftc.protocol.stages")
        demand(cls, Method, state="it says which tensors the method keeps at a site")
        if wrong := [kind for kind in kinds(cls) if not (isinstance(kind, type) and issubclass(kind, Site))]:
            raise TypeError(f"{cls.__name__}.site is {wrong[0]!r}, and no kind of site")
        if all(getattr(cls, name) is getattr(Method, name) for name in cls.rewrites):
            raise TypeError(f"{cls.__name__} has no {next(iter(cls.rewrites))}: it says what the method computes")
        if cls.unmergeable is None and cls.fold is Method.fold and cls.delta is Method.delta:
            what = "define one, or say in `unmergeable` why no plain weight does the same"
            raise TypeError(f"{cls.__name__} has neither delta nor fold, one of which merging needs: {what}")
        check_operands(cls, kinds(cls))
        check_state(cls, kinds(cls))

    def asks(self, state: Iterable[str]) -> tuple[str, ...]:
        """What `rewrite` wants by name, of `state` and of the stage's operands."""
        return wanted(type(self).rewrite, 4, state)

    def asks_input(self, state: Iterable[str]) -> tuple[str, ...]:
        """What `rewrite_input` wants by name."""
        return wanted(type(self).rewrite_input, 3, state)

    def asks_extend(self, state: Iterable[str]) -> tuple[str, ...]:
        """What `extend` wants by name."""
        return wanted(type(self).extend, 2, state)


def kinds(method: Method | type[Method]) -> tuple[type[Site], ...]:
    """The kinds of site that a method attaches to, the one that it is made for first."""
    return get_args(method.site) or (cast(type[Site], method.site),)


def method(cls: M) -> M:
    """Registers a method under its `name` and turns its fields into parameters."""
    return register(cls)


def methods() -> Mapping[str, type[Method]]:
    """Every method by name: each is in a file of that name under `passes/methods`."""
    return cast(Mapping[str, type[Method]], registered(Method))
