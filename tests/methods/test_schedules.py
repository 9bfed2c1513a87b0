"""Methods that act while a model trains: ReLoRA's merges, DiffPruning's gates and cut, and penalties in the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftc
from peftc.graph.ir import PROVENANCE, get_attribute
from peftc.planning.plan import Binding
from peftc.protocol.site import Linear
from peftc.rewrite.weights import dense_weight
from peftc.runtime.schedule import Follower
from zoo import VOCABULARY, ZOO

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

# Slices of a fused weight and transposed weights, n_in != n_out, beside parameters with no schedule.
RELORA = "apply relora(r=2, alpha=6, every=3, warmup=2) to attn.q, attn.v, mlp.up\ntrain norm"
SCALE = 6 / 2


@cache
def _compiled(name: str, spec: str) -> peftc.CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peftc.compile(ZOO[name](), spec)


def compiled(name: str, spec: str) -> peftc.CompiledModule:
    """A copy of its own of a zoo model that was compiled once."""
    return copy.deepcopy(_compiled(name, spec)).train()


def batch(step: int = 0) -> dict[str, Tensor]:
    """Other tokens in each step, two texts of six."""
    tokens = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train(model: Callable[..., Any], optimizer: Optimizer, steps: range) -> list[float]:
    """One batch a step, numbered from 1; random numbers depend on the step alone. Returns the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model: peftc.CompiledModule, lr: float = 1e-2, **settings: Any) -> AdamW:
    """With weight decay: a wrong length of a step shows in both of its parts."""
    return AdamW(model.trainable_parameters().values(), lr=lr, **{"weight_decay": 0.1, **settings})


def logits(model: nn.Module) -> Tensor:
    """What it computes in eval mode."""
    training = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(**batch()).logits
    model.train(training)
    return found


def tensors(model: peftc.CompiledModule, binding: Binding) -> dict[str, Tensor]:
    return {name: get_attribute(model, full) for name, full in binding.names.items()}


def copies(model: peftc.CompiledModule) -> list[dict[str, Tensor]]:
    """The state of each binding, as it is now."""
    return [
        {name: tensor.detach().clone() for name, tensor in tensors(model, binding).items()}
        for binding in model.plan.bindings
    ]


def equal(actual: peftc.CompiledModule, expected: peftc.CompiledModule, tolerance: float = 0.0) -> None:
    """All that peftc added, and what the models compute."""
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], tensor, rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(logits(actual), logits(expected), rtol=0, atol=tolerance)


# ---- ReLoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_merge_changes_what_is_kept_and_no_output(name: str) -> None:
    """Seen from hooks right before and right after peftc's own."""
    model = compiled(name, RELORA)
    optimizer = adamw(model)
    before: list[Any] = []
    after: list[Any] = []

    def look(into: list[Any]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            known = [{key: tensor in optimizer.state for key, tensor in tensors(model, b).items()} for b in bindings]
            into.append((copies(model), logits(model), known, len(optimizer.state)))

        return hook

    bindings = model.plan.bindings
    optimizer.register_step_post_hook(look(before))
    model.follow(optimizer)
    optimizer.register_step_post_hook(look(after))
    train(model, optimizer, range(1, 8))

    for step in range(1, 8):
        old, new = before[step - 1], after[step - 1]
        if step % 3:
            still = ("merged", "A", "B") if step < 3 else ("merged",)  # later the step is shortened meanwhile
            assert all(torch.equal(o[key], n[key]) for o, n in zip(old[0], new[0], strict=True) for key in still)
            assert old[2] == new[2]
            continue
        # the weight is rounded once more: 1e-6 of logits of the order of 1
        torch.testing.assert_close(new[1], old[1], rtol=0, atol=1e-6)
        for was, now in zip(old[0], new[0], strict=True):
            grown = was["merged"] + SCALE * was["B"] @ was["A"]
            torch.testing.assert_close(now["merged"], grown, rtol=0, atol=1e-7)
            assert was["B"].any()
            assert not now["B"].any()
            assert not torch.equal(was["A"], now["A"])
            assert now["A"].abs().max() <= 1 / math.sqrt(now["A"].shape[1]) + 1e-7  # as a LoRA's A starts
        assert all(found == {"A": True, "B": True, "merged": False} for found in old[2])
        assert not any(any(found.values()) for found in new[2])
        assert new[3] == old[3] - 2 * len(bindings) > 0, "the norms' moments stay"


def test_the_sum_of_the_updates_has_the_rank_of_all_of_them() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 11))
    for state in copies(model):
        total = state["merged"] + SCALE * state["B"] @ state["A"]
        for matrix, merges in ((state["merged"], 3), (total, 4)):
            assert torch.linalg.matrix_rank(matrix.double(), rtol=1e-6) == 2 * merges, "but for fp32's rounding"


def test_only_the_rows_of_the_slice_change_and_the_base_not_at_all() -> None:
    model = compiled("gpt2", RELORA)
    base = {name: parameter.detach().clone() for name, parameter in model.base.named_parameters()}
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 5))
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, base[name]), name
    fused = "transformer.h.0.attn.c_attn.weight"
    change = (get_attribute(model, fused) - base[fused]).t()  # stored as [in, out]
    assert not change[32:64].any(), "the rows of k"
    for binding in model.plan.bindings:
        site = binding.site
        assert isinstance(site, Linear)
        found = dense_weight(get_attribute(model, site.weight), site) - dense_weight(base[site.weight], site)
        merged = tensors(model, binding)["merged"]
        assert merged.any()
        torch.testing.assert_close(found, merged, rtol=0, atol=1e-7)


def test_a_warm_step_is_that_of_a_smaller_learning_rate() -> None:
    """Against AdamW by hand: another learning rate in each step, and merges that are written out here."""
    ours, theirs = compiled("gpt2", RELORA), compiled("gpt2", RELORA)
    optimizer = adamw(ours)
    ours.follow(optimizer)
    adapters = [full for binding in theirs.plan.bindings for full in binding.names.values() if "merged" not in full]
    learning = theirs.trainable_parameters()
    groups = [
        {"params": [learning[name] for name in adapters]},
        {"params": [parameter for name, parameter in learning.items() if name not in adapters]},
    ]
    by_hand = AdamW(groups, lr=1e-2, weight_decay=0.1)
    warmth = {4: 1 / 3, 5: 2 / 3, 6: 1.0, 7: 1 / 3, 8: 2 / 3}
    for step in range(1, 9):
        by_hand.param_groups[0]["lr"] = 1e-2 * warmth.get(step, 1.0)
        train(ours, optimizer, range(step, step + 1))
        train(theirs, by_hand, range(step, step + 1))
        if step % 3 == 0:
            theirs.load_state_dict(ours.state_dict())  # A starts anew at random
            for name in adapters:
                del by_hand.state[learning[name]]
        equal(ours, theirs, 1e-6)  # a step is of 1e-2; what the lerp rounds, AdamW may turn by a few ulp


def test_a_merged_model_computes_the_same() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 6))
    merged = model.merge()
    assert type(merged) is type(model.base)
    # weights of the order of 0.1 summed in another order
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_saved_in_the_middle_it_goes_on_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    whole = compiled("gpt2", RELORA)
    optimizer = adamw(whole)
    whole.follow(optimizer)
    losses = train(whole, optimizer, range(1, 8))

    first = compiled("gpt2", RELORA)
    optimizer = adamw(first)
    first.follow(optimizer)
    assert train(first, optimizer, range(1, stop + 1)) == losses[:stop]
    first.save(tmp_path / "saved")
    kept = copy.deepcopy(optimizer.state_dict())

    second = peftc.load(tmp_path / "saved", first.base).train()
    optimizer = adamw(second)
    optimizer.load_state_dict(kept)
    second.follow(optimizer, step=stop)
    assert train(second, optimizer, range(stop + 1, 8)) == losses[stop:]
    equal(second, whole)


def test_a_state_from_before_the_first_merge_takes_the_merge_back() -> None:
    """As a Trainer that loads its best checkpoint does."""
    model = compiled("gpt2", RELORA)
    start, expected = copy.deepcopy(model.state_dict()), logits(model)
    optimizer = adamw(model)
    model.follow(optimizer)
    train(model, optimizer, range(1, 5))
    model.load_state_dict(start)
    assert torch.equal(logits(model), expected)


# ---- Trainer -------------------------------------------------------------------------------------------------------


class Recorder(Trainer):
    """Keeps the loss of every step at full precision; the log rounds it."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        assert isinstance(loss, Tensor)
        self.losses.append(loss.item())
        return loss


class Interrupt(TrainerCallback):
    """Ends the process, as it were, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULED = """
apply relora(r=2, every=2, warmup=1) to attn.q, attn.v
apply diff_pruning(prune=4, sparsity=0.1, l0=1e-5) to mlp.up
"""


def trainer(model: peftc.CompiledModule, folder: Path, *callbacks: TrainerCallback) -> Recorder:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, learning_rate=1e-2, disable_tqdm=True, use_cpu=True, save_steps=3,
        dataloader_pin_memory=False, logging_strategy="no", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, seed=1, save_strategy="steps",
    )  # fmt: skip
    texts = [{"input_ids": row, "labels": row} for step in range(15) for row in batch(step)["input_ids"].tolist()]
    made = Recorder(model, arguments, train_dataset=texts, callbacks=[model.callback(), *callbacks])
    made.losses = []
    return made


def test_trainer_resumes_a_schedule_bit_for_bit(tmp_path: Path) -> None:
    whole = compiled("gpt2", SCHEDULED)
    uninterrupted = trainer(whole, tmp_path / "whole")
    uninterrupted.train()
    assert not uninterrupted.optimizer.optimizer._optimizer_step_post_hooks, "the callback has let go"  # type: ignore[union-attr]
    acted = [tensor.any() for name, tensor in whole.state_dict().items() if name.endswith(("merged", "pruned"))]
    assert len(acted) == 2 * 3
    assert all(acted)

    stopped = trainer(compiled("gpt2", SCHEDULED), tmp_path / "stopped", Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = compiled("gpt2", SCHEDULED)
    resumed = trainer(again, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert resumed.losses == uninterrupted.losses[6:], "two batches a step"
    equal(again, whole)


def test_a_callback_that_was_cut_short_does_not_act_twice() -> None:
    model = compiled("gpt2", RELORA)
    callback, optimizer = model.callback(), adamw(model)

    class State:
        global_step, max_steps = 0, 10

    for _ in range(2):  # the second training begins though the first has not ended
        callback.on_train_begin(None, State(), None, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    callback.on_train_end(None, State(), None)
    callback.on_train_end(None, State(), None)
    assert not optimizer._optimizer_step_post_hooks


# ---- DiffPruning ---------------------------------------------------------------------------------------------------


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
    assert model.eval()(**batch()).loss == base
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


# ---- Loops by hand -------------------------------------------------------------------------------------------------


def test_a_step_of_several_backward_passes_is_one_step() -> None:
    """Two halves of the loss of the same batch add up to it, dropout's draws included."""
    whole, halves = compiled("llama", RELORA), compiled("llama", RELORA)
    for model, parts in ((whole, 1), (halves, 2)):
        optimizer = adamw(model)
        follower = model.follow(optimizer)
        for step in range(1, 5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            for _ in range(parts):
                (model(**batch(step)).loss / parts).backward()
            optimizer.step()
        assert follower.step == 4
    assert all(state["merged"].any() for state in copies(halves))
    equal(halves, whole, 1e-6)


TWO = """
apply relora(r=2, every=2, warmup=1) to attn.q
apply relora(r=2, every=3, warmup=1) to mlp.down
"""


def test_two_optimisers_drive_what_each_of_them_trains() -> None:
    one, two = compiled("llama", TWO), compiled("llama", TWO)
    together = adamw(one)
    one.follow(together)
    down = [parameter for name, parameter in two.trainable_parameters().items() if "mlp" in name]
    rest = [parameter for name, parameter in two.trainable_parameters().items() if "mlp" not in name]
    apart = [AdamW(members, lr=1e-2, weight_decay=0.1) for members in (rest, down)]
    followers = [two.follow(optimizer) for optimizer in apart]
    assert [{binding.site.name[-6:] for binding in f.statements[0]} for f in followers] == [{"q_proj"}, {"n_proj"}]
    for step in range(1, 6):
        train(one, together, range(step, step + 1))
        torch.manual_seed(step)
        loss = two(**batch(step)).loss
        for optimizer in apart:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in apart:
            optimizer.step()
    equal(two, one)


def test_what_no_longer_follows_does_nothing() -> None:
    model = compiled("gpt2", RELORA)
    optimizer = adamw(model)
    follower = model.follow(optimizer)
    train(model, optimizer, range(1, 3))
    follower.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, range(3, 5))
    assert not any(state["merged"].any() for state in copies(model))


@pytest.mark.parametrize("follow", [peftc.CompiledModule.follow, Follower], ids=["model", "class"])
def test_nothing_scheduled_leaves_no_hooks(follow: Callable[..., Follower]) -> None:
    model, _ = plain(DIFF)
    others = AdamW(nn.Linear(2, 2).parameters())
    follower = follow(model, others)  # trains nothing of the model's
    assert not follower.hooks
    assert not others._optimizer_step_pre_hooks
    assert not others._optimizer_step_post_hooks
    follower.remove()
