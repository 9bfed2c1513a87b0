"""Model -> one flat ATen graph, by `torch.export`: dynamic batch and sequence, dropout that follows `train()`."""

from __future__ import annotations

import inspect
import io
import linecache
import re
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.distributions import Distribution
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import patch_forward_signature, reset_model_state
from transformers.exporters.utils import patch_attributes

from peftc.capture.assumptions import Asked, Assumptions, listening
from peftc.capture.blocks.once import tracing_once
from peftc.capture.checkpoints.checkpoint import Checkpoint
from peftc.capture.checkpoints.differences import NO_DIFFERENCES, Differences
from peftc.capture.checks import checks_deferred, tell_where
from peftc.capture.convention import has_loss
from peftc.capture.eager_ways import as_in_eager_mode
from peftc.capture.errors import WHENEVER_IT_RUNS, CannotCapture, MadeForInference, PackedLayers, StaysRandom
from peftc.capture.examples.asking import fake_mode_of, unlogged
from peftc.capture.examples.known import known
from peftc.capture.examples.settings import held_by
from peftc.capture.gradients.regions import regions_marked, without_gradients, writes_on_a_weight
from peftc.capture.inputs import Example, text_alone
from peftc.capture.islands import Islands, Why, place_of, skeleton_of
from peftc.capture.recorded.disk import Program, Record
from peftc.capture.texts import MASK, POSITIONS
from peftc.capture.untouched import untouched
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.graph.ir import STACK, alias_of, aliases_of, fake_mode, flat, get_attribute, keep_unread, set_tensor, tensors
from peftc.graph.normalise import normalise, stays_random
from peftc.graph.repeat import NotAlikeError, is_marked, repeated
from peftc.graph.texts import tell_texts_apart
from peftc.kernels.island import Island, island_of
from peftc.kernels.island import islands as islands_in

LIBRARIES = tuple(str(Path(inspect.getfile(module)).parent) for module in (torch,))


@dataclass(frozen=True)
class Captured:
    """A captured model: the flat graph over aliases of the model's own tensors, and how to call it.

    `inputs` are the placeholders' names in order; `result` is the pytree of what the model returns; `assumptions` are
    about the sizes of inputs; `islands` are the modules that could not be traced. `checkpoint` has the weights that
    were not read with the model, `differences` says how it differs from a checkpoint it was read from.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    result: pytree.TreeSpec
    assumptions: Assumptions
    model: nn.Module
    example: Example
    checkpoint: Checkpoint | None = None
    differences: Differences = NO_DIFFERENCES
    islands: tuple[Island, ...] = ()

    @property
    def past(self) -> tuple[str, ...]:
        """The inputs that are keys and values of tokens before those that are given."""
        return self.example.past

    @property
    def has_loss(self) -> bool:
        """Whether the model returns a loss, as it does with labels."""
        return has_loss(self.result)

    def frozen(self, name: str) -> torch.Tensor:
        """A tensor of the model, which is read now if it was not before: then it is the caller's, to be let go of."""
        own: torch.Tensor = get_attribute(self.model, name).detach()
        if self.checkpoint is None or not own.is_meta:
            return own
        known = (alias for alias in self.aliases.get(name, ()) if alias in self.checkpoint)
        return self.checkpoint.read(next(known, name))

    def packed(self, name: str) -> dict[str, torch.Tensor] | None:
        """bitsandbytes' state dict of the layer with this weight, where it comes from a checkpoint that has it so."""
        return self.checkpoint.packed(name) if self.checkpoint is not None else None

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """The graph's name of each tensor -> all the names the model has for it, more than one where it is tied."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        return {name: group for group in names.values() for name in group}


def capture(model: nn.Module, example: Example, timings: Timings | None = None) -> Captured:
    """Exports `model` in train mode on `example`, without changing the model.

    `timings` is told apart what `torch.export` takes and what making a plain graph of its program takes.

    Raises:
        PeftcError: `cannot-capture`, with the line of the model's source where `torch.export` gave up, or
            `packed-layers`, where another library than torch keeps the weights; `made-for-inference`.
    """
    timings = timings or Timings()
    packed = [name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes.")]
    if packed:
        kind = type(model.get_submodule(packed[0])).__name__
        raise PeftcError(PackedLayers(model=type(model).__name__, layer=packed[0], kind=kind, others=len(packed) - 1))
    if (name := next((name for name, own in tensors(model).items() if own.is_inference()), None)) is not None:
        raise PeftcError(MadeForInference(model=type(model).__name__, parameter=name))
    islands = Islands(model)
    first: PeftcError | None = None
    while True:
        try:
            return _either_way(model, example, timings, islands)
        except PeftcError as error:
            first = first or error
            if not _writes(error) and islands.widened(error, *_blamed(error)):
                continue
            if (plain := text_alone(model, example)) is None:
                raise first from error
            return capture(model, plain, timings)


def _either_way(model: nn.Module, example: Example, timings: Timings, islands: Islands) -> Captured:
    try:
        return _captured(model, example, timings, islands, once=True)
    except Exception as error:  # whatever it is, it may come of this way; what the plain one says of it counts
        if _writes(error):
            raise
        debug.tell(1, [f"each block is traced, also equal ones: {error}"])
    return _captured(model, example, timings, islands, once=False)


def _writes(error: Exception) -> bool:
    """Whether a capture failed as the model writes on a weight: no other way of capturing it helps then."""
    problems = error.diagnostics if isinstance(error, PeftcError) else ()
    return any(isinstance(one, CannotCapture) and one.reason.endswith(WHENEVER_IT_RUNS) for one in problems)


def _captured(model: nn.Module, example: Example, timings: Timings, islands: Islands, *, once: bool) -> Captured:
    """Equal blocks are traced `once`; then what anything raises may come of that."""
    record = Record.of(model, example) if once and not islands.classes else Record(None, model)
    with timings.stage("torch.export"), untouched(model), _prepared(model, example), listening() as asked:
        program = record.read(example)
        if program is None:
            asked.clear()  # by a file that did not fit
            try:
                with (
                    # A shape that is kept for the next operation alike is made twice, and sympy is longer over strides
                    # of products and quotients of symbols than torch over the operation (Zamba-2: 13 s of 22).
                    torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
                    islands.standing(),
                    checks_deferred() as places,
                    regions_marked(),
                    tracing_once(model) if once else nullcontext(),
                ):
                    exported = torch.export.export(
                        model,
                        example.args,
                        example.kwargs,
                        dynamic_shapes=example.dynamic_shapes(),
                        strict=False,
                    )
            except Exception as error:
                raise PeftcError(_diagnose(model, error)) from error
            program = _program(exported, asked)
            fake_mode(program.module.graph).cache_enabled = True  # all blocks are there now, and their nodes are alike
            tell_where(program.module.graph, places)
    with timings.stage("capture"):
        write = record.draft(program)
        captured = _as_plain_graph(program, model, example, islands)
        write()
    return captured


def _program(exported: torch.export.ExportedProgram, asked: Asked) -> Program:
    module, result = exported.module(check_guards=False), exported.call_spec.out_spec
    assert isinstance(module, fx.GraphModule)
    assert result is not None
    return Program(module, result, asked)


def _blamed(error: PeftcError) -> tuple[Why, tuple[str, ...]]:
    """What a capture that failed says, and in which modules, where its graph tells them, the innermost first."""
    (problem,) = error.diagnostics
    if isinstance(problem, StaysRandom):
        return Why(f"draws random numbers while training ({problem.op})", problem.line), problem.modules
    assert isinstance(problem, CannotCapture)
    return Why(problem.reason, place_of(problem.file, problem.line or 0) if problem.file else ""), problem.modules


def over(captured: Captured, model: nn.Module, checkpoint: Checkpoint | None) -> Captured:
    """The same graph over the tensors of `model`, for which the captured one stood; it is used up.

    Where `model` is on the meta device the graph has its fake tensors still, and `checkpoint` the weights.
    """
    own = tensors(model)
    aliases: dict[int, torch.Tensor] = {}
    for name in tensors(captured.module):
        if name in own and not own[name].is_meta:  # else it is a constant of the code, or still to be read
            set_tensor(captured.module, name, alias_of(own[name], aliases))
    nodes = islands_in(captured.module.graph)
    for node in nodes:
        node.target = island_of(node).over(skeleton_of(model, island_of(node).path))
    return replace(captured, model=model, checkpoint=checkpoint, islands=tuple(map(island_of, nodes)))


def _as_plain_graph(program: Program, model: nn.Module, example: Example, islands: Islands) -> Captured:
    """The program without its input checks and pytree wrapping, over aliases of the model's tensors."""
    exported = program.module
    for node in exported.graph.find_nodes(op="get_attr"):
        if not isinstance(get_attribute(exported, node.target), torch.Tensor | nn.Module):
            (reader, *_) = node.users  # such as a function of Python's that vmap was given
            raise PeftcError(_diagnose_node(model, reader, f"{reader.target} is no operation of a graph"))
    exported.graph.set_codegen(fx.graph.CodeGen())
    module = flat(_frozen_aliases(exported), exported.graph, class_name=type(model).__name__)
    assumptions = Assumptions.of(module.graph, type(model).__name__, program.asked)
    if (node := without_gradients(module)) is not None:
        raise PeftcError(_diagnose_node(model, node, f"{node.target} writes under no_grad on what has a gradient"))
    if (written := writes_on_a_weight(module)) is not None:
        raise PeftcError(_diagnose_node(model, written[0], f"it writes on {written[1]} {WHENEVER_IT_RUNS}"))
    normalise(module)
    if (node := stays_random(module.graph)) is not None:
        where = str(node.meta.get("stack_trace", "")).strip().splitlines()
        inside = _modules_of(node)
        raise PeftcError(
            StaysRandom(model=type(model).__name__, op=str(node.target), where=tuple(where[-2:]), modules=inside)
        )
    module = _whole(module, tensors(model))
    placed = islands.placed(module.graph)
    given = {str(node.target): node for node in module.graph.find_nodes(op="placeholder")}
    if (
        POSITIONS in given
        and MASK not in given
        and not example.past
        and tell_texts_apart(module.graph, given[POSITIONS])
    ):
        module.recompile()
    inputs = tuple(given)
    return Captured(module, inputs, program.result, assumptions, model, example, islands=placed)


def _modules_of(node: fx.Node) -> tuple[str, ...]:
    """The paths of the modules that made a node, the innermost first."""
    return tuple(path for path, _ in reversed((node.meta.get(STACK) or {}).values()))


def _whole(module: fx.GraphModule, own: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """With what was traced once in the place of each block that is equal, on the model's `own` tensors.

    Raises:
        NotAlikeError: where a block cannot be repeated.
    """
    inner = (part for part in module.modules() if part is not module and isinstance(part, fx.GraphModule))
    if any(is_marked(part.graph) for part in inner):
        raise NotAlikeError("a block runs in the body of a higher-order operator")
    graph, origins = repeated(module.graph, own)
    read = (str(node.target) for node in graph.find_nodes(op="get_attr") if node.target != "training")
    names = dict.fromkeys((*tensors(module), *read))
    root = aliases_of(
        {name: own[name] if name in own else get_attribute(module, origins.get(name, name)) for name in names}
    )
    whole = flat(root, graph, class_name=type(module).__name__)
    keep_unread(root, whole)
    return whole


@contextmanager
def _prepared(model: nn.Module, example: Example) -> Iterator[None]:
    """The model as it is to be traced: train mode, no cache, a flat signature."""
    with ExitStack() as stack:
        stack.enter_context(unlogged())
        if not debug.level():
            stack.enter_context(redirect_stderr(io.StringIO()))  # where torch prints the graph it gave up on
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        # As torch's compiler does, for the whole process: what is captured would depend on whether it ran.
        stack.enter_context(patch_attributes([(Distribution, "_validate_args", lambda _own: False)]))
        if (mode := fake_mode_of(model)) is not None:  # else torch.export makes another, which these do not mix with
            stack.enter_context(tracing(TracingContext(mode)))
            stack.enter_context(disable_fake_tensor_cache(mode))
        stack.enter_context(as_in_eager_mode(model))
        model.train()
        if example.config is not None:
            stack.enter_context(reset_model_state(model))
            own = cast(PreTrainedModel, model).config
            settings: list[tuple[Any, str, Any]] = [(own, name, new) for name, new in example.config.items()]
            if not example.past:  # a part may have a cache where the whole says nothing of one
                settings += [(part, "use_cache", False) for part in held_by(model) if hasattr(part, "use_cache")]
            settings = [(part, name, lambda _old, new=new: new) for part, name, new in settings]
            stack.enter_context(patch_attributes(settings))
            forward = model.forward
            stack.enter_context(
                patch_attributes([(model, "forward", lambda _old: lambda **given: example.called(forward, given))])
            )
            stack.enter_context(patch_forward_signature(cast(PreTrainedModel, model), example.kwargs))
            stack.enter_context(known(example.constants))
        yield


def _frozen_aliases(exported: fx.GraphModule) -> nn.Module:
    """The tensors the graph reads, as frozen parameters over the same storage: tied ones stay one object."""
    nodes = exported.graph.find_nodes(op="get_attr")
    return aliases_of({node.target: get_attribute(exported, node.target) for node in nodes})


def _diagnose_node(model: nn.Module, node: fx.Node, reason: str) -> CannotCapture:
    """What is wrong with a node of the graph, at the line of the model's own code that made it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace", "")))
    own = [(file, int(line)) for file, line in frames if not file.startswith((*LIBRARIES, "<"))]
    file, line = own[-1] if own else (None, None)
    source = linecache.getline(file, line or 0).strip() if file else None
    found = CannotCapture(model=type(model).__name__, reason=reason, file=file, line=line, source=source)
    return replace(found, modules=_modules_of(node))


def _diagnose(model: nn.Module, error: Exception) -> CannotCapture:
    """The last frame outside torch is where the model did what cannot be exported."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((*LIBRARIES, str(Path(__file__).parent.parent), "<"))
        and "exporters" not in Path(frame.filename).parts
    ]
    last = own[-1] if own else None
    return CannotCapture(
        model=type(model).__name__,
        reason=(str(error).strip() or type(error).__name__).splitlines()[0].partition(" (unhinted")[0],
        file=last.filename if last else None,
        line=last.lineno if last else None,
        source=linecache.getline(last.filename, last.lineno or 0).strip() if last else None,
    )
