"""Compiled models where users put them: in Trainer, torch.compile, FSDP, in half precision; and beside HF PEFT."""

import copy
import logging.handlers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, PreTrainedModel, set_seed

import models
import peftc
from marks import first_is_quick
from training import LORA, compiled, copy_state, randomise, rows, their_tensors, topic_blocks, trainer
from zoo import ZOO, inputs

PORTABLE = """
apply lora(r=8) to attn.q, attn.v
apply adapter(size=16) to mlp
train norm
"""


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


# ---- Beside HF PEFT -------------------------------------------------------------------------------------------------

# Where each method stands, as the ends of module names. HF PEFT's OLoRA is left out on GPT-2: it swaps A and B there.
PLACES: dict[str, dict[str, str]] = {
    "llama": {"lora": "q_proj", "rslora": "k_proj", "dora": "v_proj", "pissa": "down_proj", "olora": "up_proj"},
    "gpt2": {"lora": "mlp.c_proj", "rslora": "attn.c_proj", "dora": "attn.c_attn", "pissa": "mlp.c_fc"},
    "bert": {
        "lora": "self.query",
        "rslora": "self.key",
        "dora": "self.value",
        "pissa": "intermediate.dense",
        "olora": "attention.output.dense",
    },
    "t5": {
        "lora": "SelfAttention.q",
        "rslora": "SelfAttention.k",
        "dora": "EncDecAttention.v",
        "pissa": "wi",
        "olora": "wo",
    },
    "vit": {"lora": "q_proj", "rslora": "k_proj", "dora": "v_proj", "pissa": "fc1", "olora": "fc2"},
}
THEIR_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
OUR_METHODS = {
    "lora": "lora(r=4, alpha=6)",
    "rslora": "lora(r=4, alpha=6, rslora=true)",
    "dora": "dora(r=4, alpha=6)",
    "pissa": "lora(r=4, alpha=6, init=pissa)",
    "olora": "lora(r=4, alpha=6, init=olora)",
}
# keys, values, and the module whose input is scaled
IA3_PLACES = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "bert": ("self.key", "self.value", "intermediate.dense"),
    "t5": ("SelfAttention.k", "EncDecAttention.v", "wo"),
    "vit": ("k_proj", "v_proj", "fc2"),
}


def assert_same(
    theirs: nn.Module, ours: peftc.CompiledModule, batch: dict[str, Tensor], *, at_start: bool = False
) -> None:
    """Outputs and the gradients of everything that learns; only at the start may a gradient be zero."""
    theirs.eval()
    ours.eval()
    expected, actual = theirs(**batch), ours(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    for name, parameter in their_tensors(theirs, ours).items():
        gradient = ours.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert at_start or parameter.grad.abs().max() > 0, name
        own = gradient.reshape(parameter.grad.shape)
        torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))
    theirs.zero_grad()
    ours.zero_grad()


@pytest.mark.parametrize("name", first_is_quick(list(PLACES)))
def test_low_rank_methods_equal_hf_pefts(name: str) -> None:
    """One model with a method on each kind of layer; HF PEFT has them as adapters that are active together."""
    base = ZOO[name]()
    theirs: Any = None
    adapters = {method: f"with_{method}" for method in PLACES[name]}  # HF PEFT warns of an adapter called "lora"
    for method, place in PLACES[name].items():
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=[place], fan_in_fan_out=name == "gpt2", **THEIR_OPTIONS[method]
        )
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=adapters[method])
        else:
            theirs.add_adapter(adapters[method], config)
    theirs.base_model.set_adapter(list(adapters.values()))
    spec = "\n".join(f'apply {OUR_METHODS[method]} to "**.{place}"' for method, place in PLACES[name].items())
    ours = peftc.compile(base, spec)
    assert_starts_equal(theirs, ours, PLACES[name])
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base), at_start=True)
    randomise(theirs)
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base))


def assert_starts_equal(theirs: nn.Module, ours: peftc.CompiledModule, places: dict[str, str]) -> None:
    """Where the start is not random it is HF PEFT's: the lengths of DoRA, the products of PiSSA and OLoRA."""
    expected = their_tensors(theirs, ours)
    for name, parameter in expected.items():
        module, _, leaf = name.removesuffix(".m").removesuffix(".B").rpartition(".")
        if name.endswith(".m"):
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)
        elif name.endswith(".B") and module.endswith(tuple(places.get(kind, "-") for kind in ("pissa", "olora"))):
            a, b = (f"{module}.{leaf}.{part}" for part in "AB")
            product = ours.get_parameter(b) @ ours.get_parameter(a)
            torch.testing.assert_close(product, expected[b] @ expected[a], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.slow
def test_ia3_equals_hf_pefts(name: str) -> None:
    base = ZOO[name]()
    *scaled, last = IA3_PLACES[name]
    config = peft.IA3Config(target_modules=[*scaled, last], feedforward_modules=[last], fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    outputs = ", ".join(f'"**.{place}"' for place in scaled)
    ours = peftc.compile(base, f'apply ia3(on=output) to {outputs}\napply ia3(on=input) to "**.{last}"')
    randomise(theirs)
    copy_state(theirs, ours)
    assert_same(theirs, ours, inputs(base))


# ---- As any other module --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> peftc.CompiledModule:
    """A tiny model with non-trivial LoRA, for tests that leave it as it is."""
    model = compiled("llama")
    randomise(model)
    return model


@pytest.mark.xdist_group("compiled llama")
@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph(llama: peftc.CompiledModule) -> None:
    batch = inputs(llama.base)
    fast = torch.compile(llama, fullgraph=True, backend="aot_eager")
    assert fast(**batch).loss.item() == pytest.approx(llama(**batch).loss.item(), abs=1e-6)


@pytest.mark.slow
def test_state_of_a_bf16_model_is_fp32_and_trains() -> None:
    torch.manual_seed(0)
    model = peftc.compile(ZOO["llama"]().bfloat16(), f"{LORA}\napply adapter(size=4) to mlp")
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.trainable_parameters().values()} == {torch.float32}
    batch = inputs(model.base)
    optimiser = torch.optim.AdamW(model.param_groups(1e-2))
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.isfinite(parameter).all() for parameter in model.trainable_parameters().values())


def test_param_groups_of_lora_plus() -> None:
    model = compiled("llama", "apply lora(r=4, lr_ratio=16) to attn.q\ntrain norm")
    groups = {group["lr"]: {id(p) for p in group["params"]} for group in model.param_groups(1e-3)}
    fast = {id(p) for name, p in model.trainable_parameters().items() if name.endswith(".lora.B")}
    everything = {id(p) for p in model.trainable_parameters().values()}
    assert len(fast) == 2
    assert groups == {1e-3: everything - fast, 16e-3: fast}


@pytest.mark.parametrize(
    "spec",
    [
        "apply lora(r=4, dropout=0.5) to attn.q",
        pytest.param("apply dora(r=4, dropout=0.5) to attn.q", marks=pytest.mark.slow),
        pytest.param("apply adapter(size=4, dropout=0.5) to mlp", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_dropout_follows_train_and_eval(spec: str) -> None:
    model = compiled("llama", spec)
    randomise(model)
    batch = inputs(model.base)

    def losses() -> set[float]:
        return {model(**batch).loss.item() for _ in range(3)}

    assert len(losses()) == 3  # a compiled model starts in train mode
    evaluated = losses() if not model.eval().training else set()
    assert len(evaluated) == 1
    without_labels = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert torch.equal(model(**without_labels).logits, model(**batch).logits)
    model.train()
    assert len(losses()) == 3


@pytest.mark.xdist_group("compiled llama")
def test_deepcopy_is_independent(llama: peftc.CompiledModule) -> None:
    batch = inputs(llama.base)
    before = llama(**batch).loss
    other = copy.deepcopy(llama)
    assert torch.equal(other(**batch).loss, before)
    randomise(other)
    assert not torch.equal(other(**batch).loss, before)
    assert torch.equal(llama(**batch).loss, before)


# ---- Generation -----------------------------------------------------------------------------------------------------


def sees_positions(name: str) -> PreTrainedModel:
    """A zoo model in eval mode that never ends a text, and whose learned positions, if any, change its mind."""
    base = ZOO[name]()
    base.eval()
    assert base.generation_config is not None
    base.generation_config.eos_token_id = None
    if name == "gpt2":
        with torch.no_grad():
            base.get_parameter("transformer.wpe.weight").mul_(20)
    return base


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_greedy_text_of_a_left_padded_batch_is_the_base_models(name: str) -> None:
    base = sees_positions(name)
    batch = {key: tensor for key, tensor in inputs(base, batch=3).items() if key != "labels"}
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, :1] = 0
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    expected = base.generate(**batch, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    actual = peftc.compile(base, LORA).generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    assert torch.equal(actual, expected)


@pytest.mark.slow
def test_greedy_text_of_smollm2_is_the_base_models() -> None:
    base = models.smollm2().eval()
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_dir(), padding_side="left")
    prompts = [
        "The capital of France is",
        "In Python, a list is",
        "Water boils when it has been heated for long enough:",
    ]
    batch = dict(tokenizer(prompts, padding=True, return_tensors="pt"))
    expected = base.generate(**batch, max_new_tokens=12, do_sample=False)
    model = peftc.compile(base, "apply lora(r=16, alpha=32) to attn.*, mlp.*")
    actual = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=12)
    assert tokenizer.batch_decode(actual) == tokenizer.batch_decode(expected)


# ---- FSDP -----------------------------------------------------------------------------------------------------------


def train_three_steps(model: nn.Module) -> list[float]:
    batch = inputs(ZOO["llama"]())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


def sharded_process(rank: int, folder: str, spec: str, expected: list[float]) -> None:
    """One of two processes; `spawn` reports what it raises."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model = compiled("llama", spec)
        mesh = init_device_mesh("cpu", (2,))
        for block in model.plan.sites.blocks:
            fully_shard(model.get_submodule(block), mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(train_three_steps(model), expected, rtol=0, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [LORA, "apply ladder(size=4) to block"], ids=["lora", "ladder"])
def test_fsdp2_trains_with_the_same_loss(tmp_path: Path, spec: str) -> None:
    expected = train_three_steps(compiled("llama", spec))
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        sharded_process, (str(tmp_path), spec, expected), nprocs=2
    )
