"""`peftc show`: the graph, as text, a page, or for another program to draw."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command, Lazy
from peftc.cli.common.inputs import DTYPE, JSON, MODEL, RANDOM_WEIGHTS, SPEC, TRUST, model_to_compile
from peftc.cli.common.output import progress, write_text

if TYPE_CHECKING:
    from peftc import api, show
    from peftc.driver import passes
else:
    api, show, passes = Lazy("peftc.api"), Lazy("peftc.show"), Lazy("peftc.driver.passes")


def run(given: Namespace) -> None:
    """The graph before and after the passes."""
    asked = passes.up_to(given.after)
    steps = passes.PASSES if given.html else asked  # a page has every pass
    with progress(given) as timings:
        model, example = model_to_compile(given, timings, given.dtype)
        graphs = api.graphs(
            model, Path(given.spec), steps, example=example,
            dtype=given.dtype, trust_remote_code=given.trust_remote_code, timings=timings, task=given.task,
        )  # fmt: skip
    wanted: dict[show.Format, str | None] = {"html": given.html, "dot": given.dot, "mermaid": given.mermaid}
    block = given.block if given.block else next(iter(graphs.plan.sites.blocks), None)
    chosen: dict[show.Format, str] = {kind: path for kind, path in wanted.items() if path}
    for kind, path in (chosen or {"text": "-"}).items():
        text = show.render_show(
            graphs, block=None if given.whole else block, after=given.after, format=kind, detail=given.detail
        )
        if path == "-":
            print(text)
        else:
            write_text(path, text)
            print(f"written to {path}")


SHOW = Command(
    "show",
    run,
    (
        SPEC,
        MODEL,
        JSON,
        Argument("--html", metavar="FILE", help="a self-contained page ('-' for standard output, as below)"),
        Argument("--dot", metavar="FILE", help="Graphviz"),
        Argument("--mermaid", metavar="FILE", help="Mermaid"),
        Argument("--after", metavar="PASS", help="the graph after this pass instead of the last"),
        Argument("--block", metavar="PATH", help="which block; the first by default"),
        Argument("--whole", action="store_true", help="the whole model, a node a block"),
        Argument("--task", metavar="NAME", help="which of the spec's tasks; the first by default"),
        Argument("--detail", action="store_true", help="keep views and casts"),
        RANDOM_WEIGHTS,
        DTYPE,
        TRUST,
    ),
)
