"""`peftc train`: what HF PEFT learns from the same examples, and a run that goes on where it was cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peftc
from bytewise import PLAIN, tokenizer
from peftc.diagnostics.diagnostic import PeftcError
from peftc.training.options import arguments

Run = Callable[..., tuple[int, str, str]]
SPEC = "apply lora(r=4, alpha=8, dropout=0.1) to attn.q, mlp.down\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer, a spec and data."""
    folder = tmp_path_factory.mktemp("train")
    reads = tokenizer(PLAIN)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(reads), num_hidden_layers=1, pad_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    reads.save_pretrained(folder / "model")
    (folder / "spec.peft").write_text(SPEC)
    turns = [[f"{i} + {i}?", str(i + i)] for i in range(24)]
    lines = (
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in turns
    )
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def command(place: Path, output: Path, *more: object) -> list[str]:
    given = ("train", place / "spec.peft", place / "model", "--data", place / "data.jsonl", "-o", output, *more)
    return [str(each) for each in given]


STEPS = ("--max_steps", 4, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--learning-rate", "1e-2")


@pytest.mark.parametrize("packing", [(), ("--no-packing",)], ids=["packed", "padded"])
def test_losses_are_those_of_hf_peft(place: Path, tmp_path: Path, run: Run, packing: tuple[str, ...]) -> None:
    """From the same start, by Trainer on examples that are made by hand here."""
    (place / "spec.peft").write_text(SPEC.replace(", dropout=0.1", ""))
    status, out, err = run(*command(place, tmp_path / "run", *STEPS, *packing, "--write", "peft", "--json"))
    assert status == 0, out + err
    (place / "spec.peft").write_text(SPEC)
    set_seed(42)
    start = peftc.compile(LlamaForCausalLM.from_pretrained(place / "model"), SPEC.replace(", dropout=0.1", ""))
    start.save_pretrained(tmp_path / "start")
    base = LlamaForCausalLM.from_pretrained(place / "model")
    other = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    reads, examples = tokenizer(PLAIN), []
    for line in (place / "data.jsonl").read_text().splitlines():
        asked, answer = (turn["content"] for turn in json.loads(line)["messages"])
        before, after = (reads(text)["input_ids"] for text in (f"[user]{asked}</s>[assistant]", f"{answer}</s>"))
        examples.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "other"), max_steps=4, logging_steps=1, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to="none", dataloader_pin_memory=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(other, arguments, DataCollatorForSeq2Seq(reads), examples)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # In float32, over another order of sums.
    assert json.loads(out)["losses"] == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.slow
def test_texts_are_padded_where_a_graph_takes_no_positions(place: Path, tmp_path: Path, run: Run) -> None:
    """As with AdaLoRA, whose penalty is in the graph."""
    (tmp_path / "spec.peft").write_text("apply adalora(r=4, target=2, steps=4, warmup=1, final=1) to attn.q\n")
    given = command(place, tmp_path / "out", "--max_steps", 4)
    given[1] = str(tmp_path / "spec.peft")
    status, out, err = run(*given)
    assert status == 0, out + err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_is_not(place: Path, tmp_path: Path, run: Run) -> None:
    more = ("--max_steps", 120, "--save_steps", 5, "--per_device_train_batch_size", 4)
    status, out, err = run(*command(place, tmp_path / "whole", *more))
    assert status == 0, out + err
    killed = subprocess.Popen(
        [sys.executable, "-m", "peftc", *command(place, tmp_path / "cut", *more)], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    last = 5 * (1 + os.urandom(1)[0] % 12)  # at most half of the steps: the rest outlasts what comes until the kill
    while not (tmp_path / f"cut/checkpoint-{last}").exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(os.urandom(1)[0] / 10000)  # amid a save, or in the steps after it
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it had ended before"
    status, out, err = run(*command(place, tmp_path / "cut", *more, "--json"))
    assert status == 0, out + err
    assert json.loads(out)["resumed_at"] < json.loads(out)["steps"] == 120
    one, other = (load_file(tmp_path / name / "artifact" / "adapter.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place: Path, tmp_path: Path) -> None:
    """Each of half a batch; sums of gradients are made in another order."""
    (tmp_path / "spec.peft").write_text(SPEC.replace(", dropout=0.1", ""))
    own = command(place, tmp_path / "out", "--max_steps", 4, "--no-packing", "--use_cpu", "true", "--json")
    own[1] = str(tmp_path / "spec.peft")
    made = []
    for name, start, size in (("one", (), 8), ("two", ("-m", "torch.distributed.run", "--nproc_per_node=2"), 4)):
        own[own.index("-o") + 1] = str(tmp_path / name)
        line = [sys.executable, *start, "-m", "peftc", *own, "--per_device_train_batch_size", str(size)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append(load_file(tmp_path / name / "artifact" / "adapter.safetensors"))
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=0, atol=1e-5)
    done = subprocess.run([sys.executable, *line[4:]], capture_output=True, text=True, check=False)
    assert (done.returncode, "processes: 2 there, 1 here" in done.stdout) == (1, True)


def test_methods_that_start_from_data_are_given_some(place: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "fish.peft").write_text("apply fish(keep=0.05) to mlp.down\n")
    tokens = torch.randint(2, 200, (8, 12), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens, "labels": tokens.clone()}, tmp_path / "some.safetensors")
    given = ["train", tmp_path / "fish.peft", *command(place, tmp_path / "out", "--max_steps", 1, "--json")[2:]]
    status, out, err = run(*given)
    assert (status, "--calibration FILE" in out) == (1, True)
    status, out, err = run(*given, "--calibration", tmp_path / "some.safetensors")
    assert status == 0, out + err


def test_another_run_is_not_gone_on_with(place: Path, tmp_path: Path, run: Run) -> None:
    """Refused before the model is read, and nothing is touched."""
    (tmp_path / "artifact").mkdir()
    (tmp_path / "run.json").write_text(
        json.dumps({"spec": SPEC, "model": "m", "data": {}, "settings": {"seed": 1, "processes": 2}})
    )
    status, _, err = run(*command(place, tmp_path, "--seed", 2))
    assert status == 1
    assert "error[other-run]" in err
    assert "another model" in err
    assert "seed: 1 there, 2 here" in err
    assert "processes: 2 there, 1 here" in err
    (tmp_path / "run.json").rename(tmp_path / "letter.txt")
    status, _, err = run(*command(place, tmp_path))
    assert "it has files, and no run.json" in err
    assert {path.name for path in tmp_path.iterdir()} == {"letter.txt", "artifact"}


def test_a_spec_of_several_tasks_is_refused(place: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "tasks.peft").write_text("task a { train norm }\ntask b { train bias }\n")
    given = [
        each.replace(str(place / "spec.peft"), str(tmp_path / "tasks.peft")) for each in command(place, tmp_path / "o")
    ]
    status, _, err = run(*given)
    assert (status, "has the tasks a, b, and a run is of one" in err) == (1, True)


@pytest.mark.parametrize(
    ("given", "variable"),
    [(("--fsdp", "full_shard"), ""), (("--deepspeed", "zero.json"), ""), ((), "ACCELERATE_USE_FSDP")],
)
def test_engines_that_were_not_tried_are_refused(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], variable: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "true")
    status, _, err = run(*command(place, tmp_path / "out", *given))
    assert status == 1
    assert "error[bad-settings]" in err
    assert "peftc.compile_sharded" in err
    assert not (tmp_path / "out").exists()


def test_settings_come_from_a_file_too(place: Path, tmp_path: Path, run: Run) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("learnin_rate: 1\nspec: a\n")
    status, _, err = run("train", "--config", config, "-o", tmp_path / "out")
    assert status == 1
    assert "there is no setting 'learnin_rate'" in err
    assert "did you mean learning_rate?" in err
    config.write_text("learning_rate: [1]\nmax_length: 0\nwrite: all\nfresh: true\nseed: 3\n")
    status, _, err = run("train", "--config", config, "-o", tmp_path / "out")
    assert err.count("error[bad-settings]") == 4, err
    config.write_text(
        f"spec: {place / 'spec.peft'}\nmodel: {place / 'model'}\ndata: {place / 'data.jsonl'}\n"
        "max_steps: 1\nlearning_rate: 1e-3\npacking: false\n"
    )
    status, out, err = run("train", "--config", config, "-o", tmp_path / "out", "--json", "--max-steps", "2")
    assert status == 0, out + err
    assert json.loads(out)["steps"] == 2
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (kept["learning_rate"], kept["packing"]) == (1e-3, False)
    assert (tmp_path / "out" / "artifact" / "peftc.json").is_file()


def test_classes_are_those_of_the_data(place: Path, tmp_path: Path, run: Run) -> None:
    """And are called so in what is written; a head that nothing trains is refused before a step."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    BertForSequenceClassification(
        BertConfig(vocab_size=258, num_hidden_layers=1, pad_token_id=0, **sizes)
    ).bert.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "spec.peft").write_text("apply lora(r=4) to attn.q\ntrain head\n")
    lines = [json.dumps({"text": "ab" * i, "label": ("odd", "even", "many")[i % 3]}) for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    given = (tmp_path / "spec.peft", tmp_path / "bert", "--data", tmp_path / "data.jsonl", "-o", tmp_path / "out")
    status, out, err = run("train", *given, "--max_steps", 2, "--write", "artifact", "merged", "--json")
    assert status == 0, out + err
    assert "eval_accuracy" in json.loads(out)["metrics"]
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.id2label == {0: "even", 1: "many", 2: "odd"}
    assert peftc.load(tmp_path / "out" / "artifact").config.id2label == merged.config.id2label
    (tmp_path / "spec.peft").write_text("apply lora(r=4) to attn.q\n")
    status, _, err = run("train", *given, "--max_steps", 2, "--fresh")
    assert status == 1
    assert "error[untrained-head]" in err
    assert 'train "classifier"' in err


def test_all_settings_are_told_where_they_are_asked_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """And HF PEFT's words for tasks are understood."""
    for asked, there in ("--help", False), ("--help-all", True):
        with pytest.raises(SystemExit):
            run("train", asked)
        out, err = capsys.readouterr()
        assert (("--weight_decay" in out, err), "--help-all" in out) == ((there, ""), True)
    with pytest.raises(SystemExit):
        run("plan", "spec.peft", "model", "--task", "SEQ_CLS")
    assert "SEQ_CLS is text-classification here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("save_only_model", True),
        ("per_device_train_batch_size", 0),
        ("num_train_epochs", -1.0),
        ("learning_rate", float("nan")),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=name):
        arguments(tmp_path, {name: value})
