"""`peftc export`."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import peftc
from exported import folder_of, learned

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model = folder_of("llama", folder / "model")
    learned(peftc.compile(model, "apply lora(r=4) to attn.q, mlp.down")).save(folder / "artifact")
    return folder / "artifact"


def test_an_adapter_and_a_merged_file(run: Run, artifact: Path, tmp_path: Path) -> None:
    status, out, err = run("export", artifact, "--to", "gguf", "-o", tmp_path / "lora.gguf")
    assert (status, err) == (0, "")
    assert f"llama-cli -m BASE.gguf --lora {tmp_path / 'lora.gguf'}" in out
    assert len(gguf.GGUFReader(tmp_path / "lora.gguf").tensors) == 8
    options = ("--to", "gguf", "--merged", "--dtype", "float16", "-o", tmp_path / "all.gguf", "--json")
    status, out, err = run("export", artifact, *options)
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["written"] == [{"path": str(tmp_path / "all.gguf"), "tensors": 21, "rank": None}]
    assert (told["to"], told["merged"]) == ("gguf", True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="all.gguf")
    assert back.config.vocab_size == 400
    status, _, err = run("export", artifact, "--to", "gguf", "-o", tmp_path / "lora.gguf")
    assert status == 1
    assert "bad-output" in err


def test_folders_for_vllm(run: Run, artifact: Path, tmp_path: Path) -> None:
    status, out, err = run("export", artifact, "--to", "vllm", "-o", tmp_path / "lora")
    assert (status, err) == (0, "")
    assert f"--max-lora-rank 8 --lora-modules NAME={tmp_path / 'lora'}" in out
    status, out, err = run("export", artifact, "--to", "vllm", "--merged", "-o", tmp_path / "merged")
    assert (status, err) == (0, "")
    assert f"vllm serve {tmp_path / 'merged'}" in out
    ids = torch.arange(3, 9)[None]
    wanted = peftc.load(artifact).eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-5)


def test_of_several_tasks(run: Run, artifact: Path, tmp_path: Path) -> None:
    spec = "task a { apply lora(r=2) to attn.q }\ntask b { apply ia3 to mlp.down }\n"
    peftc.compile(artifact.parent / "model", spec).save(tmp_path / "artifact")
    status, _, err = run("export", tmp_path / "artifact", "--to", "gguf", "--merged", "-o", tmp_path / "m.gguf")
    assert status == 1
    assert "which-task" in err
    for options in (("--task", "a"), ("--task", "b", "--merged")):
        output = tmp_path / f"{options[1]}.gguf"
        status, _, err = run("export", tmp_path / "artifact", "--to", "gguf", *options, "-o", output)
        assert (status, err) == (0, "")
    status, _, err = run("export", tmp_path / "artifact", "--to", "vllm", "--task", "b", "-o", tmp_path / "b")
    assert status == 1
    assert "not-in-vllm" in err
    assert "--merged" in err
