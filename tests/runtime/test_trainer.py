"""Compiled models train: under a Trainer, stopped and resumed, as HF PEFT's do; and with one spec on every model."""

import copy
import logging.handlers
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, set_seed

import models
import peftc
from crashes import kills
from training import compiled, copy_state, rows, topic_blocks, trainer

# ---- Trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[None]:
    """Fails when transformers logs a warning: it reports missing keys that way, not by `warnings`."""
    handler = logging.handlers.BufferingHandler(1000)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == []


EVERY_THREE = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


def resumable(seed: int = 0) -> peftc.CompiledModule:
    """Methods of both kinds and existing parameters; dropout, so that the random state counts, too."""
    return compiled(
        "llama", "apply lora(r=4, dropout=0.2) to attn.*\napply adapter(size=3) to mlp\ntrain norm", seed=seed
    )


@dataclass(frozen=True)
class Run:
    """A model after six steps, the loss of each, and the checkpoint of the third."""

    model: peftc.CompiledModule
    losses: list[float]
    checkpoint: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps without a stop."""
    folder = tmp_path_factory.mktemp("trainer")
    model = resumable()
    run = trainer(model, folder, rows(9, 20), steps=6, lr=1e-2, **EVERY_THREE)
    run.train()
    return Run(model, run.losses, folder / "checkpoint-3")


@pytest.mark.xdist_group("trainer")
def test_checkpoints_hold_only_what_learns(whole: Run) -> None:
    learns = whole.model.trainable_parameters()
    file = whole.checkpoint / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        assert set(tensors.keys()) == set(learns)
    assert file.stat().st_size < sum(4 * parameter.numel() for parameter in learns.values()) + 150 * len(learns)
    assert set(learns) & set(whole.model.plan.sites.parameters) == set(whole.model.plan.trained)


@pytest.mark.xdist_group("trainer")
@pytest.mark.usefixtures("silent")
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    model = resumable(seed=1)
    run = trainer(model, tmp_path, rows(9, 20), steps=6, lr=1e-2, **EVERY_THREE)
    run.train(resume_from_checkpoint=str(whole.checkpoint))
    assert run.losses == whole.losses[3:]
    expected = whole.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end_and_can_be_saved(tmp_path: Path) -> None:
    """The best is said to be the worst here, which is another than the last."""
    model = compiled("llama", "apply lora(r=4) to attn.*")
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(model, tmp_path / "run", rows(9, 20), steps=6, lr=1e-2, **settings, **best)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses) > losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)
    model.save(tmp_path / "adapter")
    again = peftc.load(tmp_path / "adapter", model.base)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the child writes files alone
@pytest.mark.parametrize("over", [False, True], ids=["a new one", "another run's"])
def test_a_checkpoint_killed_as_it_is_written_resumes_as_a_whole_one_or_not_at_all(tmp_path: Path, over: bool) -> None:
    model = compiled("llama", "apply lora(r=2) to attn.q")

    def run(folder: Path, steps: int, lr: float = 1e-2) -> Trainer:
        settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 100}
        made = trainer(model, folder, rows(9, 20), steps=steps, lr=lr, **settings)
        made.add_callback(model.callback())
        return made

    def resumed() -> dict[str, Tensor]:
        run(tmp_path / "resumed", 3).train(resume_from_checkpoint=str(checkpoint))
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def prepare() -> None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        if over:
            shutil.copytree(tmp_path / "old" / "checkpoint-2", checkpoint)

    def save() -> None:
        written.control.should_save = True
        written.callback_handler.on_step_end(written.args, written.state, written.control)
        written._save_checkpoint(model, None)

    checkpoint = tmp_path / "new" / "checkpoint-2"
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(tmp_path / "old", 2).train()
    model.load_state_dict(start)
    written = run(tmp_path / "new", 2, lr=0.1)
    written.train()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = [resumed()]
    prepare()
    if over:
        ends.append(resumed())
    refused = 0
    model.load_state_dict(whole)
    for _ in kills(save, prepare):
        try:
            end = resumed()
        except (ValueError, OSError, RuntimeError, SafetensorError):
            refused += 1
        else:
            assert any(all(torch.equal(end[name], one[name]) for name in one) for one in ends), "a mixture"
        model.load_state_dict(whole)
    assert refused


@pytest.mark.slow
@pytest.mark.usefixtures("silent")
def test_loss_curve_of_lora_on_smollm2_is_hf_pefts(tmp_path: Path) -> None:
    base = models.smollm2()
    ours = peftc.compile(base, "apply lora(r=16, alpha=32) to attn.*, mlp.*")
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    copy_state(theirs, ours)
    curves = []
    for model in (ours, theirs):
        set_seed(0)
        settings = {"per_device_train_batch_size": 1, "lr_scheduler_type": "constant"}
        run = trainer(model, tmp_path, topic_blocks(64, 60), steps=50, lr=5e-4, **settings)
        run.train()
        curves.append(torch.tensor(run.losses))
    difference = (curves[0] - curves[1]).abs().max().item()
    print(f"50 steps, largest difference of the losses: {difference:.2e}; {curves[0][0]:.3f} -> {curves[0][-1]:.3f}")
    assert len(curves[0]) == len(curves[1]) == 50
    assert curves[0][-5:].mean() < curves[0][:5].mean()
    assert difference <= 1e-4


# ---- One spec, many models -------------------------------------------------------------------------------------------


def token_batch(rows: int = 2, length: int = 24) -> dict[str, Tensor]:
    """The same few bytes for every model with a vocabulary of 512 or more."""
    text = torch.tensor(list(topics["with"].encode()))[: rows * length].reshape(rows, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}


def image_batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=random), "labels": torch.arange(4)}


def pair_loss(model: nn.Module) -> Tensor:
    """Mean squared error of sentence similarities; MiniLM has no head and no labels of its own."""
    tokenizer = AutoTokenizer.from_pretrained(models.minilm_dir())
    left = ["a cat sleeps", "the train is late", "snow fell all night"]
    right = ["quarterly earnings rose", "a delayed railway", "parse the file"]
    batch = tokenizer(left + right, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][:, :, None]
    hidden = model(**batch).last_hidden_state
    pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return F.mse_loss((pooled[:3] * pooled[3:]).sum(-1), torch.tensor([1.0, 0.0, 1.0]))


def own_loss(batch: Callable[[], dict[str, Tensor]]) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(**batch()).loss


def trained(
    model: peftc.CompiledModule, loss: Callable[[nn.Module], Tensor], *, steps: int, rate: float
) -> list[float]:
    """The loss before each step."""
    optimiser = torch.optim.AdamW(model.param_groups(rate), weight_decay=0.0)
    losses = []
    for _ in range(steps):
        value = loss(model)
        losses.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return losses


PORTABLE = """
apply lora(r=8) to attn.q, attn.v
apply adapter(size=16) to mlp
train norm
"""


@pytest.mark.parametrize(
    ("factory", "loss"),
    [
        pytest.param(models.smollm2, own_loss(token_batch), marks=pytest.mark.slow, id="smollm2"),
        pytest.param(models.gpt2, own_loss(token_batch), marks=pytest.mark.slow, id="gpt2"),
        pytest.param(models.minilm, pair_loss, marks=pytest.mark.slow, id="minilm"),
        pytest.param(models.t5, own_loss(token_batch), marks=pytest.mark.slow, id="t5"),
        pytest.param(models.vit, own_loss(image_batch), marks=pytest.mark.slow, id="vit"),
    ],
)
def test_one_spec_trains_on_every_model(factory: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor]) -> None:
    torch.manual_seed(0)
    model = peftc.compile(factory(), PORTABLE)
    model.eval()  # without dropout the losses of different steps compare
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = trained(model, loss, steps=10, rate=2e-3)
    assert losses[-1] < 0.95 * losses[0], losses
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in frozen.items())


RECIPES = Path(models.__file__).parent / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "factory", "loss"),
    [
        pytest.param(recipe, factory, loss, id=f"{recipe}-{factory.__name__}")
        for factory, loss, s4 in (
            (models.smollm2, own_loss(token_batch), "s4_norms"),  # SmolLM2 has no biases to train
            (models.minilm, pair_loss, "s4"),
        )
        for recipe in ("mam", "unipelt", s4)
    ],
)
def test_mixed_recipes_train_on_real_models(
    recipe: str, factory: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor]
) -> None:
    torch.manual_seed(0)
    model = peftc.compile(factory(), RECIPES / f"{recipe}.peft")
    losses = trained(model.eval(), loss, steps=8, rate=1e-3)
    assert losses[-1] < 0.9 * losses[0], losses
