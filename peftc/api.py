"""compile, plan, sites: the public functions that take a model, or a reference to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc.capture.capture import capture
from peftc.capture.checkpoints.references import Reference, load_model, parse_reference
from peftc.capture.inputs import Example, example_inputs
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver import pipeline
from peftc.driver.calibration import refuse_without_data
from peftc.driver.compiled import CompiledModule
from peftc.driver.loading import load_and_plan
from peftc.driver.passes import PASSES, Pass
from peftc.driver.planned import plan_model
from peftc.graph.surroundings import ordinary_tensors
from peftc.planning.plan import Plan
from peftc.protocol.sites import Sites
from peftc.roles.assign import find_sites
from peftc.runtime.errors import UnknownTask
from peftc.show.notebook import plan_image
from peftc.spec.check import SpecLike, intend
from peftc.spec.resolve import Intentions


@ordinary_tensors()
def compile(
    model: nn.Module | str | Path | Reference,
    spec: SpecLike,
    *,
    example: Any = None,
    calibration: Iterable[Any] | None = None,
    fuse: bool = True,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    timings: Timings | None = None,
) -> CompiledModule:
    """Compiles `spec` into `model`.

    Args:
        model: a module, which is not changed, or a reference: a Hugging Face folder or id, a `.gguf` file,
            `path/to/file.py:factory`.
        spec: a path ending in `.peft`, spec text, a parsed `Spec`, or what `peftc.spec.check.intend` makes of one.
        example: inputs to capture with, for a module that is not a transformers model: a tensor, a tuple, or a dict
            of keyword arguments, with a batch of two or more.
        calibration: batches, each as the model is called (with labels, where gradients are asked for), for methods
            that start from data: FISH, EVA, SNIP.
        fuse: compute together what belongs together, and keep for the backward pass only what is dear to compute
            again. Without it the graph runs operation by operation as its passes wrote it: slower, the same numbers.
        dtype: float32, float16, bfloat16 or float64 for a reference; its checkpoint's own by default.
        trust_remote_code: Python code that a folder or hub id comes with may run. Nothing else allows it.
        timings: collects seconds by stage.

    What a spec quantises of a reference with safetensors files is read and packed one weight at a time, and never there
    as a whole. A module, a `.gguf` file, a `.bin` file, and any model that is to see calibration batches, is.

    Returns:
        A trainable `torch.fx.GraphModule`, called as the model is. Its frozen parameters are the model's own tensors.

    Raises:
        PeftcError: with every mistake in the spec, each with its line.
    """
    timings = timings or Timings()
    intentions = intend(spec)
    if calibration is None:
        refuse_without_data(intentions)  # what a spec can be blamed for alone comes before the model is read
    plan = _loaded(
        model, intentions, example, timings,
        dtype=dtype, trust_remote_code=trust_remote_code, whole=calibration is not None,
    )  # fmt: skip
    data = None if calibration is None else pipeline.calibrate(plan, list(calibration), timings)
    return pipeline.build(plan, timings, data=data, fuse=fuse)


@ordinary_tensors()
def graphs(
    model: nn.Module | str | Path | Reference,
    spec: SpecLike,
    passes: Sequence[Pass] = PASSES,
    *,
    example: Any = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    timings: Timings | None = None,
    task: str | None = None,
) -> pipeline.Graphs:
    """The graph after each of `passes`, of what `compile` would make. Nothing behind them is done.

    Args:
        model: as for `compile`.
        spec: as for `compile`.
        passes: such as `peftc.driver.passes.up_to` gives; all by default.
        example: as for `compile`.
        dtype: as for `compile`.
        trust_remote_code: as for `compile`.
        timings: collects seconds by stage.
        task: whose graph it is, of a spec with tasks; the first one's by default.

    Raises:
        PeftcError: with every mistake in the spec, each with its line; `unknown-task`.
    """
    timings = timings or Timings()
    intentions = intend(spec)
    refuse_without_data(intentions)
    if task is not None and task not in intentions.tasks:
        raise PeftcError(UnknownTask(name=task, known=tuple(intentions.tasks)))
    if intentions.tasks:
        intentions = intentions.task(task or next(iter(intentions.tasks)))
    plan = _loaded(model, intentions, example, timings, dtype=dtype, trust_remote_code=trust_remote_code)
    return pipeline.graphs(plan, passes, timings)


def _loaded(
    model: nn.Module | str | Path | Reference, intentions: Intentions, example: Any, timings: Timings, **options: Any
) -> Plan:
    """The plan, on a model with its weights."""

    def make_example(module: nn.Module, given: Any) -> Example:
        return example_inputs(module, given if example is None else example)

    return load_and_plan(model, intentions, make_example, timings, **options)


@ordinary_tensors()
def plan(
    model: nn.Module | str | Path | Reference,
    spec: SpecLike,
    *,
    example: Any = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    timings: Timings | None = None,
) -> Plan:
    """What `compile` would do, from shapes alone: a reference is built on the meta device, no weights are read.

    Args:
        model: as for `compile`; also a bare `config.json`.
        spec: as for `compile`.
        example: as for `compile`.
        dtype: float32, float16, bfloat16 or float64 for a reference; its config's own by default.
        trust_remote_code: as for `compile`.
        timings: collects seconds by stage.

    Raises:
        PeftcError: with every mistake in the spec, each with its line.
    """
    intentions = intend(spec)
    module, given = as_model(model, trust_remote_code=trust_remote_code, meta=True, dtype=dtype)
    inputs = example_inputs(module, given if example is None else example)
    return replace(plan_model(module, intentions, inputs, timings or Timings()), picture=plan_image)


@ordinary_tensors()
def sites(model: nn.Module | str | Path | Reference, *, example: Any = None, trust_remote_code: bool = False) -> Sites:
    """What `model` offers to selectors: roles, names, shapes, in the order of the forward pass."""
    module, given = as_model(model, trust_remote_code=trust_remote_code, meta=True)
    return find_sites(capture(module, example_inputs(module, given if example is None else example)))


def as_model(
    model: nn.Module | str | Path | Reference, *, trust_remote_code: bool = False, **options: Any
) -> tuple[nn.Module, Any]:
    """The module itself, or what a reference names with its example inputs; `options` are those of `load_model`."""
    if isinstance(model, nn.Module):
        return model, None
    return load_model(parse_reference(model, trust_remote_code=trust_remote_code), **options)
