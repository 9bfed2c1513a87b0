"""`CompiledModule`: the trainable graph as users, `Trainer` and `torch.compile` see it."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer

from peftc.capture.convention import Convention
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute, keep_unread
from peftc.optimise.fuse import Fired
from peftc.planning.planner import Plan
from peftc.planning.positions_left import room
from peftc.runtime.consistency import two_passes
from peftc.runtime.devices import keep_packed, move_constants, refuse_casts
from peftc.runtime.entries import Code, Entries
from peftc.runtime.errors import NoPickle, OnlyOnTheBase, OnTheBase, Transformed
from peftc.runtime.shelves import arrange
from peftc.runtime.statedict import ignore_frozen, keep_added, part_from_base, prepare_again
from peftc.runtime.token_mean import NAME
from peftc.runtime.unfrozen import Watch

if TYPE_CHECKING:
    from peftc.files.repack import Rounding
    from peftc.runtime.schedule import Follower, Schedule

Stages = list[tuple[str, fx.Graph]]


class CompiledModule(fx.GraphModule):
    """A model with its adapters in the graph. Call it as the base model: `module(input_ids=…, labels=…)`.

    `state_dict()` holds what peftc added and what learns, not the frozen base, so a Trainer's checkpoints are small
    and resume. `plan` says what attaches where, `history` maps each pass to the flat graph after it,
    `fired` says how often each fusion did, and how near the others came.

    In `train()` a call with labels may return the loss with None for the logits, as their cross-entropy is computed
    without ever holding all of them; `eval()` returns both. Set `logits_in_training` to have them in training, too.
    """

    plan: Plan
    history: dict[str, fx.Graph]
    fired: tuple[Fired, ...]
    base: nn.Module
    convention: Convention
    logits_in_training: bool
    watch: Watch
    entries: Entries

    def __init__(
        self, root: nn.Module, graph: fx.Graph, plan: Plan, history: Stages, fired: tuple[Fired, ...] | None = None
    ) -> None:
        """`fired`: what the fusions did; None where nothing is to be fused."""
        super().__init__(root, graph, class_name=plan.sites.model)
        # Plain values, set past nn.Module: the base model must not become a submodule.
        self.__dict__.update(
            plan=plan,
            history=dict(history),
            fired=fired or (),
            base=plan.captured.model,
            convention=Convention(plan.captured.inputs, plan.captured.result, room(plan), plan.consistency),
            logits_in_training=fired is None,
        )
        keep_unread(root, self)
        self._settle()
        self.__dict__["entries"] = entries = Entries(self)
        if entries.fired is not None:
            self.__dict__["fired"] += (entries.fired,)
        self.register_state_dict_post_hook(keep_added)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(part_from_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(ignore_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(prepare_again)  # type: ignore[no-untyped-call]
        self._set_forward()
        self.train()

    def _settle(self) -> None:
        """The tensors in the base model's order, behind them what was added in that of the plan; and who they are."""
        own = (*self.base.named_parameters(remove_duplicate=False), *self.base.named_buffers(remove_duplicate=False))
        arrange(self, (*(name for name, _ in own), *self.plan.tensors))
        self.__dict__["watch"] = Watch(self)

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
        run: Code = cls.forward

        def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self._check_use()
            elif torch.compiler.is_dynamo_compiling():
                self._check_traced()
            items = kwargs.pop(NAME, None) if self.accepts_loss_kwargs else None
            given = self.convention.bind(args, kwargs)
            if len(given) == len(self.convention.inputs):
                alone = self.training and not self.logits_in_training
                chunked = self.entries.loss_alone(self, items is not None) if alone else None
                code = chunked or (run if items is None else cast(Code, self.entries.counted))
                count = () if items is None else (torch.as_tensor(items, device=self.device),)
                step = partial(code, self, *given.values(), *count)
                weight = self.convention.consistency if self.training else 0.0
                leaves = two_passes(step, weight, self.convention.logits, given.get("labels")) if weight else step()
                return self.convention.unflatten(leaves, with_loss=True)
            return self.convention.unflatten(self.entries.without_labels(self)(self, *given.values()), with_loss=False)

        signature = self.convention.signature
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
        forward.__doc__ = f"({', '.join(self.convention.inputs)}): as {self.plan.sites.model}'s forward."
        cls.forward = forward

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # traced again where requires_grad differs
    def _check_traced(self) -> None:
        self.watch.look(self)

    def _check_use(self) -> None:
        self.watch.look(self)
        if self.fired and (torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
            raise PeftcError(Transformed())  # custom operations would drop tangents without a word

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        """nn.Module's, for another device.

        Raises:
            PeftcError: `fixed-precision`, and nothing is changed, where a parameter would be cast.
        """
        refuse_casts(self, fn)
        before = self.device
        packed = {full: get_attribute(self, full) for item in self.plan.stored.values() for full in item.buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_packed(self, packed)
        if self.device != before:
            for module in self.modules():
                if isinstance(module, fx.GraphModule):
                    move_constants(module, before, self.device)
            self.__dict__["entries"] = Entries(self)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """A copy with parameters of its own; plan, history and base model, which nothing changes, are shared."""
        shared = {
            name: self.__dict__[name]
            for name in ("plan", "history", "fired", "base", "convention", "logits_in_training")
        }
        self.watch.notice(self)  # a copy starts with what this one has learnt
        memo.update({id(value): value for value in (*shared.values(), self.entries, self.watch)})
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, CompiledModule)
        copied.__dict__.update(shared)
        for path, module in self.named_modules():
            if isinstance(module, fx.GraphModule):  # by this name Trainer knows a causal language model
                type(copied.get_submodule(path)).__name__ = type(module).__name__
        copied._settle()
        copied.watch.unfrozen |= self.watch.unfrozen
        copied._set_forward()
        copied.__dict__["entries"] = Entries(copied)
        return copied.train(self.training)

    def __copy__(self) -> CompiledModule:
        """Another module over the same tensors."""
        own = (*self.parameters(), *self.buffers())
        return self.__deepcopy__({id(tensor): tensor for tensor in own})

    def __reduce__(self) -> Any:
        raise PeftcError(NoPickle(model=self.plan.sites.model))

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """What a Trainer calls: a spec says it with `checkpoint`."""
        raise PeftcError(OnTheBase(model=self.plan.sites.model, name="activation_checkpointing_enable"))

    # Facts

    @property
    def config(self) -> Any:
        """The base model's configuration; None for a plain module."""
        return getattr(self.base, "config", None)

    @property
    def loss_type(self) -> str | None:
        """Which of transformers' losses the base model has: by it Trainer knows whose labels are shifted."""
        return getattr(self.base, "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether a call takes `num_items_in_batch`, which Trainer asks for."""
        return self.entries.counted is not None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's precision."""
        return next(parameter.dtype for parameter in self.base.parameters())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups: one for each multiple of `lr` that a method asks for (LoRA+)."""
        rates = {
            full: binding.method.rate(name) for binding in self.plan.bindings for name, full in binding.names.items()
        }
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trainable_parameters().items():
            groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        return [{"params": members, "lr": lr * rate} for rate, members in groups.items()]

    def report(self) -> str:
        """What `peftc compile` prints: statement, sites, parameters, share; and how often each fusion fired."""
        from peftc.show.tables import report

        return report(self.plan, self.fired)

    # Schedules

    def penalty(self) -> Tensor:
        """What the methods ask to be added to the loss (DiffPruning, AdaLoRA), for a loss of the caller's own.

        The loss that the model itself returns in training has it already.
        """
        from peftc.rewrite.penalties import penalty_of

        return penalty_of(self)

    def follow(self, optimizer: Optimizer, step: int = 0, total: int | None = None) -> Follower:
        """Lets the methods that have a schedule (AdaLoRA, ReLoRA, …) act after each `optimizer.step()`.

        `step` is the number of steps already made, `total` that of all that will be, if known. `.remove()` of what is
        returned ends it.
        """
        from peftc.runtime.schedule import Follower

        return Follower(self, optimizer, step, total)

    def callback(self) -> Schedule:
        """`follow` for a `transformers.Trainer`: `Trainer(..., callbacks=[model.callback()])`."""
        from peftc.runtime.schedule import Schedule

        return Schedule(self)

    # Artifacts

    def save(self, folder: str | Path) -> None:
        """Writes spec, tensors and a reference to the base model; `peftc.load` reads it back."""
        from peftc.files.artifact import save

        save(self, Path(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder that HF PEFT reads: one method that it has, on whole modules, prompts or prefixes."""
        from peftc.files.peft_folder import save_pretrained

        save_pretrained(self, Path(folder))

    @overload
    def merge(self) -> nn.Module: ...

    @overload
    def merge(self, *, requantize: Literal[False]) -> nn.Module: ...

    @overload
    def merge(self, *, requantize: Literal[True]) -> tuple[nn.Module, dict[str, Rounding]]: ...

    def merge(self, *, requantize: bool = False) -> nn.Module | tuple[nn.Module, dict[str, Rounding]]:
        """A model of the base's own class that computes the same, with no trace of peftc.

        With `requantize` each weight that is packed here is rounded to its storage's numbers again, and what that
        loses comes back beside the model, by the weight's name. Else it stays in the precision of the base.
        """
        from peftc.files.merge import merge
        from peftc.files.repack import repack

        if not requantize:
            return merge(self)
        found = repack(self)
        return found.model, found.lost

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20) -> Tensor:
        """Greedy continuation of a left-padded batch, [B, S] -> [B, S + new]. Runs the whole sequence each step."""
        from peftc.runtime.generate import greedy

        return greedy(self, input_ids, attention_mask, max_new_tokens)
