"""A compiled model -> what continues text with it: the model captured once more, with a cache, and the same passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import fx
from transformers import PreTrainedModel

from peftc.capture.cached import CachedExample, as_compiled, cached_example
from peftc.capture.convention import fields_of
from peftc.capture.inputs import Example
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.passes import PASSES, Pass, Work, run
from peftc.driver.planned import Again
from peftc.graph.ir import tensors
from peftc.graph.surroundings import ordinary_tensors
from peftc.optimise.decoding.cuts import Programs, programs
from peftc.planning.plan import extension
from peftc.protocol.method import Stage
from peftc.runtime.generation.decoder import Decoder
from peftc.runtime.module import Runtime

PROMPTS = f"{Stage.SEQUENCE.name.lower()} methods"


def decoder(compiled: Runtime) -> Decoder | None:
    """What continues text with a compiled model; None where its base reads no tokens, or the spec none of them.

    Raises:
        PeftcError: where its base cannot be captured as it continues text, with or without a cache.
    """
    again, failed = Again(compiled), None
    with ordinary_tensors(), torch.random.fork_rng(), torch.autocast(compiled.device.type, enabled=False):
        example = cached_example(cast(PreTrainedModel, again.model), compiled.plan.captured.example)
        for tried in _tries(example, compiled.plan.captured.example):
            try:
                if (found := _decoder(again, tried)) is not None:
                    return found
            except PeftcError as error:
                debug.tell(1, [f"not captured with a cache: {error}"])
                failed = error
    if failed is not None:
        raise failed
    return None


def runs_whole_texts(compiled: Runtime) -> bool:
    """Whether a text model's cache cannot be captured, so that the whole text runs for each token; False for others."""
    if not compiled.can_generate():
        return False
    if compiled.continues_by is not None:
        return not compiled.continues_by.keeps
    with ordinary_tensors(), torch.random.fork_rng():
        example = cached_example(cast(PreTrainedModel, Again(compiled).model), compiled.plan.captured.example)
    return example is not None and not example.cached.parameter


def _tries(example: CachedExample | None, own: Example) -> Iterator[CachedExample]:
    """The call with a cache; one without, which knows positions all the same; one with what it was compiled with."""
    if example is not None:
        yield example
        if example.cached.parameter:
            yield example.without_cache()
        if "input_ids" in own.kwargs and "decoder_input_ids" not in example.kwargs:
            yield as_compiled(own)


def _decoder(again: Again, example: CachedExample) -> Decoder | None:
    compiled = again.compiled
    seq2seq = bool(compiled.config.is_encoder_decoder)
    front = 0 if seq2seq else extension(compiled.plan.bindings)  # what stands before an encoder's text is encoded
    made = _programs(again, example, PASSES)
    if made is None:
        return None
    module, found = made
    if front and example.cached.parameter:
        without = tuple(replace(step, run=lambda _work: None) if step.name == PROMPTS else step for step in PASSES)
        rest = _programs(again, example, without)
        assert rest is not None
        found = replace(found, go_on=rest[1].go_on)
    own = tensors(compiled)
    constants = {name: tensor.to(compiled.device) for name, tensor in tensors(module).items() if name not in own}
    return Decoder(compiled.plan.sites.model, example.cached, found, constants, seq2seq, compiled.device.type, front)


def _programs(again: Again, example: CachedExample, passes: Sequence[Pass]) -> tuple[fx.GraphModule, Programs] | None:
    """One capture, with passes run over it, as programs; None where the spec means something else there."""
    if (plan := again.plan(example)) is None:
        return None
    work = Work.on(plan, state=again.state(plan))
    for _ in run(work, passes, Timings()):
        pass
    names = tuple(fields_of(plan.captured.result))
    return work.module, programs(work.module, names, example.cached, PROMPTS)
