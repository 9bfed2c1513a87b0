"""Two gloo processes with parts of a model learn and save what one process does, and either goes on with the other's.

A process is a fork of this one: what was compiled here is there, whole. The numbers differ by the order of sums alone.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.distributed.progress import load_progress, save_progress
from peftc.distributed.ranks import by_rank
from processes import AFTER, BEFORE, TOLERANCE, on_two, optimiser, same, train

PACKED = "quantize linear except head with nf4\n"
LORA = "apply lora(r=4) to attn.*, mlp.*\n"


def model() -> LlamaForCausalLM:
    """Parts of its weights are whole blocks of 64 numbers, so that they can be packed apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32,
            )
        )  # fmt: skip


def compiled(spec: str) -> peftc.CompiledModule:
    torch.manual_seed(1)
    return peftc.compile(model(), spec)


Split = Callable[[peftc.CompiledModule], peftc.CompiledModule]


def check(folder: Path, spec: str, split: Split, rows: Callable[[int], slice]) -> None:
    """Trains, saves in the middle and at the end, on one process and on two; each goes on with what the other saved."""
    one = compiled(spec)
    start = {name: tensor.detach().clone() for name, tensor in one.trainable_parameters().items()}

    def again() -> peftc.CompiledModule:
        with torch.no_grad():
            for name, tensor in start.items():
                one.get_parameter(name).copy_(tensor)
        return one

    def mean(found: Tensor) -> Tensor:
        dist.all_reduce(found)
        return found / 2

    def work(rank: int, join: Callable[[], None]) -> None:
        optimizer = optimiser(one)
        losses = train(one, optimizer, BEFORE)
        save_progress(one, optimizer, folder / f"one {rank}", step=BEFORE)
        later = train(one, optimizer, AFTER)
        one.save(folder / f"end of one {rank}")
        join()
        parts = split(copy.deepcopy(again()))
        own = rows(rank)
        optimizer = optimiser(parts)
        torch.testing.assert_close(mean(train(parts, optimizer, BEFORE, own)), losses, rtol=0, atol=TOLERANCE)
        save_progress(parts, optimizer, folder / "two", step=BEFORE)
        torch.testing.assert_close(mean(train(parts, optimizer, AFTER, own)), later, rtol=0, atol=TOLERANCE)
        parts.save(folder / "end of two")
        assert load_progress(parts, optimizer, folder / "one 0") == {"step": BEFORE}
        torch.testing.assert_close(mean(train(parts, optimizer, AFTER, own)), later, rtol=0, atol=TOLERANCE)
        if any(isinstance(parameter, DTensor) for parameter in parts.parameters()):
            held = sum(p.to_local().nbytes for p in parts.parameters() if isinstance(p, DTensor))
            assert by_rank(parts.plan, 2, 2, 12, "adamw", shard=True).each[rank].weights == held
        with pytest.raises(peftc.PeftcError, match="in-parts"):
            parts.merge()
        with pytest.raises(peftc.PeftcError, match="in-parts"):
            parts.generate(torch.ones((1, 2), dtype=torch.long), max_new_tokens=1)
        dist.destroy_process_group()
        fresh = optimiser(one)
        assert load_progress(one, fresh, folder / "two") == {"step": BEFORE}
        torch.testing.assert_close(train(one, fresh, AFTER), later, rtol=0, atol=TOLERANCE)

    on_two(folder, work)
    same(folder / "end of one 0", folder / "end of two")


@pytest.mark.slow
@pytest.mark.parametrize("spec", [f"{PACKED}{LORA}", f"{LORA}train norm"], ids=["nf4", "dense"])
def test_fsdp2_learns_what_one_process_does(tmp_path: Path, spec: str) -> None:
    """Each of half the rows."""
    check(tmp_path, spec, peftc.shard, lambda rank: slice(2 * rank, 2 * rank + 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [f"{PACKED}{LORA}", f"{LORA}apply adapter(size=4) to mlp\ntrain norm"], ids=["nf4", "dense"]
)
def test_tensor_parallel_learns_what_one_process_does(tmp_path: Path, spec: str) -> None:
    """Both of all rows."""
    check(tmp_path, spec, peftc.tensor_parallel, lambda rank: slice(None))
