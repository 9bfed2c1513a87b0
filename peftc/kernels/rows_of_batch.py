"""Of which task each row of a batch is, for graphs that hold several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftc.diagnostics.diagnostic import PeftcError
from peftc.kernels.common.errors import OtherRows
from peftc.kernels.common.operation import operation


@operation("rows_of_batch", device_types=["cpu", "cuda"])
def rows_of_batch(rows: Tensor, batch: int) -> Tensor:
    """The numbers of `rows` [n], each as often as rows of the batch were made of it: [batch], int64.

    Beams, and several texts for one prompt, lie beside each other.

    Raises:
        PeftcError: `other-rows` where there is not the same number of each.
    """
    if batch % rows.shape[0]:
        raise PeftcError(OtherRows(tasks=rows.shape[0], batch=batch))
    return torch.repeat_interleave(rows, batch // rows.shape[0])


@rows_of_batch.register_fake
def _(rows: Tensor, batch: int) -> Tensor:
    return rows.new_empty(batch)


@operation("row_scales", device_types=["cpu", "cuda"])
def row_scales(which: Tensor, owners: Sequence[int], ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """What each column of several low-rank branches side by side is multiplied by in each row: [batch, sum of ranks].

    Args:
        which: the number of each row's task, [batch], int64.
        owners: the number of each branch's task.
        ranks: the columns of each branch.
        scales: the factor of each branch, in the rows of its task; it is 0 in others.
    """
    each = torch.tensor(list(scales), device=which.device) * (
        which[:, None] == torch.tensor(list(owners), device=which.device)
    )
    return torch.repeat_interleave(each, torch.tensor(list(ranks), device=which.device), 1, output_size=sum(ranks))


@row_scales.register_fake
def _(which: Tensor, owners: Sequence[int], ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    return which.new_empty(which.shape[0], sum(ranks), dtype=torch.float32)


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape that lie in one piece of memory, each as far behind the one before: one [n, …], no copy."""
    first, *others = tensors
    if not others:
        return None
    step = others[0].storage_offset() - first.storage_offset()
    for place, tensor in enumerate(tensors):
        alike = tensor.shape == first.shape and tensor.dtype is first.dtype and tensor.is_contiguous()
        if not alike or tensor.storage_offset() != first.storage_offset() + place * step:
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride())) if step > 0 else None
