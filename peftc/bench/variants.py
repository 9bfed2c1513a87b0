"""What `peftc bench` compares: the frozen base model, the compiled one, and HF PEFT's model of the same adapter."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from peftc.bench.batches import Arguments
from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.compiled import CompiledModule

FLOOR = "frozen base"
FUSED = "peftc"
PLAIN = "peftc, fuse=False"
ONE_LIBRARY = "peftc, one library"  # multiplying with the library that PyTorch takes by itself, as the others do
HF_PEFT = "HF PEFT"


@dataclass(frozen=True)
class Variant:
    """One model to be stepped; `missing` says why there is none."""

    name: str
    module: nn.Module | None = None
    missing: str = ""
    compiled: bool = False  # by torch.compile
    one_library: bool = False

    @property
    def foreign(self) -> bool:
        """Whether others' code may fail in it, which is a fact to report and no mistake here."""
        return self.compiled or self.name == HF_PEFT

    def loss(self, arguments: Arguments) -> Tensor:
        """The forward pass: the model's own loss, or for one without labels the mean square of its first output."""
        assert self.module is not None
        args, kwargs = arguments
        with self._libraries():
            output = self.module(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if loss is None:
            first = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
            loss = first.float().square().mean()
        assert isinstance(loss, Tensor)
        return loss

    def step(self, arguments: Arguments) -> Tensor:
        """Forward and backward; the gradients are dropped. There is no optimiser in it."""
        loss = self.loss(arguments)
        with self._libraries():
            loss.backward()
        self.drop_gradients()
        return loss

    @contextmanager
    def _libraries(self) -> Iterator[None]:
        """Not `torch.backends.mkldnn.flags`, which warns where there is no Intel GPU."""
        libraries: Any = torch.backends.mkldnn
        before = libraries.enabled
        libraries.enabled = before and not self.one_library
        try:
            yield
        finally:
            libraries.enabled = before

    def drop_gradients(self) -> None:
        """No parameter and no argument keeps a gradient."""
        assert self.module is not None
        self.module.zero_grad(set_to_none=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        assert self.module is not None
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def floor(model: nn.Module) -> Variant:
    """The frozen model in eager mode, whose backward goes through all of it to the embeddings' output.

    Nothing learns: it is what any method beside a frozen model pays that changes its first layer.
    """
    frozen = shared_copy(model)
    entries = _entries(frozen)
    zero = torch.zeros((), dtype=next(frozen.parameters()).dtype, device=next(frozen.parameters()).device)
    for entry in entries:
        entry.register_forward_hook(_adding(zero.requires_grad_()))
    if not entries:
        frozen.register_forward_pre_hook(_inputs_need_gradient, with_kwargs=True)
    return Variant(FLOOR, frozen.train())


def hf_peft(model: nn.Module, compiled: CompiledModule) -> Variant:
    """HF PEFT's model around `model`, with the adapter and the state of `compiled`, by way of the folder format.

    Of several tasks it has an adapter each, called as they are.
    """
    try:
        import peft
    except ImportError:
        return Variant(HF_PEFT, missing="peft is not installed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save_pretrained(Path(folder) / "adapter")
            first, *others = [Path(folder) / "adapter" / task for task in compiled.tasks] or [Path(folder) / "adapter"]
            named: dict[str, Any] = {"adapter_name": first.name} if others else {}
            theirs = peft.PeftModel.from_pretrained(shared_copy(model), str(first), is_trainable=True, **named)
            for other in others:
                theirs.load_adapter(str(other), other.name)
        except PeftcError as error:
            return Variant(HF_PEFT, missing=error.diagnostics[0].title)
        except Exception as error:  # whatever another library may raise on a model it does not take
            return Variant(HF_PEFT, missing=f"peft {peft.__version__}: {headline(error)}")
    return Variant(HF_PEFT, theirs.train())


def torch_compiled(variant: Variant) -> Variant:
    """The same under `torch.compile(fullgraph=True)`, which compiles in the first step."""
    name = f"torch.compile of {variant.name}"
    if variant.module is None:
        return replace(variant, name=name)
    compile: Callable[..., Any] = torch.compile
    return Variant(name, compile(variant.module, fullgraph=True, dynamic=False), compiled=True)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules over the same memory: each parameter is a frozen view, each buffer the model's own."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def headline(error: Exception) -> str:
    """The kind of an exception and the first line of what it says, with the next one where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _entries(model: nn.Module) -> list[nn.Module]:
    """The modules whose output the first block reads: token embeddings, under each of the names they are tied to."""
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not isinstance(model, PreTrainedModel):
        return tables
    try:
        first = model.get_input_embeddings()
    except NotImplementedError:
        return tables
    weight = getattr(first, "weight", None)
    return [first, *(table for table in tables if table is not first and table.weight is weight)]


def _adding(zero: Tensor) -> Callable[..., Tensor]:
    """A hook that adds a zero with a gradient: torch.compile takes it, and no `requires_grad_` in a graph's middle."""
    return lambda _module, _args, output: output + zero


def _inputs_need_gradient(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    def entering(leaf: Any) -> Any:
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().requires_grad_() if floats else leaf

    return pytree.tree_map(entering, (args, kwargs))
