"""`peftc generate`: text by a compiled model, as it is written."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.errors import NoChatTemplate
from peftc.cli.common.inputs import ARTIFACT_HELP, JSON, MODEL_HELP, TRUST, positive
from peftc.cli.common.output import print_json, progress, quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from transformers import trainer_utils
    from transformers.generation import streamers

    from peftc.capture.checkpoints import tokenizers
else:
    trainer_utils = Lazy("transformers.trainer_utils")
    streamers = Lazy("transformers.generation.streamers")
    tokenizers = Lazy("peftc.capture.checkpoints.tokenizers")


def run(given: Namespace) -> None:
    """Writes text with an artifact: greedily, or as its generation_config says."""
    quieten()
    if given.prompt is None and sys.stdin.isatty():
        print("the prompt, and Ctrl-D at its end:", file=sys.stderr)
    prompt = sys.stdin.read() if given.prompt is None else given.prompt
    with progress(given) as timings:
        with timings.stage("compile"):
            compiled = peftc.load(given.artifact, given.model, trust_remote_code=given.trust_remote_code).eval()
        if given.task is not None:
            compiled.use(given.task)
        source = given.tokenizer or compiled.name_or_path or given.model or given.artifact
        tokenizer = tokenizers.read_tokenizer(source, trusted=given.trust_remote_code)
        inputs = _inputs(given, tokenizer, prompt).to(compiled.device)
        with timings.stage("continuation"):
            compiled.continuation()
    settings: dict[str, Any] = {"max_new_tokens": given.new}
    if given.temperature is not None:
        settings |= {"do_sample": given.temperature > 0} | (
            {"temperature": given.temperature} if given.temperature else {}
        )
    if given.seed is not None:
        trainer_utils.set_seed(given.seed)
    streamer = None if given.json else streamers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    written = compiled.generate(**inputs, **settings, streamer=streamer)[0, inputs["input_ids"].shape[1] :]
    if given.json:
        text = tokenizer.decode(written, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        print_json({"prompt": prompt, "text": text, "tokens": len(written), "seconds": seconds})


def _inputs(given: Namespace, tokenizer: Any, prompt: str) -> Any:
    if not given.chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise PeftcError(NoChatTemplate(source=str(tokenizer.name_or_path)))
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ArgumentTypeError(f"expects a number, at least 0, not {text!r}")
    return number


COMMAND = Command(
    "generate",
    run,
    (
        JSON,
        Argument("artifact", metavar="DIR", help=ARTIFACT_HELP),
        Argument("--prompt", metavar="TEXT", help="what the text begins with; else standard input"),
        Argument("--chat", action="store_true", help="the prompt is what a user says, in the model's chat template"),
        Argument("--task", metavar="NAME", help="which of the artifact's tasks writes; the first by default"),
        Argument("--new", type=positive, default=128, metavar="TOKENS", help="tokens to write at most (128)"),
        Argument("--temperature", type=_temperature, metavar="T", help="0 takes the likeliest token, else sampled"),
        Argument("--seed", type=positive, help="of what is sampled"),
        Argument("--tokenizer", metavar="MODEL", help="a folder or hub id, if the base model's has none"),
        Argument("--model", metavar="MODEL", help=f"the base model, if it moved: {MODEL_HELP}"),
        TRUST,
    ),
)  # fmt: skip
