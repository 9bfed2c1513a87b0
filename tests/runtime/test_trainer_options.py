"""What a `Trainer` can be asked of a compiled model, beside HF PEFT's: the same losses, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    LlamaForSequenceClassification,
    Trainer,
    set_seed,
)
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import models
import peftc
from peftc.training.trainer import SavesAdapter, write_adapter
from training import LORA, Recorder, compiled, copy_state, randomise, rows, topic_blocks, trainer
from zoo import ENCODER, ZOO, inputs

Pair = tuple[peftc.CompiledModule, nn.Module]


def pair_of(base: Any, spec: str, **config: Any) -> Pair:
    """A compiled model and HF PEFT's, with the same LoRA on every linear layer but the head."""
    ours = peftc.compile(base, spec)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", **config))
    return ours, theirs


@pytest.fixture(scope="module")
def pair() -> Pair:
    ours, theirs = pair_of(ZOO["llama"](), LORA, r=4, lora_alpha=8)
    randomise(theirs)
    copy_state(theirs, ours)
    return ours, theirs


def ragged(count: int = 24) -> list[dict[str, Any]]:
    """Examples of which more or less is a prompt, whose labels are ignored."""
    examples = rows(9, count)
    for place, example in enumerate(examples):
        example["labels"] = [-100] * (place % 8) + example["labels"][place % 8 :]
    return examples


def curve(model: nn.Module, folder: Path, function: Any = None, **settings: Any) -> list[float]:
    """The losses of three steps of a copy."""
    set_seed(0)
    settings = {"per_device_train_batch_size": 2, **settings}
    run = trainer(copy.deepcopy(model), folder, ragged(), steps=3, lr=1e-2, **settings)
    run.compute_loss_func = function
    run.train()
    return run.losses


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss of the caller's own, of the logits."""
    logits = outputs["logits"][:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    assert num_items_in_batch is not None
    return total / num_items_in_batch


@pytest.mark.xdist_group("trainer options")
@pytest.mark.parametrize(
    ("function", "settings"),
    [
        pytest.param(None, {"gradient_accumulation_steps": 4}, id="accumulation"),
        pytest.param(None, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, id="smoothing"),
        pytest.param(token_loss, {"gradient_accumulation_steps": 4}, id="own-loss"),
        pytest.param(None, {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}, id="neftune"),
        pytest.param(
            None, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}, id="activation-checkpointing"
        ),
    ],
)
@pytest.mark.slow
def test_losses_are_hf_pefts(pair: Pair, tmp_path: Path, function: Any, settings: dict[str, Any]) -> None:
    ours, theirs = (curve(model, tmp_path, function, **settings) for model in pair)
    assert len(ours) == 3 * settings["gradient_accumulation_steps"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.xdist_group("trainer options")
@pytest.mark.slow
def test_bf16_is_autocast(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = (curve(model, tmp_path, bf16=True) for model in pair)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)  # eight bits of a bfloat16, averaged over tokens


@pytest.mark.slow
def test_under_torch_compile(pair: Pair, tmp_path: Path) -> None:
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_accumulation_steps": 2}
    ours, theirs = curve(pair[0], tmp_path, **settings), curve(pair[1], tmp_path, gradient_accumulation_steps=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.xdist_group("trainer options")
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}])
def test_evaluation_sees_logits(pair: Pair, tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for model in pair:
        run = trainer(model, tmp_path, ragged(), steps=1, lr=1e-2, **settings)
        run.__class__ = Trainer  # type: ignore[assignment]  # which returns outputs beside the loss
        run.compute_metrics = metrics
        found.append(run.evaluate(ragged()))  # type: ignore[arg-type]
    for name in ("eval_loss", "eval_mean", "eval_right"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5), name


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = torch.as_tensor(prediction.predictions)
    right = logits[:, :-1].argmax(-1) == torch.as_tensor(prediction.label_ids)[:, 1:]
    return {"mean": float(logits.abs().mean()), "right": float(right.float().mean())}


@pytest.mark.xdist_group("trainer options")
def test_what_a_graph_cannot_do_is_refused(pair: Pair, tmp_path: Path) -> None:
    """Embeddings that learn are the graph's own, and a hook that is not NEFTune's may act when nothing is learnt."""
    trains = compiled("llama", f"{LORA}\ntrain embed")
    with pytest.raises(peftc.PeftcError, match=r"error\[on-the-base\]"):
        curve(trains, tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(peftc.PeftcError, match=r"error\[on-the-base\]"):
        pair[0].get_input_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(peftc.PeftcError, match=r"error\[on-the-base\]"):
        pair[0].resize_token_embeddings(120)


def test_noise_is_added_in_training_alone() -> None:
    ours = compiled("llama", LORA)
    batch = inputs(ZOO["llama"]())
    before = [ours.train()(**batch).loss.item(), ours.eval()(**batch).loss.item()]
    hook = activate_neftune(ours, 5.0)
    after = [ours.train()(**batch).loss.item(), ours.eval()(**batch).loss.item()]
    with pytest.raises(peftc.PeftcError, match=r"error\[no-noise\]"):
        ours.train()(**batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])
    assert after[0] != before[0]
    assert after[1] == before[1]
    deactivate_neftune(ours, hook)
    assert ours.train()(**batch).loss.item() == before[0]
    assert not ZOO["llama"]().get_input_embeddings()._forward_hooks


HEADS: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "multi-label": ("bert", {"num_labels": 3}, lambda i: {"labels": [float(i % 2), float(i % 3 == 0), 1.0]}),
    "regression": ("bert", {"num_labels": 1}, lambda i: {"labels": i / 3}),
    "questions": ("bert-qa", {}, lambda i: {"start_positions": i % 5, "end_positions": 3 + i % 5}),
    "resized": ("llama", {}, lambda i: {"labels": [3 + (i + place) % 100 for place in range(9)]}),
}  # fmt: skip


def headed(name: str, **settings: Any) -> Any:
    """A tiny model without dropout, of which two models would draw differently."""
    if name == "llama":
        model = ZOO["llama"]()
        model.resize_token_embeddings(120, mean_resizing=False)
        return model
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = BertForSequenceClassification if name == "bert" else BertForQuestionAnswering
    return made(BertConfig(**{**ENCODER, **quiet, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_losses_of_every_head_are_hf_pefts(head: str, tmp_path: Path) -> None:
    name, settings, labels = HEADS[head]
    base = headed(name, **settings)
    ours = peftc.compile(base, "apply lora(r=4, alpha=8) to attn.*, mlp.*")
    targets = [binding.site.name for binding in ours.plan.bindings]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8))
    randomise(theirs)
    copy_state(theirs, ours)
    data = [{**row, **labels(place)} for place, row in enumerate({"input_ids": r["input_ids"]} for r in rows(9, 24))]
    stops = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    found = []
    for model in (ours, theirs):
        set_seed(0)
        run = trainer(model, tmp_path, data, steps=9, lr=1e-2, **stops, load_best_model_at_end=True)
        run.add_callback(EarlyStoppingCallback(2, 100.0))
        run.train()
        found.append([*run.losses, *(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)])
        assert run.state.global_step == 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


class Saving(SavesAdapter, Recorder):
    """As a user writes it."""


@pytest.mark.slow
def test_what_a_trainer_saves_is_read_by_itself(tmp_path: Path) -> None:
    base = ZOO["llama"]()
    ours = peftc.compile(base, "apply lora(r=4) to attn.*")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(ours, tmp_path / "run", rows(9, 20), steps=2, lr=1e-2, kind=Saving, **settings)
    run.train()
    run.save_model(str(tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text("of somebody")
    run.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "of somebody"
    batch = inputs(base)
    expected = ours.eval()(**batch).logits
    assert torch.equal(peftc.load(tmp_path / "out", base).eval()(**batch).logits, expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    peftc.load(tmp_path / "run" / "checkpoint-1", base)
    assert not list(tmp_path.rglob(".adapter-*"))
    twin = peftc.compile(base, "apply lora(r=4) to attn.*")
    resumed = trainer(twin, tmp_path / "run", rows(9, 20), steps=2, lr=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in twin.state_dict().items())


def test_an_adapter_of_no_method_of_hf_pefts_is_saved_all_the_same(tmp_path: Path) -> None:
    ours = compiled("llama", "apply adapter(size=4) to mlp")
    write_adapter(ours, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"peftc.json", "adapter.safetensors"}
    peftc.load(tmp_path, ZOO["llama"]())


@pytest.mark.xdist_group("trainer options")
def test_an_evaluation_in_another_precision_is_refused(pair: Pair, tmp_path: Path) -> None:
    run = trainer(pair[0], tmp_path, ragged(), steps=1, lr=1e-2, bf16_full_eval=True)
    with pytest.raises(peftc.PeftcError, match=r"error\[fixed-precision\]"):
        run.evaluate(ragged())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "spec", "takes"),
    [
        ("llama", LORA, True),
        pytest.param("mixtral", "apply lora(r=4) to attn.q", True, marks=pytest.mark.slow),
        pytest.param("gpt2", "apply prompt(length=3)", True, marks=pytest.mark.slow),
        pytest.param("bert", "apply lora(r=4) to attn.q", False, marks=pytest.mark.slow),
        pytest.param("llama", "apply adalora(r=4, target=2) to attn.q", False, marks=pytest.mark.slow),
    ],
)
def test_who_takes_the_number_of_items(name: str, spec: str, takes: bool) -> None:
    """Whose loss is transformers' own and stands alone: its sum is then divided by the number, as the base model's."""
    model = compiled(name, spec)
    assert model.accepts_loss_kwargs is takes
    if not takes:
        return
    base = copy.deepcopy(model.base)
    batch = inputs(base)
    for fused in (False, True):
        model.logits_in_training = not fused
        for count in (5, torch.tensor(40)):
            single = model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
            if name == "llama":  # without a dropout, and without what a router adds
                torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, single / count)
            expected = base.train(False)(**batch, num_items_in_batch=count).loss
            actual = model.train(False)(**batch, num_items_in_batch=count)
            assert actual.logits is not None
            if "prompt" not in spec:
                torch.testing.assert_close(actual.loss, expected, rtol=1e-5, atol=1e-5)
            model.train()


@pytest.mark.slow
def test_a_classifier_takes_no_number_of_items() -> None:
    """transformers calls its loss without it."""
    config = ZOO["llama"]().config
    model = peftc.compile(LlamaForSequenceClassification(config), "apply lora(r=4) to attn.q")
    assert not model.accepts_loss_kwargs


@pytest.mark.slow
def test_accumulated_losses_on_smollm2_are_hf_pefts(tmp_path: Path) -> None:
    ours, theirs = pair_of(models.smollm2(), "apply lora(r=16, alpha=32) to attn.*, mlp.*", r=16, lora_alpha=32)
    copy_state(theirs, ours)
    data = topic_blocks(48, 60)
    for place, example in enumerate(data):
        example["labels"] = [-100] * (place % 40) + example["labels"][place % 40 :]
    curves = []
    for model in (ours, theirs):
        set_seed(0)
        settings = {"per_device_train_batch_size": 1, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 4}
        run = trainer(model, tmp_path, data, steps=50, lr=5e-4, **settings)
        run.train()
        curves.append(torch.tensor(run.losses))
    difference = (curves[0] - curves[1]).abs().max().item()
    print(f"50 steps of 4 batches, largest difference of the losses: {difference:.2e}")
    assert len(curves[0]) == len(curves[1]) == 200
    assert difference <= 1e-4
