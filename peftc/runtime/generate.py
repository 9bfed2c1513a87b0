"""Greedy text from a compiled model, without a key-value cache: the whole sequence runs for every token."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import is_tensor
from peftc.planning.plan import Plan
from peftc.runtime.errors import CannotGenerate
from peftc.runtime.holder import Holder


@torch.no_grad()
def greedy(compiled: Holder, tokens: Tensor, mask: Tensor | None, new: int) -> Tensor:
    """[B, S] -> [B, S + new], or less where every row has ended; a row that has ended goes on with its end token.

    Raises:
        PeftcError: `cannot-generate` for a model that has no token inputs or no logits.
    """
    takes = {"input_ids", "attention_mask"} <= set(compiled.convention.inputs)
    if not takes or not getattr(compiled.base, "can_generate", bool)():
        raise PeftcError(CannotGenerate(model=compiled.plan.sites.model))
    mask = torch.ones_like(tokens) if mask is None else mask
    was_training = compiled.training
    compiled.eval()
    try:
        if bool(mask.all()) or not (counts_positions(compiled.history["capture"]) or stands_in_front(compiled.plan)):
            return _continued(compiled, tokens, mask, new)
        return _row_by_row(compiled, tokens, mask, new)
    finally:
        compiled.train(was_training)


def stands_in_front(plan: Plan) -> bool:
    """Whether something stands in front of the text, from which padding between the two would part it."""
    return any(b.method.takes_positions(b.site) or b.method.lengthens(b.site) for b in plan.bindings)


def counts_positions(graph: fx.Graph) -> bool:
    """Whether positions are looked up by place in the row, whatever the mask says: padding would shift them."""
    depends = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if any(argument in depends for argument in node.all_input_nodes) and is_tensor(node):
            depends.add(node)
        if node.target is torch.ops.aten.embedding.default and node.args[1] not in depends:
            return True
    return False


def _continued(compiled: Holder, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    ends = _end_tokens(compiled.base).to(tokens.device)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(new):
        chosen = compiled(input_ids=tokens, attention_mask=mask).logits[:, -1].argmax(-1)
        if len(ends):
            chosen = torch.where(done, ends[0], chosen)
            done |= torch.isin(chosen, ends)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if bool(done.all()):
            break
    return tokens


def _row_by_row(compiled: Holder, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """Each row without its padding, where padding would shift the positions."""
    added = []
    for row, kept in zip(tokens, mask.bool(), strict=True):
        bare = row[kept][None]
        added.append(_continued(compiled, bare, torch.ones_like(bare), new)[0, bare.shape[1] :])
    longest = max(len(row) for row in added)
    ends = _end_tokens(compiled.base).to(tokens.device)
    filler = ends[0] if len(ends) else tokens.new_zeros(())
    padded = [torch.cat([row, filler.expand(longest - len(row))]) for row in added]
    return torch.cat([tokens, torch.stack(padded)], 1)


def _end_tokens(base: nn.Module) -> Tensor:
    """The model's end-of-sequence tokens, none where it has none."""
    settings = getattr(base, "generation_config", None) or getattr(base, "config", None)
    found = getattr(settings, "eos_token_id", None)
    return torch.tensor([] if found is None else [found] if isinstance(found, int) else found, dtype=torch.long)
