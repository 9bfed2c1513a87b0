"""`peftc export`: an artifact as another runtime loads it."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.errors import WhichTask
from peftc.cli.common.inputs import ARTIFACT_HELP, JSON, MODEL_HELP, TRUST
from peftc.cli.common.output import print_json, progress, quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible

if TYPE_CHECKING:
    from peftc.files.export import vllm
    from peftc.files.export.export import Exported
else:
    vllm = Lazy("peftc.files.export.vllm")

RUNTIMES = ("gguf", "vllm")
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def run(given: Namespace) -> None:
    """Writes an artifact as llama.cpp (gguf) or vLLM loads it: an adapter, or the merged model."""
    quieten()
    with progress(given) as timings:
        with timings.stage("compile"):
            compiled = peftc.load(given.artifact, given.model, trust_remote_code=given.trust_remote_code)
        if given.merged and given.task is None and len(compiled.tasks) > 1:
            raise PeftcError(WhichTask(tasks=compiled.tasks))
        with timings.stage("export"):
            written = compiled.export(
                given.to, given.output, merged=given.merged, dtype=given.dtype, task=given.task,
                tokenizer=given.tokenizer,
            )  # fmt: skip
    if given.json:
        files = [{"path": str(one.path), "tensors": one.tensors, "rank": one.rank} for one in written]
        print_json({"to": given.to, "merged": given.merged, "written": files, "seconds": timings.seconds})
        return
    for one in written:
        print(f"written to {visible(str(one.path))}; {_use(given, one)}")


def _use(given: Namespace, one: Exported) -> str:
    """How the runtime is told of what was written."""
    path = visible(str(one.path))
    if given.to == "gguf":
        return f"llama-cli -m {path}" if one.rank is None else f"llama-cli -m BASE.gguf --lora {path}"
    if one.rank is None:
        return f"vllm serve {path}"
    largest = vllm.served_rank(one.rank)
    return f"vllm serve BASE --enable-lora --max-lora-rank {largest} --lora-modules NAME={path}"


COMMAND = Command(
    "export",
    run,
    (
        JSON,
        Argument(
            "artifact",
            metavar="DIR",
            help=ARTIFACT_HELP,
        ),
        Argument("--to", choices=RUNTIMES, required=True, help="gguf: a file for llama.cpp; vllm: a folder"),
        Argument("-o", "--output", metavar="OUT", required=True, help="where the file or folder goes"),
        Argument(
            "--merged",
            action="store_true",
            help="the whole model with what was learned in its weights; else an adapter beside the base model's own "
            "file or folder",
        ),
        Argument(
            "--dtype",
            choices=DTYPES,
            help="of the weights, q8_0 in a GGUF file alone; float32 for an adapter and the base's own for a merged "
            "model by default",
        ),
        Argument("--task", metavar="NAME", help="which of the artifact's tasks; of adapters, all of them by default"),
        Argument("--tokenizer", metavar="MODEL", help="a folder or hub id, if the base model's has none; for --merged"),
        Argument("--model", metavar="MODEL", help=f"the base model, if it moved: {MODEL_HELP}"),
        TRUST,
    ),
)
