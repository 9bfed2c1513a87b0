"""A model, or what was saved -> a plan over the loaded model, and the compiled model with the state that was saved.

A reference whose spec quantises something is planned on shapes first; then what stays dense is read, and the rest is
left in the checkpoint for the passes to read, pack and let go of, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.capture.capture import over
from peftc.capture.checkpoints.checkpoint import Checkpoint
from peftc.capture.checkpoints.differences import Differences
from peftc.capture.checkpoints.errors import UntrainedHead
from peftc.capture.checkpoints.references import Loaded, Reference, opened, parse_reference, read_model, readable
from peftc.capture.checkpoints.streaming import OpenCheckpoint
from peftc.capture.inputs import Example, example_inputs
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver import pipeline
from peftc.driver.compiled import CompiledModule
from peftc.driver.planned import misfit, plan_model
from peftc.files import artifact
from peftc.files.adapters import kohya
from peftc.files.errors import BadArtifact
from peftc.files.hf_peft import folder as peft_folder
from peftc.files.hf_peft.kinds import base_named, head_of
from peftc.files.hf_peft.saved import tokens_of
from peftc.graph.ir import get_attribute
from peftc.graph.surroundings import ordinary_tensors
from peftc.planning.plan import Plan
from peftc.spec.resolve import Intentions, resolve

# Of a model and the inputs that came with it: what to capture it with.
MakeExample = Callable[[nn.Module, Any], Example]


def load_and_plan(
    model: nn.Module | str | Path | Reference,
    intentions: Intentions,
    make_example: MakeExample,
    timings: Timings,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    whole: bool = False,
) -> Plan:
    """The plan of what a spec wants on a model whose weights can be read.

    Args:
        model: a module, or a reference.
        intentions: what to plan.
        make_example: called on the module that is captured.
        timings: collects seconds by stage.
        dtype: of a reference's weights; the checkpoint's own by default.
        trust_remote_code: Python code that a reference's folder comes with may run.
        whole: read all weights before planning, because the model itself is to be run.

    Raises:
        PeftcError: as `read_model` and `plan_model`; `untrained-head`.
    """
    if isinstance(model, nn.Module):
        return plan_model(model, intentions, make_example(model, None), timings)
    reference = parse_reference(model, trust_remote_code=trust_remote_code)
    if intentions.packings or any(fit.storages for fit in intentions.fits):
        checkpoint = None if whole else opened(reference, dtype=dtype)
        if checkpoint is not None:
            return leaving(reference, checkpoint, intentions, make_example, timings)
        debug.tell(1, [f"{reference.text} is read as a whole, and packed then"])
    with timings.stage("load"):
        found = read_model(reference, dtype=dtype)
    plan = plan_model(found.model, intentions, make_example(found.model, found.example), timings)
    return knowing(reference.text, plan, found.differences)


def leaving(
    reference: Reference,
    opened: OpenCheckpoint,
    intentions: Intentions,
    make_example: MakeExample,
    timings: Timings,
    *,
    everything: bool = False,
) -> Plan:
    """The plan over a model whose packed weights, or `everything`, were not read: they are left in the checkpoint."""
    with readable(reference):
        skeleton = opened.skeleton()
    plan = plan_model(skeleton, intentions, make_example(skeleton, None), timings)
    with timings.stage("load"), readable(reference):
        parameters = (name for name, _ in skeleton.named_parameters(remove_duplicate=False))
        model, differences = opened.load(without=parameters if everything else plan.packed)
    _tell(opened.checkpoint, len(plan.packed), timings)
    return knowing(reference.text, replace(plan, captured=over(plan.captured, model, opened.checkpoint)), differences)


def knowing(reference: str, plan: Plan, differences: Differences) -> Plan:
    """The plan, and in it how the checkpoint that was read differs from the model; `reference` names it to the user.

    Raises:
        PeftcError: `untrained-head` where what was drawn for the want of a tensor would stay as it was drawn.
    """
    learns = {alias for name in plan.trained for alias in plan.captured.aliases[name]}
    if random := tuple(name for name in differences.fresh if name not in learns):
        raise PeftcError(UntrainedHead(reference=reference, model=plan.sites.model, weights=random))
    return replace(plan, captured=replace(plan.captured, differences=differences))


def _tell(checkpoint: Checkpoint, count: int, timings: Timings) -> None:
    """Announces the weights as they are read."""
    read: set[str] = set()

    def tell(name: str) -> None:
        read.add(name)
        timings.progress(f"weight {len(read)} of {count}")

    checkpoint.on_read = tell


@ordinary_tensors()
def load(
    folder: str | Path, model: nn.Module | str | Path | None = None, *, trust_remote_code: bool = False
) -> CompiledModule:
    """The compiled model that was saved at `folder`, on its base model.

    Args:
        folder: what `CompiledModule.save` wrote.
        model: the base model, or a reference to it. Without it, the folder or hub id that the base was loaded from is
            read again; a model from a Python file must be passed, since an artifact never runs code.
        trust_remote_code: Python code that the base model's folder or hub id comes with may run.

    Raises:
        PeftcError: `bad-artifact` if anything in the folder is missing, cut short or altered; `wrong-base` if the
            base model's weights are not those the artifact was made on.
    """
    found = artifact.read(Path(folder))
    base: nn.Module | Reference
    if isinstance(model, nn.Module):
        base = model
    else:
        named = found.base if model is None else model
        base = found.reference(parse_reference(named, trust_remote_code=trust_remote_code))
    plan = load_and_plan(
        base,
        resolve(found.spec),
        lambda module, _given: found.example(module),
        Timings(),
        dtype=found.dtype,
        trust_remote_code=trust_remote_code,
    )
    if not isinstance(model, nn.Module):
        found.name_classes(plan.captured.model)
    compiled = built(found.folder, plan, found.state)
    for name, tensor in found.state.items():
        if (own := get_attribute(compiled, name).dtype) != tensor.dtype:
            reason = f"its {name} is {tensor.dtype}, where the compiled model has {own}"
            raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
    if plan.captured.checkpoint is not None:  # of these weights the numbers are known only now
        found.check_weights(compiled.base, plan.captured.checkpoint.digests)
    return compiled


@ordinary_tensors()
def load_peft(
    model: nn.Module | str | Path | Reference | None,
    folder: str | Path | None = None,
    *,
    example: Any = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> CompiledModule:
    """A model compiled with an adapter that HF PEFT saved.

    Args:
        model: the base model, or a reference to it. Left out, as in `load_peft(folder)`, or None, it is the base that
            the folder names, with the head that its task has.
        folder: where the adapter is; or one .safetensors file of kohya's scripts or of LyCORIS.
        example: as for `peftc.compile`.
        dtype: float32, float16, bfloat16 or float64 for a reference; its checkpoint's own by default.
        trust_remote_code: Python code that the base model's folder or hub id comes with may run.

    Raises:
        PeftcError: `bad-artifact` if the folder is incomplete, or holds a method or an option peftc does not have, or
            names no base model; what `peftc.compile` says of a reference.
    """
    if folder is None:
        if not isinstance(model, str | Path):
            raise TypeError("load_peft() needs the folder of an adapter")
        place = Path(model)
        model = None
    else:
        place = Path(folder)
    text, found, files = _opened(place, model, dtype, trust_remote_code)
    adapter = peft_folder.read(found.model, place, files)
    inputs = example_inputs(found.model, found.example if example is None else example)
    plan = plan_model(found.model, resolve(adapter.spec), inputs, Timings())
    return built(place, knowing(text, plan, found.differences), adapter.state(plan))


def _opened(
    place: Path, model: nn.Module | str | Path | Reference | None, dtype: str | None, trusted: bool
) -> tuple[str, Loaded, peft_folder.Files]:
    """What the base model is called, the model, and what the adapter's folder, or its one file, holds."""
    if place.is_file():
        if model is None:
            reason = "a file does not say where its base model is: pass the model, load_peft(model, file)"
            raise PeftcError(BadArtifact(folder=str(place), reason=reason))
        if isinstance(model, nn.Module):
            found = Loaded(model)
        else:
            found = read_model(parse_reference(model, trust_remote_code=trusted), dtype=dtype)
        return str(place), found, kohya.read(place, found.model)
    files = peft_folder.read_files(place)
    if isinstance(model, nn.Module):
        return "", Loaded(model), files
    named = base_named(place, files.config) if model is None else model
    reference = parse_reference(named, trust_remote_code=trusted)
    return reference.text, _base_of(reference, files, dtype), files


def _base_of(reference: Reference, files: peft_folder.Files, dtype: str | None) -> Loaded:
    """The base model of an adapter's folder, with the head and the tokens that its settings and tensors say it has."""
    if reference.kind == "folder":
        reference = replace(reference, **head_of(files.config, files.tensors))
    found = read_model(reference, dtype=dtype)
    tokens = tokens_of(found.model, files.tensors)
    if tokens is not None and isinstance(found.model, PreTrainedModel):
        found.model.resize_token_embeddings(tokens, mean_resizing=False)
    return found


def built(folder: Path, plan: Plan, state: dict[str, Tensor]) -> CompiledModule:
    """The compiled model with `state`, of which every planned tensor is there in its shape, and no other."""
    if reason := misfit(plan, state):
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"the tensors do not fit the spec: {reason}"))
    return pipeline.build(plan, Timings(), state)
