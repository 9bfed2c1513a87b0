"""What autograd keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftc import CompiledModule

BATCH, SEQ = 4, 32


def saved_bytes(compiled: CompiledModule) -> int:
    """The unique storages of the autograd graph, without parameters and buffers."""
    ids = torch.randint(3, 90, (BATCH, SEQ))
    labels = (
        ids if "ForCausalLM" in compiled.plan.sites.model or "LMHead" in compiled.plan.sites.model else ids[:, 0] % 2
    )
    with saving(compiled) as kept:
        loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    return sum(kept.values())


@contextmanager
def saving(compiled: CompiledModule, *others: torch.Tensor) -> Iterator[dict[int, int]]:
    """The bytes of each storage that is kept meanwhile and belongs neither to the model nor to `others`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*compiled.parameters(), *compiled.buffers(), *others)}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
