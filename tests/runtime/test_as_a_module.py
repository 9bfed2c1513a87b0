"""Compiled models are modules like others: compiled by torch, in half precision, copied, generating and sharded."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, PreTrainedModel

import models
import peftc
from training import LORA, compiled, randomise
from zoo import ZOO, inputs

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
    actual = peftc.compile(base, LORA).generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6
    )
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
    actual = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12)
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


@pytest.mark.parametrize("name", ["base", "config", "plan", "size_check"])
def test_a_part_of_a_name_that_is_taken_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    with pytest.raises(peftc.PeftcError, match="taken-name"):
        peftc.compile(model, "apply lora(r=2) to linear", example=torch.randn(2, 4))
    held = peftc.compile(nn.Sequential(model), "apply lora(r=2) to linear", example=torch.randn(2, 4)).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(held(x), model(x))
