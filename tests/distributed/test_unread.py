"""A model that is compiled in parts is the one that is compiled whole, and no process ever holds it whole."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.capture.checkpoints.checkpoint import Checkpoint
from peftc.graph.ir import tensors
from processes import AFTER, BEFORE, TOLERANCE, on_two, optimiser, same, train

SPECS = {
    "nf4": "quantize linear except head with nf4(double=true)\napply lora(r=4) to attn.*, mlp.*",
    "dense": "apply dora(r=4) to attn.*\ntrain norm",
}


def write(folder: Path, *, tied: bool) -> int:
    """A checkpoint of a random Llama, and the bytes of its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def held() -> int:
    """The bytes of all memory that a tensor of this process lies in, once each."""
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and not isinstance(one, FakeTensor | DTensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("nf4", True), ("dense", False)])
def test_no_process_holds_the_base_and_both_learn_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    """The second process draws other numbers: what counts is what the first draws."""
    base = tmp_path / "base"
    whole = write(base, tied=tied)
    seen: list[int] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> Tensor:
        tensor = read(self, name)
        seen.append(held())
        return tensor

    def work(rank: int, join: Callable[[], None]) -> None:
        join()
        gc.freeze()  # what was there before is not asked for
        before = held()
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read", watched)
            torch.manual_seed(3 + rank)
            parts = peftc.compile_sharded(base, SPECS[kind])
        added = sum(parts.get_parameter(name).nbytes for name in parts.plan.added)
        largest = 97 * 64 * 4 if tied else 256 * 64 * 4
        kept = sum(p.to_local().untyped_storage().nbytes() for p in parts.parameters() if isinstance(p, DTensor))
        # Its parts, of what was added the whole until it is parted, and some weights that are read or packed.
        assert max(seen) - before <= kept + 2 * added + 4 * largest < whole
        torch.manual_seed(3)
        one = peftc.compile(base, SPECS[kind])
        own = tensors(one)
        for name, part in tensors(parts).items():
            assert torch.equal(part.full_tensor() if isinstance(part, DTensor) else part, own[name]), name
        optimizer = optimiser(one)
        losses = torch.cat([train(one, optimizer, BEFORE), train(one, optimizer, AFTER)])
        one.save(tmp_path / f"one {rank}")
        optimizer = optimiser(parts)
        found = train(parts, optimizer, BEFORE + AFTER, slice(2 * rank, 2 * rank + 2))
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, losses, rtol=0, atol=TOLERANCE)
        parts.save(tmp_path / "two")
        dist.destroy_process_group()
        if rank == 0:
            assert peftc.load(tmp_path / "two").plan.trainable == one.plan.trainable

    on_two(tmp_path, work)
    same(tmp_path / "one 0", tmp_path / "two")


def test_what_is_read_as_a_whole_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "made.py"
    file.write_text("def model():\n    raise AssertionError\n")
    with pytest.raises(peftc.PeftcError, match="not-on-parts") as caught:
        peftc.compile_sharded(f"{file}:model", "train norm")
    assert "peftc.shard(peftc.compile(…))" in str(caught.value)
    with pytest.raises(peftc.PeftcError, match="needs-calibration"):
        peftc.compile_sharded(f"{file}:model", "apply fish(keep=0.1) to attn.*")
