"""Eight-bit integers, a scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from peftc.protocol import Lazy, Tensor, torch
from peftc.protocol.storage import Buffer, Storage, storage

if TYPE_CHECKING:
    from peftc.kernels import dequantize
else:
    dequantize = Lazy("peftc.kernels.dequantize")

# Numbers that are rounded at a time: what that takes is no multiple of a large weight.
CHUNK = 1 << 20


@storage
class Int8(Storage):
    """The weights of LLM.int8(): each row's numbers in 127ths of its largest magnitude.

    Only the weight is in eight bits, and it is multiplied in the precision of the model: what LLM.int8() does to
    activations, their rounding and the outlier columns that are kept apart, is not done.
    """

    name = "int8"
    formula = "W = values * scale / 127, a scale a row"
    paper = "Dettmers et al. 2022, arXiv:2208.07339"

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Buffer]:
        rows = prod(shape[:-1])
        return {"values": Buffer((rows, shape[-1]), torch.int8), "scale": Buffer((rows,), torch.float32)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """As bitsandbytes' Linear8bitLt, by way of fp16; a row that has numbers beyond that, without it."""
        rows = weight.reshape(-1, weight.shape[-1])
        values = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(rows), dtype=torch.float32, device=weight.device)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            own = rows[start : start + step]
            some = own.half().float()
            some = torch.where(some.isinf().any(1, keepdim=True), own.float(), some)
            largest = some.abs().amax(1)
            steps = (some * (127.0 / largest[:, None])).nan_to_num_()  # 0 * inf in a row of zeros
            values[start : start + step] = steps.round_().to(torch.int8)
            scale[start : start + step] = largest
        return {"values": values, "scale": scale}

    def unpack(self, shape: tuple[int, ...], dtype: torch.dtype, **buffers: Tensor) -> Tensor:
        dense: Tensor = dequantize.dequantize_int8(buffers["values"], buffers["scale"], shape, dtype)
        return dense

    def to_bitsandbytes(
        self, shape: tuple[int, ...], dtype: torch.dtype, buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        layout = torch.tensor(0, dtype=torch.uint8)  # row by row
        return {"weight": buffers["values"].view(shape), "SCB": buffers["scale"], "weight_format": layout}

    def bitsandbytes_settings(self, dtype: torch.dtype) -> dict[str, object]:
        return {"load_in_8bit": True}

    @classmethod
    def of_bitsandbytes(cls, state: Mapping[str, Tensor]) -> tuple[Storage, tuple[int, ...], torch.dtype] | None:
        return (cls(), tuple(state["weight"].shape), torch.float32) if "SCB" in state else None

    def from_bitsandbytes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if "SCB" not in state or int(state.get("weight_format", torch.tensor(0))) != 0:
            return None
        return {"values": state["weight"].reshape(-1, state["weight"].shape[-1]), "scale": state["SCB"].float()}
