"""`peftc show`: the graph, as text, a page, or for another program to draw."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.capture.checkpoints.naming import TASKS
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import (
    DTYPE,
    JSON,
    LABELS,
    MODEL,
    RANDOM_WEIGHTS,
    SPEC,
    TRUST,
    checked_spec,
    model_to_compile,
)
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.files.whole import write_whole

if TYPE_CHECKING:
    from peftc import api
    from peftc.driver import passes
    from peftc.show import formats
else:
    api, formats, passes = Lazy("peftc.api"), Lazy("peftc.show.formats"), Lazy("peftc.driver.passes")


def run(given: Namespace) -> None:
    """The graph before and after the passes."""
    task = None if given.task in TASKS else given.task
    if given.image not in (None, "-") and Path(given.image).suffix != ".svg":
        raise PeftcError(formats.NotAnImage(path=given.image))
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        model, example = model_to_compile(given, timings, given.dtype)
        asked = passes.up_to(given.after)
        steps = passes.PASSES if given.html else asked  # a page has every pass
        graphs = api.graphs(
            model, spec, steps, example=example,
            dtype=given.dtype, trust_remote_code=given.trust_remote_code, timings=timings, task=task,
        )  # fmt: skip
    wanted: dict[formats.Format, str | None] = {
        "html": given.html, "svg": given.image, "dot": given.dot, "mermaid": given.mermaid,
    }  # fmt: skip
    block = given.block or formats.first_touched(graphs.plan)
    chosen: dict[formats.Format, str] = {kind: path for kind, path in wanted.items() if path}
    for kind, path in (chosen or {"json" if given.json else "text": "-"}).items():
        text = formats.render_show(
            graphs, block=None if given.whole else block, after=given.after, format=kind, detail=given.detail
        )
        if path == "-":
            print(text)
        else:
            write_whole(path, text)
            if not given.json:
                print(f"written to {path}")
    if given.json and chosen:
        print_json({"written": {kind: path for kind, path in chosen.items() if path != "-"}})


COMMAND = Command(
    "show",
    run,
    (
        SPEC,
        MODEL,
        JSON,
        Argument("--html", metavar="FILE", help="a self-contained page ('-' for standard output, as below)"),
        Argument("--image", metavar="FILE.svg", help="one block as an image, without a browser"),
        Argument("--dot", metavar="FILE", help="Graphviz"),
        Argument("--mermaid", metavar="FILE", help="Mermaid"),
        Argument("--after", metavar="PASS", help="the graph after this pass instead of the last"),
        Argument("--block", metavar="PATH", help="which block; the first that the spec touches by default"),
        Argument("--whole", action="store_true", help="the whole model, a node a block"),
        Argument("--task", metavar="NAME", help="which of the spec's tasks, or which head the model gets"),
        Argument("--detail", action="store_true", help="keep views and casts"),
        RANDOM_WEIGHTS,
        LABELS,
        DTYPE,
        TRUST,
    ),
)
