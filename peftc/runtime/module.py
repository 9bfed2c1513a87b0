"""A compiled graph at work: how it is called, moved, copied, and what of it learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import get_annotations
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer

from peftc.capture.assumptions import SizeCheck
from peftc.capture.convention import Convention, others_of
from peftc.capture.examples.settled import Settled
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute, keep_unread, tensors
from peftc.optimise.fuse import Fired
from peftc.planning.plan import Plan, extension
from peftc.planning.positions_left import room
from peftc.rewrite.penalties import penalised
from peftc.rewrite.splicer import TASK_ROWS
from peftc.runtime.asked import LOCK
from peftc.runtime.embeddings import Embeddings
from peftc.runtime.entries import Code, Entries
from peftc.runtime.errors import (
    NoPickle,
    NotWhenTraced,
    OnlyOnTheBase,
    OnTheBase,
    TakenName,
    Transformed,
)
from peftc.runtime.generation.text import continued
from peftc.runtime.schedule import Follower, Schedule
from peftc.runtime.tasks import Selected, Switching
from peftc.runtime.tensors.devices import keep_packed, move_constants, refuse_casts
from peftc.runtime.tensors.shelves import arrange
from peftc.runtime.tensors.statedict import ignore_frozen, keep_added, part_from_base, prepare_again
from peftc.runtime.tensors.unfrozen import Watch
from peftc.runtime.tensors.whole import Split, needs_whole
from peftc.runtime.texts import by_row, keeps_apart
from peftc.runtime.token_mean import NAME

# Of one model, for sizes that no graph before was for; a model that asks more often is better compiled for its sizes.
MOST_GRAPHS = 8

Stages = list[tuple[str, fx.Graph]]


class Runtime(Switching):
    """A model with its adapters in the graph. `peftc.CompiledModule` adds what reads and writes files.

    Call it as the base model: `module(input_ids=…, labels=…)`. `fired` says how often each fusion did.
    """

    fired: tuple[Fired, ...]
    entries: Entries
    size_check: SizeCheck
    other_graphs: list[Runtime]
    tensors_in_common: frozenset[str]
    keeps_texts_apart: bool  # whether it was seen to
    capture_again: Callable[[Runtime, dict[str, Any]], Runtime | None] | None
    split: Split | None

    def __init__(
        self, root: nn.Module, graph: fx.Graph, plan: Plan, history: Stages, fired: tuple[Fired, ...] | None = None
    ) -> None:
        """`fired`: what the fusions did; None where nothing is to be fused.

        Raises:
            PeftcError: `taken-name` where a part of the model would hide something of this, or be hidden.
        """
        own = {*dir(type(self)), *(name for cls in Runtime.__mro__ for name in get_annotations(cls))}
        if taken := sorted(own & {name.partition(".")[0] for name in tensors(root)}):
            raise PeftcError(*(TakenName(model=plan.sites.model, name=name) for name in taken))
        super().__init__(root, graph, class_name=plan.sites.model)
        # Plain values, set past nn.Module: the base model must not become a submodule.
        self.__dict__.update(
            plan=plan,
            history=dict(history),
            fired=fired or (),
            base=plan.captured.model,
            convention=_convention(plan),
            size_check=_sizes(plan, history[0][1]),
            other_graphs=[],
            tensors_in_common=_kept(plan),
            keeps_texts_apart=False,
            is_fused=fired is not None,
            capture_again=None,
            make_face=None,
            faces={},
            selected=Selected(),
            make_continuation=None,
            continues_by=None,
            logits_in_training=fired is None,
            recomputes_every=0,
            embeddings=None,
            split=None,
        )
        keep_unread(root, self)
        self.settle()
        self._set_forward()
        self.__dict__["fired"] += self.entries.fired
        self.register_state_dict_post_hook(keep_added)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(part_from_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(ignore_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(prepare_again)  # type: ignore[no-untyped-call]
        self.train()

    def settle(self) -> None:
        """The tensors in the base model's order, behind them what was added in that of the plan; and who they are."""
        own = (*self.base.named_parameters(remove_duplicate=False), *self.base.named_buffers(remove_duplicate=False))
        arrange(self, (*(name for name, _ in own), *self.plan.added))
        unfrozen = self.watch.unfrozen if "watch" in self.__dict__ else set()
        self.__dict__["watch"] = Watch(self, self.base, self.plan)
        self.watch.unfrozen |= unfrozen

    def __getattr__(self, name: str) -> Any:
        """nn.Module's; of what the base model has, and a graph has not, it says so."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(type(self.__dict__.get("base")), name):
                raise
        raise OnlyOnTheBase(OnTheBase(model=self.plan.sites.model, name=name))

    # Calling

    def recompile(self) -> Any:
        """GraphModule's, with the calling convention of the base model around the graph's own function."""
        code = super().recompile()
        if "convention" in self.__dict__:
            self._set_forward()
        return code

    def _set_forward(self) -> None:
        cls = cast(Any, type(self))
        own: Code = cls.forward
        self.__dict__["entries"] = Entries(self, own)

        def forward(self: Runtime, *args: Any, **kwargs: Any) -> Any:
            if (embeddings := self.__dict__["embeddings"]) is not None and self.training:
                args, kwargs = (), embeddings.look_up(self.convention.named(args, kwargs))
            tasks = kwargs.pop("tasks", None) if self.plan.tasks else None
            if (face := self.face(tasks)) is not self:
                return face(*args, **kwargs)
            if not torch.compiler.is_compiling():
                self._check_use()
                if self._continues(kwargs):
                    return continued(self, args, kwargs)
            elif torch.compiler.is_dynamo_compiling():
                self._check_traced()
            tokens = kwargs.pop(NAME, None) if self.entries.counts_tokens else None
            if not torch.compiler.is_compiling():
                graph, given = self.routed(args, kwargs)
                return graph._run(given, tokens)
            given = self.convention.bind(args, kwargs)
            if torch.compiler.is_dynamo_compiling() and not self.size_check.holds_traced(given):
                _refuse_traced()
            return self._run(given, tokens)

        signature = self.convention.signature
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
        forward.__doc__ = f"({', '.join(self.convention.inputs)}): as {self.plan.sites.model}'s forward."
        cls.forward = forward

    def _run(self, given: dict[str, Any], tokens: Any) -> Any:
        return self.entries.choose(self, given, tokens).run(self, given, tokens)

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Runtime, dict[str, Any]]:
        """The graph for a call, this or another, and the inputs by name.

        Raises:
            TypeError: on inputs that the base model has not, or that are missing.
            PeftcError: `other-sizes` where the base model cannot be captured for those of the inputs; `texts-mix` for
                several texts in a row of which it would not make what it makes of each.
        """
        try:
            given = by_row(self.convention.bind(args, kwargs))
        except TypeError as refusal:
            given = by_row(self.convention.named(args, kwargs))
            taken = {*self.convention.inputs, *self.convention.others}
            known = self.config is not None and given.keys() <= taken
            if not known or not all(isinstance(value, Tensor) for value in given.values()):
                raise
            graph = self._other(given, refusal)
            given = graph.convention.bind((), given)
        else:
            refused = self.size_check.refusal(given)
            graph = self if refused is None else self._other(given, refused)
        if not graph.keeps_texts_apart:
            graph.__dict__["keeps_texts_apart"] = keeps_apart(graph, given)
        return graph, given

    def _other(self, given: dict[str, Any], refusal: Exception) -> Runtime:
        """The same model and tensors with a graph that was captured for the sizes of `given`."""
        if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in self.parameters()):
            raise refusal  # who shards a model does it by the blocks of one graph
        with LOCK:
            other = next((other for other in self.other_graphs if other.runs(given)), None) or self._captured_again(
                given
            )
            if other is None:
                raise refusal
            self.lend(other, {name: name for name in self.tensors_in_common & tensors(other).keys()})
        return other

    def runs(self, given: Mapping[str, Any]) -> bool:
        """Whether this one's graph is for inputs of these names and sizes."""
        if not self.convention.takes(given):
            return False
        return self.size_check.refusal(self.convention.bind((), dict(given))) is None

    def _captured_again(self, given: dict[str, Any]) -> Runtime | None:
        if self.capture_again is None or len(self.other_graphs) == MOST_GRAPHS - 1:
            return None
        if (made := self.capture_again(self, given)) is not None:
            self.other_graphs.append(made)
        return made

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # traced again where requires_grad differs
    def _check_traced(self) -> None:
        self.watch.look(self)

    def _check_use(self) -> None:
        self.watch.look(self)
        if self.fired and (torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
            raise PeftcError(Transformed())  # custom operations would drop tangents without a word

    def _apply(self, fn: Any, recurse: bool = True) -> Runtime:
        """nn.Module's, for another device.

        Raises:
            PeftcError: `fixed-precision`, and nothing is changed, where a parameter would be cast.
        """
        refuse_casts(self, fn)
        before = self.device
        packed = {full: get_attribute(self, full) for item in self.plan.packed.values() for full in item.buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_packed(self, packed)
        if self.device != before:
            self.other_graphs.clear()
            self.faces.clear()
            self.__dict__["continues_by"] = None
            for module in self.modules():
                if isinstance(module, fx.GraphModule):
                    move_constants(module, before, self.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """A copy with parameters of its own; plan, history and base model, which nothing changes, are shared.

        Raises:
            PeftcError: `in-parts` of a model of which each process has a part.
        """
        needs_whole(self, "a copy")
        shared = {
            name: self.__dict__[name]
            for name in (
                "plan", "history", "fired", "base", "convention", "logits_in_training", "is_fused", "recomputes_every",
                "size_check", "tensors_in_common", "capture_again", "make_face", "selected", "keeps_texts_apart",
            )
        }  # fmt: skip
        self.watch.notice(self)  # a copy starts with what this one has learnt
        memo.update({id(value): value for value in (*shared.values(), self.entries, self.watch)})
        memo |= {id(self.other_graphs): [], id(self.faces): {}}
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, Runtime)
        copied.__dict__.update(shared, other_graphs=[], faces={}, embeddings=None, split=None)
        for path, module in self.named_modules():
            if isinstance(module, fx.GraphModule):  # by this name Trainer knows a causal language model
                type(copied.get_submodule(path)).__name__ = type(module).__name__
        copied.settle()
        copied.watch.unfrozen |= self.watch.unfrozen
        copied._set_forward()
        return copied.train(self.training)

    def __copy__(self) -> Runtime:
        """Another module over the same tensors."""
        own = (*self.parameters(), *self.buffers())
        return self.__deepcopy__({id(tensor): tensor for tensor in own})

    def __reduce__(self) -> Any:
        raise PeftcError(NoPickle(model=self.plan.sites.model))

    # Facts

    @property
    def config(self) -> Any:
        """The base model's configuration; None for a plain module."""
        return getattr(self.base, "config", None)

    def get_input_embeddings(self) -> nn.Module:
        """What stands for the module that looks tokens up, for NEFTune of a Trainer: it takes no other hook.

        Raises:
            PeftcError: `on-the-base` where the model has no such module, or the spec changes or trains it.
        """
        if self.__dict__["embeddings"] is None:
            self.__dict__["embeddings"] = Embeddings(self)
        module: nn.Module = self.__dict__["embeddings"].module
        return module

    @property
    def loss_type(self) -> str | None:
        """Which of transformers' losses the base model has: by it Trainer knows whose labels are shifted."""
        return getattr(self.base, "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether a call takes `num_items_in_batch`, which Trainer asks for."""
        face = self.face()
        return self.entries.counts_tokens if face is self else bool(face.accepts_loss_kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's precision."""
        return next(parameter.dtype for parameter in self.base.parameters())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups: one for each multiple of `lr` that a method asks for (LoRA+)."""
        rates = {full: b.method.rate(name) for b, names in self.plan.placed for name, full in names.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trainable_parameters().items():
            groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        return [{"params": members, "lr": lr * rate} for rate, members in groups.items()]

    # Schedules

    def penalty(self) -> Tensor:
        """What the methods ask to be added to the loss (DiffPruning, AdaLoRA), for a loss of the caller's own.

        The loss that the model itself returns in training has it already.
        """
        if (face := self.face()) is not self:
            penalty: Tensor = face.penalty()
            return penalty
        total = torch.zeros((), device=self.device)
        for binding in penalised(self.plan):
            state = {name: get_attribute(self, full) for name, full in binding.names.items()}
            total = total + binding.method.penalty(binding.site, state)
        return total

    def follow(self, optimizer: Optimizer, step: int = 0, total: int | None = None) -> Follower:
        """Lets the methods that have a schedule (AdaLoRA, ReLoRA, …) act after each `optimizer.step()`.

        `step` is the number of steps already made, `total` that of all that will be, if known. `.remove()` of what is
        returned ends it.
        """
        return Follower(self, optimizer, step, total)

    def callback(self) -> Schedule:
        """`follow` for a `transformers.Trainer`: `Trainer(..., callbacks=[model.callback()])`."""
        return Schedule(self)


def _convention(plan: Plan) -> Convention:
    inputs = plan.captured.inputs
    others = others_of(plan.captured.model, inputs)
    settled = Settled.of(plan.captured.model, plan.captured.example.constants)
    return Convention(inputs, plan.captured.result, room(plan), plan.consistency, others, settled)


def _sizes(plan: Plan, captured: fx.Graph) -> SizeCheck:
    """Prompts make the sequences longer that the model sees."""
    longer = {
        name: by
        for site in plan.sites.sequences
        if site.length is None and (by := extension(b for b in plan.bindings if b.site is site))
        for name in (site.tokens, *dict(site.filled), site.position_ids)
        if name is not None
    }
    return SizeCheck(plan.captured.assumptions, captured, longer)


def _kept(plan: Plan) -> frozenset[str]:
    """The tensors that any graph of the same plan has, unlike the constants of one capture."""
    base = tensors(plan.captured.model)
    packed = (full for item in plan.packed.values() for full in item.buffers)
    return frozenset((*base, *plan.tensors, *packed, *([TASK_ROWS] if plan.by_row else [])))


@torch.compiler.disable(reason=NotWhenTraced().title)  # type: ignore[untyped-decorator]
def _refuse_traced() -> None:
    """Outside of what is traced: torch 2.11 cannot trace the raising. Who asks for one graph is told the reason."""
    raise PeftcError(NotWhenTraced())
