"""How many parameters each method trains, by default, on three models: `docs/counts.json`, from shapes alone.

python docs/counting.py
"""

from __future__ import annotations

import json

from generated import COUNTS, ROOT, statement
from peftc.api import as_model
from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from peftc.planning.planner import make_plan
from peftc.protocol.method import methods
from peftc.roles.assign import find_sites
from peftc.spec.check import intend

MODELS = {"Llama 3 8B": "llama-3-8b", "OPT 1.3B": "opt-1.3b", "T5 base": "t5-base"}


def counts() -> dict[str, dict[str, int]]:
    """By method and model. Each model is captured once."""
    found: dict[str, dict[str, int]] = {name: {} for name in methods()}
    for title, name in MODELS.items():
        module, given = as_model(ROOT / "examples" / "configs" / f"{name}.json", meta=True)
        captured = capture(module, example_inputs(module, given))
        sites = find_sites(captured)
        for method, cls in methods().items():
            found[method][title] = make_plan(captured, sites, intend(statement(cls))).trainable
    return found


def written() -> str:
    """What the file holds."""
    return json.dumps(counts(), indent=1) + "\n"


if __name__ == "__main__":
    COUNTS.write_text(written())
