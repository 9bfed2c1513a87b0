"""The model card beside an adapter: README.md, as the hub shows it, with the spec, the counts and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftc.diagnostics.reading import read_file
from peftc.files.artifact import flattened
from peftc.files.folder import current
from peftc.runtime.module import Runtime

CARD = "README.md"
MARK = "<!-- Written by peftc, which writes it anew with the adapter. Take this line out to keep it as it is. -->"
LARGEST = 4 << 20  # bytes
AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def is_ours(folder: Path) -> bool:
    """Whether a folder's card may be written: there is none, or peftc wrote it."""
    path = current(folder, CARD)
    try:
        return not path.exists() or MARK.encode() in read_file(path, LARGEST)
    except OSError:
        return False


def card(compiled: Runtime, config: dict[str, Any]) -> str:
    """The text of the card for a model whose settings in the folder are `config`."""
    plan = compiled.plan
    named = config.get("base_model_name_or_path")
    methods = dict.fromkeys(binding.method.name for binding in plan.bindings) or {"norms": None}
    rows = [(row.statement, f"{row.sites:,}", *row.told(plan.total)) for row in plan.rows]
    rows.append(("all", "", f"{plan.trainable:,}", f"{plan.share:.4%}"))
    return "\n".join([
        "---",
        *([f"base_model: {json.dumps(named)}"] if named and not Path(named).exists() else []),
        "library_name: peft",
        "tags:",
        *(f"- {tag}" for tag in ("peftc", *methods)),
        "---",
        "",
        MARK,
        "",
        f"# {', '.join(methods)} for {plan.sites.model}",
        "",
        "```",
        flattened(plan.spec),
        "```",
        "",
        "| statement | sites | trainable | share |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(_cell(text) for text in row)} |" for row in rows),
        "",
        f"Of {plan.total:,} parameters in all. With peftc:",
        "",
        "```python",
        *_ours(named),
        "```",
        "",
        "With HF PEFT:",
        "",
        "```python",
        *_theirs(config, named),
        "```",
        "",
    ])  # fmt: skip


def _ours(named: str | None) -> list[str]:
    if named:
        return ["import peftc", "", 'model = peftc.load_peft("path/to/this/folder")']
    return [
        "import peftc",
        "",
        'model = peftc.load_peft(base, "path/to/this/folder")  # base: what it was made on',
    ]


def _theirs(config: dict[str, Any], named: str | None) -> list[str]:
    auto = AUTO.get(config.get("task_type") or "", "AutoPeftModel" if config.get("auto_mapping") else "")
    if named and auto:
        return [f"from peft import {auto}", "", f'model = {auto}.from_pretrained("path/to/this/folder")']
    return ["from peft import PeftModel", "", 'model = PeftModel.from_pretrained(base, "path/to/this/folder")']


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
