"""Ladder side-tuning against the paper's formula written out with hooks, and the block sites that it stands on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

import peftc
from ladders import QUICK, SPEC, base_of, compiled, per_model
from peftc.capture.capture import capture
from peftc.capture.inputs import example_inputs
from peftc.protocol.site import Block
from peftc.roles.assign import find_sites
from zoo import ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


@cache
def base_model(name: str) -> PreTrainedModel:
    """In eval mode, frozen, and with attention spelt out, so that the tests can read its weights."""
    model: PreTrainedModel = ZOO[name]().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


# ---- Block sites -------------------------------------------------------------------------------------------------


def first_tensor(given: Any) -> Tensor:
    tensor = given if isinstance(given, Tensor) else given[0]
    assert isinstance(tensor, Tensor)
    return tensor


def hidden_states(model: nn.Module, batch: dict[str, Tensor], paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters and leaves each block, by hooks."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            seen[path] = entering.detach(), first_tensor(output).detach()

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@per_model()
def test_what_enters_and_leaves_each_block(name: str) -> None:
    """Block sites are found by data flow; hooks on the model's own blocks see the same values."""
    model = base_of(name)
    found = capture(model, example_inputs(model))
    blocks = [site for site in find_sites(found) if isinstance(site, Block)]
    assert blocks
    batch = inputs(model)
    expected = hidden_states(model, batch, [block.path for block in blocks])

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n] = result
            return result

    values: dict[fx.Node, Any] = {}
    found.module.eval()
    if "token_type_ids" in found.inputs:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # as the model itself does where it has none
    with torch.no_grad():
        Recording(found.module).run(*(batch[name] for name in found.inputs))
    for block in blocks:
        assert block.x is not None
        assert block.h is not None
        x, h = expected[block.path]
        torch.testing.assert_close(values[block.x], x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[block.h], h, rtol=1e-5, atol=1e-5)
        assert block.width == h.shape[-1]
        assert block.top == (block.layer == 1)


def test_who_reads_whom() -> None:
    sites = {site.name: site for site in peftc.sites(base_of("t5")) if isinstance(site, Block)}
    assert {name: site.readers for name, site in sites.items()} == {
        "encoder.block.0": ("decoder.block",),
        "encoder.block.1": ("decoder.block",),
        "decoder.block.0": (),
        "decoder.block.1": (),
    }
    assert {site.source for site in sites.values()} == {None, "encoder.block"}


def test_blocks_train_as_ever() -> None:
    plan = peftc.plan(base_of("llama"), "train block in layers[-1:]")
    assert set(plan.trained) == {name for name in plan.sites.parameters if name.startswith("model.layers.1.")}


# ---- The formula, written out ------------------------------------------------------------------------------------


def rms(value: Tensor, scale: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def side_network(
    hidden: list[tuple[Tensor, Tensor]], rungs: list[dict[str, Tensor]], memory: Tensor | None, cross: list[Tensor]
) -> Tensor:
    """s_n of one stack, from its blocks' (x, h) and the state at each; `cross`: attention weights [B, H, T, S]."""
    side = hidden[0][0] @ rungs[0]["first"].T
    for index, ((_, h), state) in enumerate(zip(hidden, rungs, strict=True)):
        mu = 1 / (1 + (-state["gate"] / 0.1).exp())
        side = mu * (h @ state["down"].T) + (1 - mu) * side
        if memory is not None:
            values = memory @ state["cross"].T
            heads = cross[index].shape[1]
            side = side + sum(cross[index][:, head] @ values for head in range(heads)) / heads
        side = side + (rms(side, state["norm"]) @ state["wide"].T).relu() @ state["narrow"].T
    return side


def by_hand(
    name: str, batch: dict[str, Tensor], state: dict[str, dict[str, Tensor]], chains: list[list[str]]
) -> tuple[Tensor, Tensor]:
    """Loss and logits of the plain model with a ladder of `state` (block -> tensors), one chain a stack."""
    model = base_model(name)
    hidden = hidden_states(model, batch, [path for chain in chains for path in chain])
    crossing: list[Tensor] = []
    if len(chains) > 1:
        with torch.no_grad():
            every = model(**batch, output_attentions=True).cross_attentions
        crossing = [every[int(path.rpartition(".")[2])] for path in chains[-1]]
    side: Tensor | None = None
    for chain in chains:
        side = side_network([hidden[path] for path in chain], [state[path] for path in chain], side, crossing)
    assert side is not None
    last = chains[-1][-1]
    change = rms(side, state[last]["last_norm"]) @ state[last]["up"].T

    def replace_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = first_tensor(output) + change
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = model.get_submodule(last).register_forward_hook(replace_output)
    result = model(**batch)
    handle.remove()
    return result.loss, result.logits


def compare(name: str, spec: str, chosen: Callable[[Block], bool] = lambda _block: True) -> None:
    """Loss, logits and every gradient, to 1e-5: float32 sums in another order."""
    module = compiled(name, spec)
    batch = inputs(module.base)
    if "attention_mask" in batch:
        batch["attention_mask"][1, -2:] = 0
    state: dict[str, dict[str, Tensor]] = {}
    chains: dict[str, list[str]] = {}
    for site in module.plan.sites:
        if isinstance(site, Block) and chosen(site):
            chains.setdefault(site.container, []).append(site.path)
            prefix = f"{site.path}.ladder."
            mine = {key: tensor for key, tensor in module.trainable_parameters().items() if key.startswith(prefix)}
            state[site.path] = {
                key.removeprefix(prefix): tensor.detach().clone().requires_grad_() for key, tensor in mine.items()
            }
    loss, logits = by_hand(name, batch, state, list(chains.values()))
    found = module(**batch)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    found.loss.backward()
    learned = module.trainable_parameters()
    assert len(learned) == sum(map(len, state.values()))
    for path, tensors in state.items():
        for key, tensor in tensors.items():
            assert tensor.grad is not None
            torch.testing.assert_close(learned[f"{path}.ladder.{key}"].grad, tensor.grad, rtol=1e-4, atol=1e-5)


@per_model((*QUICK, "bart", "gemma2", "phi", "falcon", "mixtral"))
def test_the_compiled_model_is_the_formula(name: str) -> None:
    compare(name, SPEC)


@pytest.mark.xdist_group("llama")
def test_dropped_rungs() -> None:
    """The paper drops side layers: the first named block then starts from what enters it."""
    compare("llama", "apply ladder(size=6) to block in layers[1:]", lambda block: block.layer == 1)


@pytest.mark.xdist_group("t5")
def test_a_decoder_alone_reads_no_encoder() -> None:
    compare("t5", f"{SPEC} in decoder", lambda block: block.stack == "decoder")
    assert not any("cross" in key for key in compiled("t5", f"{SPEC} in decoder").trainable_parameters())


@pytest.mark.xdist_group("t5")
def test_a_rung_of_the_encoder_is_enough_for_the_decoder_to_read() -> None:
    """An encoder's chain hands over sideways, so it may end anywhere."""
    compare("t5", "apply ladder(size=6) to block in layers[:1] in encoder, block in decoder",
            lambda block: block.path != "encoder.block.1")  # fmt: skip
