"""`peftc generate` and `peftc bench --generate`."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import models
import peftc

SMOLLM2 = f"{Path(models.__file__)}:smollm2"
SPEC = "apply lora(r=4, alpha=8) to attn.q, attn.v"
PROMPT = "The capital of France is"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "lora"
    peftc.compile(models.smollm2(), SPEC).save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("kind", ["plain", "chat", "standard input"])
def test_text_is_what_the_model_generates(run: Run, artifact: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(PROMPT))
    options = {"plain": ("--prompt", PROMPT), "chat": ("--prompt", PROMPT, "--chat"), "standard input": ()}[kind]
    common = ("generate", artifact, "--model", SMOLLM2, "--new", 8, "--temperature", 0, *options)
    status, out, err = run(*common)
    assert (status, err) == (0, "")
    monkeypatch.setattr("sys.stdin", StringIO(PROMPT))
    status, data, err = run(*common, "--json")
    assert (status, err) == (0, "")
    tokenizer: Any = AutoTokenizer.from_pretrained(models.smollm2_dir())
    said = [{"role": "user", "content": PROMPT}]
    given = (
        tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if kind == "chat" else tokenizer(PROMPT, return_tensors="pt")
    )  # fmt: skip
    base: Any = models.smollm2().eval()
    written = base.generate(**given, max_new_tokens=8, do_sample=False)
    expected = str(tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    assert out.strip() == json.loads(data)["text"].strip() == expected.strip()
    assert json.loads(data)["tokens"] <= 8


@pytest.mark.slow
def test_without_a_tokenizer_it_says_where_one_may_come_from(run: Run, artifact: Path, tmp_path: Path) -> None:
    status, _, err = run("generate", artifact, "--model", SMOLLM2, "--prompt", "x", "--tokenizer", tmp_path)
    assert status == 1
    assert "no-tokenizer" in err
    assert "--tokenizer" in err
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_dir())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    status, _, err = run("generate", artifact, "--model", SMOLLM2, "--prompt", "x", "--tokenizer", tmp_path, "--chat")
    assert status == 1
    assert "no-chat-template" in err


@pytest.mark.slow
def test_writing_is_measured_beside_the_base_and_hf_peft(run: Run, tmp_path: Path) -> None:
    spec = tmp_path / "lora.peft"
    spec.write_text(SPEC)
    status, out, err = run("bench", spec, SMOLLM2, "--generate", 3, "--repeats", 1, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == ["base", "peftc", "HF PEFT"]
    assert all(row["tokens"] > 0 and row["peak"] > 0 for row in found["rows"])
    assert found["agrees"]
    assert (found["batch"], found["prompt"], found["new"]) == (1, 16, 3)
    status, out, _ = run("bench", spec, SMOLLM2, "--generate", 3, "--repeats", 1, "--batch", 2)
    assert status == 0
    assert "2 × 3 tokens behind" in out


def test_the_temperature_is_a_number(run: Run) -> None:
    for wrong in ("hot", "-1", "inf"):
        with pytest.raises(SystemExit):
            run("generate", "folder", "--temperature", wrong)
