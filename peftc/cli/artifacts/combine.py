"""`peftc combine`: several LoRA adapters made one, by their numbers."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import JSON, MODEL_HELP, TRUST, amount, positive
from peftc.cli.common.output import print_json, progress, quieten
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible

if TYPE_CHECKING:
    from peftc.driver import combining
else:
    combining = Lazy("peftc.driver.combining")

HOWS = ("linear", "cat", "svd", "ties", "dare", "magnitude_prune")


def run(given: Namespace) -> None:
    """Several LoRA adapters made one, each with a weight, which may take away."""
    quieten()
    with progress(given) as timings, timings.stage("combine"):
        made = combining.combine(
            given.adapters, given.output, weights=given.weights, how=given.how, density=given.density, rank=given.rank,
            seed=given.seed, model=given.model, trust_remote_code=given.trust_remote_code,
        )  # fmt: skip
    if given.json:
        print_json(made.to_json())
        return
    ranks = "rank " + " to ".join(map(str, sorted({made.ranks[0], made.ranks[-1]})))
    what = f"{len(made.weights)} adapters made one, {made.how}, {ranks} at {made.modules} modules"
    print(f"{what}, in {visible(made.folder)}")


COMMAND = Command(
    "combine",
    run,
    (
        JSON,
        Argument("adapters", metavar="DIR", nargs="+", help="folders of HF PEFT, or what 'peftc compile -o' wrote"),
        Argument("-o", "--output", metavar="DIR", required=True, help="where the one adapter goes"),
        Argument("--weights", metavar="W", nargs="+", type=float, help="one for each, below 0 to subtract; else 1"),
        Argument("--how", choices=HOWS, default="linear", help="cat is the sum itself, svd nearest to it in one rank"),
        Argument("--density", type=amount, metavar="D", help="part that ties, dare, magnitude_prune keep, at most 1"),
        Argument("--rank", type=positive, metavar="R", help="of svd; the largest there by default"),
        Argument("--seed", type=int, default=0, help="of dare's choice"),
        Argument("--model", metavar="MODEL", help=f"the base model of artifacts, if it moved: {MODEL_HELP}"),
        TRUST,
    ),
)
