"""`peftc schema`: what commands print is what their schemas say, and no schema is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from peftc.cli import COMMANDS, command, main
from peftc.cli.schemas.derive import schema
from peftc.cli.schemas.outputs import OUTPUTS

SPEC = """\
quantize mlp.* with nf4
apply lora(r=2) to attn.q, attn.v in layers[1:]
checkpoint block in layers[:1]
train norm
"""
TASKS = "task one { apply lora(r=2) to attn.q }\ntask two { train norm }\n"
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
    "object": dict,
}  # fmt: skip


def wrong(value: Any, rule: dict[str, Any], whole: dict[str, Any], at: str = "$") -> list[str]:
    """Where a value is not what a schema says, of those words of the standard that ours have."""
    if name := rule.get("$ref", "").removeprefix("#/$defs/"):
        return wrong(value, whole["$defs"][name], whole, at)
    if choices := rule.get("anyOf"):
        tried = [wrong(value, one, whole, at) for one in choices]
        return [] if [] in tried else min(tried, key=len)
    kind = rule.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{at} is {value!r}, not {kind}"]
    if isinstance(value, list):
        return [each for index, one in enumerate(value) for each in wrong(one, rule["items"], whole, f"{at}[{index}]")]
    if not isinstance(value, dict) or not kind:
        return []
    properties, rest = rule.get("properties", {}), rule["additionalProperties"]
    found = [f"{at} lacks {name}" for name in rule.get("required", ()) if name not in value]
    for name, one in value.items():
        if name in properties or isinstance(rest, dict):
            found += wrong(one, properties.get(name, rest), whole, f"{at}.{name}")
        elif not rest:
            found.append(f"{at} has {name}, too")
    return found


def test_every_command_with_json_has_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with_json = {name for name in COMMANDS if any("--json" in one.names for one in command(name).arguments)}
    assert {*OUTPUTS} == with_json
    assert main(["schema", "plan"]) == 0
    assert json.loads(capsys.readouterr().out) == schema("plan")
    assert main(["schema"]) == 0
    assert {*json.loads(capsys.readouterr().out)} == with_json
    assert wrong({"errors": [{"code": 3}]}, schema("check"), schema("check")), "a schema refuses something"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    texts = {
        "spec.peft": SPEC,
        "lora.peft": "apply lora(r=2) to attn.q\n",
        "tasks.peft": TASKS,
        "bad.peft": "train nrom\napply lora(r=1, r=2) to attn.q\n",
    }
    for name, text in {**texts, "config.json": json.dumps(config.to_dict())}.items():
        (tmp_path / name).write_text(text)
    return {path.name.split(".")[0]: str(path) for path in tmp_path.iterdir()}


def check(line: str, files: dict[str, str], capsys: pytest.CaptureFixture[str], status: int = 0) -> None:
    arguments = line.format(**files).split()
    assert main([*arguments, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert not wrong(found, schema(arguments[0]), schema(arguments[0]))


def test_what_is_printed(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("check {spec}", "methods", "methods nf4", "sites {config}", "fmt {spec}"):
        check(line, files, capsys)
    for line in ("check {bad}", "plan {bad} {config}", "explain {spec} {config} nothing"):
        check(line, files, capsys, status=1)
    for line in ("plan {spec} {config}", "plan {tasks} {config}", "explain {spec} {config} 2"):
        check(line, files, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "explain {spec} {config} q_proj",
        "compile {spec} {config} --random-weights",
        "show {spec} {config} --random-weights",
        "bench {tasks} {config} --random-weights --repeats 1 --batch 2 --seq 8",
        "bench {spec} {config} --random-weights --repeats 1 --batch 1 --seq 4 --generate 2",
        "bench {lora} {config} --count --card h100 --seq 8",
    ],
)
def test_what_is_printed_of_a_model(line: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check(line, files, capsys)
