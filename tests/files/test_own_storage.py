"""A storage that bitsandbytes does not have, beside those that it has: nothing has to know that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import peftc
from peftc.capture.checkpoints.bitsandbytes import Packed
from peftc.files.merge import save_merged
from peftc.files.repack import Rounding, repack
from peftc.protocol import params
from peftc.protocol.storage import Buffer, Storage, storages
from zoo import ZOO

LORA = "apply lora(r=2) to attn.q\n"
SHAPE = (48, 64)


class Halves(Storage):
    """Every number in sixteen bits."""

    name = "halves"
    formula = "W = half(W)"
    paper = "none"

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Buffer]:
        return {"values": Buffer(shape, torch.float16)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {"values": weight.half()}

    def unpack(self, shape: tuple[int, ...], dtype: torch.dtype, **buffers: Tensor) -> Tensor:
        return buffers["values"].to(dtype)


@pytest.fixture(autouse=True)
def halves() -> Iterator[None]:
    """The storage is registered for one test; by its name it is asked before nf4."""
    registry = params.registry("storage")
    params.register(Halves)
    yield
    del registry.known["halves"]


def nf4() -> tuple[Tensor, dict[str, Tensor]]:
    """A weight that nf4 holds, and bitsandbytes' state dict of it."""
    storage = storages()["nf4"]()
    weight = storage.rounded(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    state = storage.to_bitsandbytes(SHAPE, weight.dtype, storage.pack(weight))
    assert state is not None
    return weight, state


def test_checkpoints_of_bitsandbytes_are_read() -> None:
    weight, state = nf4()
    assert [*storages()].index("halves") < [*storages()].index("nf4")
    assert Halves.of_bitsandbytes(state) is None
    torch.testing.assert_close(Packed(state)[...], weight, rtol=0, atol=0)


def test_what_nothing_reads_is_said() -> None:
    with pytest.raises(ValueError, match="no storage reads weight"):
        Packed({"weight": torch.zeros(SHAPE)})[...]


@pytest.mark.parametrize(
    "spec", ["quantize attn.* with halves\n", "quantize attn.q with halves\nquantize mlp.* with nf4\n"]
)
def test_a_merge_rounds_and_does_not_pack(spec: str, tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO["llama"](), spec + LORA)
    item = next(item for item in compiled.plan.packed.values() if item.storage.name == "halves")
    assert item.packed_as(nf4()[1]) is None
    found = repack(compiled)
    assert found.packing is None
    assert set(found.lost) == set(compiled.plan.packed)
    assert found.lost[item.weight] == Rounding(0.0, 0.0)  # LoRA starts as nothing
    assert not save_merged(found.model, tmp_path / "merged", found.packing)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weight = again.get_parameter(item.weight)
    torch.testing.assert_close(weight, weight.half().float(), rtol=0, atol=0)
