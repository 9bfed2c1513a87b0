"""DiffPruning's gates and cut against the papers' formulas, and penalties in the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import peftc
from peftc.graph.ir import PROVENANCE, get_attribute
from peftc.runtime.schedule import Follower
from scheduled import RELORA, adamw, batch, compiled, copies, logits, tensors, train

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


class Plain(nn.Module):
    """One layer, no loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@cache
def _plain(spec: str) -> peftc.CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peftc.compile(Plain(), spec, example=torch.zeros(3, 5))


def plain(spec: str) -> tuple[peftc.CompiledModule, dict[str, Tensor]]:
    """The layer with the spec's method, and its state, of which `w` and `alpha` are made random."""
    model = copy.deepcopy(_plain(spec))
    state = tensors(model, model.plan.bindings[0])
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        state["w"].copy_(torch.randn(7, 5, generator=random))
        state["alpha"].copy_(2 * torch.randn(7, 5, generator=random))
    return model, state


# Louizos et al. 2018, equations 10 and 11 and figure 1, with Guo et al.'s interval and temperature
GAMMA, ZETA, BETA = -1.5, 1.5, 1.0


def gate(u: Tensor, log_alpha: Tensor) -> Tensor:
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / BETA)
    stretched = s * (ZETA - GAMMA) + GAMMA
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), stretched))


def open_probability(log_alpha: Tensor) -> Tensor:
    """Of a gate's not being zero: equation 12."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


DIFF = "apply diff_pruning(sparsity=0.1, prune=2, l0=0.25) to linear"


def test_gates_are_those_of_the_papers() -> None:
    model, state = plain(DIFF)
    x = torch.randn(3, 5)
    torch.manual_seed(5)
    actual = model.train()(x)
    torch.manual_seed(5)
    z = gate(torch.rand(7, 5), state["alpha"])
    assert (z == 0).any()
    assert (z == 1).any()
    torch.testing.assert_close(actual, model.base(x) + x @ (z * state["w"]).t(), rtol=1e-5, atol=1e-5)

    certain = (torch.sigmoid(state["alpha"]) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)  # Louizos et al., equation 13
    expected = model.base(x) + x @ (certain * state["w"]).t()
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_through_the_gates() -> None:
    model, state = plain(DIFF)
    x = torch.randn(3, 5)
    torch.manual_seed(5)
    model.train()(x).square().sum().backward()
    w, alpha = (state[name].detach().clone().requires_grad_() for name in ("w", "alpha"))
    torch.manual_seed(5)
    (model.base(x) + x @ (gate(torch.rand(7, 5), alpha) * w).t()).square().sum().backward()
    for name, expected in (("w", w), ("alpha", alpha)):
        assert expected.grad is not None
        torch.testing.assert_close(state[name].grad, expected.grad, rtol=1e-5, atol=1e-4)  # of the order of 100


def test_the_penalty_is_the_share_of_gates_that_open() -> None:
    """By drawing gates: 20000 of each of 35, of which the share has a deviation below 0.004."""
    model, state = plain(DIFF)
    drawn = (gate(torch.rand(20000, 7, 5, generator=torch.Generator().manual_seed(0)), state["alpha"]) > 0).double()
    torch.testing.assert_close(drawn.mean(0), open_probability(state["alpha"]).double(), rtol=0, atol=5 * 0.0036)
    expected = 0.25 * open_probability(state["alpha"]).sum()
    torch.testing.assert_close(model.penalty(), expected, rtol=1e-6, atol=0)


DIFF_LLAMA = "apply diff_pruning(sparsity=0.02, prune=3, l0=1e-4) to attn.q, mlp.down"


def test_the_loss_has_the_penalty_in_training_and_not_in_evaluation() -> None:
    """The difference starts at zero, and this model has no dropout: the base's loss is the rest of it."""
    model = compiled("llama", DIFF_LLAMA)
    with torch.no_grad():
        for state in (tensors(model, binding) for binding in model.plan.bindings):
            state["alpha"].normal_()
    expected = sum(1e-4 * open_probability(tensors(model, b)["alpha"]).sum() for b in model.plan.bindings)
    assert isinstance(expected, Tensor)
    base = model.base.eval()(**batch()).loss
    torch.testing.assert_close(model.eval()(**batch()).loss, base, rtol=1e-6, atol=0)  # by other libraries' products
    torch.testing.assert_close(model.train()(**batch()).loss, base + expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.penalty(), expected, rtol=1e-6, atol=0)
    model.penalty().backward()
    by_hand = {name: p.grad.clone() for name, p in model.trainable_parameters().items() if p.grad is not None}
    assert by_hand
    assert all(name.endswith("alpha") for name in by_hand)
    model.zero_grad()
    model(**batch()).loss.backward()
    for name, gradient in by_hand.items():  # w = 0: alpha learns from the penalty alone
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-12)


def test_the_cut_keeps_the_largest_of_all_weights_together() -> None:
    model = compiled("llama", DIFF_LLAMA)
    model.logits_in_training = True
    optimizer = adamw(model)
    seen: list[list[dict[str, Tensor]]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(copies(model)))
    model.follow(optimizer)
    train(model, optimizer, range(1, 4))
    before, after = seen[-1], copies(model)
    z = [(torch.sigmoid(s["alpha"]) * (ZETA - GAMMA) + GAMMA).clamp(0, 1) * s["w"] for s in before]
    every = torch.cat([change.flatten() for change in z])
    count = round(0.02 * len(every))
    assert len(every) == 2 * (48 * 32 + 32 * 80)
    threshold = every.abs().sort(descending=True).values[count - 1]
    for change, state in zip(z, after, strict=True):
        kept = change.abs() >= threshold
        assert torch.equal(state["mask"] > 0, kept)
        torch.testing.assert_close(state["w"], change * kept, rtol=1e-6, atol=0)
        assert state["pruned"].item() == 1
    shares = [state["mask"].mean().item() for state in after]
    assert sum(int(state["mask"].sum()) for state in after) == count
    assert max(shares) > min(shares), "the share is of all together, not of each"
    assert model.penalty() == 0

    train(model, optimizer, range(4, 8))
    for state, later in zip(after, copies(model), strict=True):
        kept = state["mask"] > 0
        assert torch.equal(later["mask"], state["mask"])
        assert not later["w"][~kept].any()
        assert (later["w"][kept] != state["w"][kept]).all()
    # No gates are left, drawn or not: training computes what evaluation does. And so does the merged model.
    torch.testing.assert_close(model.train()(**batch()).logits, logits(model), rtol=0, atol=1e-6)
    merged = model.merge()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    changed = [
        (get_attribute(merged, b.site.parameters[0]) != get_attribute(model.base, b.site.parameters[0])).sum().item()
        for b in model.plan.bindings
    ]
    # a change that is lost in the weight's rounding is not seen
    assert 0.95 * count <= sum(changed) <= count


def test_more_penalty_leaves_fewer_gates_open() -> None:
    shares = []
    for l0 in ("1e-6", "1e-3"):
        model = compiled("llama", f"apply diff_pruning(l0={l0}) to attn.q, mlp.down")
        train(model, adamw(model, lr=0.5, weight_decay=0), range(1, 21))
        open_gates = torch.cat([open_probability(state["alpha"]).flatten() for state in copies(model)])
        shares.append(open_gates.mean().item())
    assert shares[1] < 0.6 * shares[0]


# ---- Penalties -----------------------------------------------------------------------------------------------------


def test_without_labels_there_is_no_loss_to_add_to() -> None:
    model = compiled("llama", DIFF_LLAMA)
    given = {name: tensor for name, tensor in batch().items() if name != "labels"}
    result = model(**given)
    assert result.loss is None
    torch.testing.assert_close(result.logits, model.base(**given).logits, rtol=0, atol=1e-6)
    (result.logits.sum() + model.penalty()).backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())


def test_a_plain_module_takes_the_penalty_by_name() -> None:
    """It returns no loss: the caller adds it to one of their own."""
    model, state = plain(DIFF)
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=0.1)
    before = state["alpha"].detach().clone()
    loss = model.train()(torch.zeros(3, 5)).square().sum() + model.penalty()  # nothing but the bias and the penalty
    loss.backward()
    optimizer.step()
    slope = torch.sigmoid(before) * torch.sigmoid(-before)
    torch.testing.assert_close(state["alpha"], before - 0.1 * 0.25 * slope, rtol=1e-5, atol=1e-6)


def test_a_model_without_penalties_has_none() -> None:
    model = compiled("gpt2", RELORA)
    assert model.penalty() == 0


def test_penalties_are_computed_in_their_blocks() -> None:
    """Where a block is sharded, its tensors are whole only while it runs."""
    model = compiled("llama", DIFF_LLAMA)

    def passes(module: nn.Module) -> set[str]:
        graph = getattr(module, "graph", None)
        return {node.meta[PROVENANCE].pass_name for node in graph.nodes if PROVENANCE in node.meta} if graph else set()

    for block in model.plan.sites.blocks:
        assert "penalties" in passes(model.get_submodule(block)), block
    outer = [str(node.target) for node in model.graph.find_nodes(op="get_attr")]
    assert not [name for name in outer if "diff_pruning" in name]


def test_torch_compile_takes_penalties_and_random_gates_in_one_graph() -> None:
    """Both modes, and on after a cut: what `training` is, and what the schedule wrote, is read anew."""
    slow, model = compiled("llama", DIFF_LLAMA), compiled("llama", DIFF_LLAMA)
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for one, run in ((slow, slow), (model, fast)):
        optimizer = adamw(one)
        one.follow(optimizer)
        found = train(run, optimizer, range(1, 6))
        one.eval()
        found.append(run(**batch()).loss.item())
        one.train()
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("follow", [peftc.CompiledModule.follow, Follower], ids=["model", "class"])
def test_nothing_scheduled_leaves_no_hooks(follow: Callable[..., Follower]) -> None:
    model, _ = plain(DIFF)
    others = AdamW(nn.Linear(2, 2).parameters())
    follower = follow(model, others)  # trains nothing of the model's
    assert not follower.hooks
    assert not others._optimizer_step_pre_hooks
    assert not others._optimizer_step_post_hooks
    follower.remove()
