"""`fit`: what is chosen meets the limit, and nothing cheaper would; against all choices, tried one by one."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import peftc
from autograd import saved_bytes
from marks import first_is_quick
from peftc.bench.flops import count_flops
from peftc.capture.capture import Captured, capture
from peftc.capture.checkpoints.references import load_model, parse_reference
from peftc.capture.inputs import example_inputs
from peftc.files.artifact import flattened
from peftc.planning.fitting.knapsack import Thing, cheapest
from peftc.planning.plan import Plan
from peftc.planning.planner import make_plan
from peftc.protocol.sites import Sites
from peftc.roles.assign import find_sites
from peftc.spec.check import intend
from planned import plan
from zoo import GROUPED, T5, ZOO, inputs

torch.set_num_threads(1)
LORA = "apply lora(r=4) to attn.*, mlp.*"
BATCH, SEQ = 4, 64
ASKED = f"memory(batch={BATCH}, seq={SEQ})"


def six() -> LlamaForCausalLM:
    settings: dict[str, Any] = {**GROUPED, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(**settings))


def three_and_three() -> T5ForConditionalGeneration:
    """Blocks of two kinds: those of the decoder keep more, and cost more to compute again."""
    settings: dict[str, Any] = {**T5, "num_layers": 3, "num_decoder_layers": 3}
    return T5ForConditionalGeneration(T5Config(**settings))


MODELS = {"llama": six, "t5": three_and_three}


@cache
def captured(name: str) -> tuple[Captured, Sites]:
    built = MODELS[name]()
    found = capture(built, example_inputs(built))
    return found, find_sites(found)


def planned(name: str, spec: str) -> Plan:
    return make_plan(*captured(name), intend(spec))


def total(plan: Plan) -> int:
    return plan.memory(BATCH, SEQ).total


@cache
def every_choice(name: str) -> dict[frozenset[str], int]:
    """The memory of each set of blocks computed again, as the statement that names them makes it."""
    blocks = captured(name)[1].blocks
    sets = [set(some) for count in range(len(blocks) + 1) for some in itertools.combinations(blocks, count)]
    statements = {frozenset(some): "checkpoint " + ", ".join(f'"{path}"' for path in sorted(some)) for some in sets}
    return {some: total(planned(name, f"{LORA}\n{line if some else ''}")) for some, line in statements.items()}


@cache
def operations() -> dict[str, int]:
    """What computing a block of T5 again costs, counted in real steps: those of one stack are alike."""
    blocks = captured("t5")[1].blocks
    ids = torch.randint(3, 90, (BATCH, SEQ))
    counts = {}
    for block in ("", blocks[1], blocks[-1]):
        compiled = peftc.compile(MODELS["t5"](), LORA + (f'\ncheckpoint "{block}"' if block else "")).train()

        def step(compiled: Any = compiled) -> None:
            compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()

        counts[block.partition(".")[0]] = count_flops(step)
    whole = counts.pop("")
    return {block: counts[block.partition(".")[0]] - whole for block in blocks}


@pytest.mark.parametrize("share", first_is_quick([0.55, 0.02, 1.0]))
def test_no_fewer_blocks_would_do(share: float) -> None:
    """Six equal blocks, all 64 choices: the fewest that fit, within the limit to the byte."""
    choices = every_choice("llama")
    least, most = min(choices.values()), max(choices.values())
    limit = math.ceil(most - share * (most - least))
    found = planned("llama", f"{LORA}\nfit {ASKED} <= {limit / 1000} KB")
    assert total(found) <= limit
    assert total(found) == choices[frozenset(found.recomputed)]
    fewest = min(len(blocks) for blocks, size in choices.items() if size <= limit)
    assert len(found.recomputed) == fewest
    assert list(found.recomputed) == list(found.sites.blocks[:fewest])  # the last ones are computed back first


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_no_cheaper_blocks_would_do(share: float) -> None:
    """Blocks of two kinds: of all choices that fit none costs fewer operations, as a step of each was counted."""
    choices, costs = every_choice("t5"), operations()
    least, most = min(choices.values()), max(choices.values())
    limit = math.ceil(most - share * (most - least))
    found = planned("t5", f"{LORA}\nfit {ASKED} <= {limit / 1000} KB")
    assert total(found) <= limit

    def cost(blocks: Any) -> int:
        return sum(costs[block] for block in blocks)

    best = min(cost(blocks) for blocks, size in choices.items() if size <= limit)
    assert cost(found.recomputed) == best


@pytest.mark.parametrize("share", first_is_quick([0.05, 0.93]))
def test_no_fewer_numbers_packed_would_do(share: float) -> None:
    """Weights of one shape are alike: all numbers of each shape are tried, with all blocks computed again."""
    barely = planned("llama", f"{LORA}\ncheckpoint block")
    packed = planned("llama", f"{LORA}\ncheckpoint block\nquantize linear except head with nf4")
    limit = math.ceil(total(barely) - share * (total(barely) - total(packed)))
    found = planned("llama", f"{LORA}\nfit {ASKED} <= {limit / 1000} KB using checkpoint, nf4")
    assert total(found) <= limit
    kinds: dict[tuple[int, int], int] = {}
    for one in packed.packed.values():
        kind = math.prod(one.held), one.dense_bytes - one.bytes
        kinds[kind] = kinds.get(kind, 0) + 1
    best = min(
        sum(count * numbers for count, (numbers, _) in zip(counts, kinds, strict=True))
        for counts in itertools.product(*(range(count + 1) for count in kinds.values()))
        if total(barely) - sum(count * saved for count, (_, saved) in zip(counts, kinds, strict=True)) <= limit
    )
    assert sum(math.prod(one.held) for one in found.packed.values()) == best
    without = [blocks for blocks in every_choice("llama") if len(blocks) < len(found.recomputed)]
    saved = sum(one.dense_bytes - one.bytes for one in found.packed.values())
    assert all(every_choice("llama")[blocks] - saved > limit for blocks in without)


def test_weights_are_packed_only_where_blocks_are_not_enough() -> None:
    limit = total(planned("llama", f"{LORA}\ncheckpoint block")) / 1000
    found = planned("llama", f"{LORA}\nfit {ASKED} <= {limit} KB using nf4, checkpoint")
    assert len(found.recomputed) == 6
    assert not found.packed
    beside = planned("llama", f"{LORA}\nfit {ASKED} < {limit} KB using nf4, checkpoint")
    assert len(beside.packed) == 1
    alone = planned("llama", f"{LORA}\nfit {ASKED} <= {(total(planned('llama', LORA)) - 1) / 1000} KB using int8")
    assert not alone.recomputed
    assert len(alone.packed) == 1
    gentle = planned("llama", f"{LORA}\nfit {ASKED} < {limit} KB using checkpoint, int8, nf4")
    assert {repr(one.storage).partition("(")[0] for one in gentle.packed.values()} == {"int8"}


def test_what_a_spec_has_already_stays_and_what_fits_is_left_alone() -> None:
    own = f'{LORA}\ncheckpoint block in layers[4:]\nquantize "**.v_proj" with int8\n'
    assert planned("llama", f"{own}fit {ASKED} <= 1 TB").fitted[0].chosen == ()
    limit = (total(planned("llama", own)) - 1) / 1000
    found = planned("llama", f"{own}fit {ASKED} <= {limit} KB using checkpoint, nf4")
    assert found.fitted[0].chosen == ("checkpoint block in layers[:1]",)
    assert len(found.recomputed) == 3
    assert len(found.packed) == 6


@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2", "t5", "mixtral", "vit"]))
def test_what_was_chosen_is_written_out(name: str) -> None:
    """The spec that a plan keeps, which an artifact holds, has nothing left to choose, and means the same."""
    one = plan(name, "train norm\nfit memory(batch=2, seq=40) <= 1 TB using checkpoint, nf4")
    tight = plan(name, "train norm\ncheckpoint block\nquantize linear except head with nf4").memory(2, 40).total
    limit = (tight * 1.02) / 1000
    found = plan(name, f"train norm\nfit memory(batch=2, seq=40) <= {limit} KB using checkpoint, nf4")
    again = plan(name, flattened(found.spec))
    assert not one.recomputed
    assert found.packed
    assert not again.fitted
    assert again.recomputed.keys() == found.recomputed.keys()
    assert again.packed.keys() == found.packed.keys()
    assert found.memory(2, 40).total <= limit * 1000


# ---- Ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adalora", "gated(lora(r=auto))", "psoft"])
def test_the_largest_rank_that_fits(method: str) -> None:
    call = method if "(" in method else f"{method}(r=auto)"
    spec = f"let branches = {call}\napply branches to attn.q, attn.v\ntrain norm\n"
    counted = {rank: plan("llama", spec.replace("auto", str(rank))).trainable for rank in (8, 9)}
    found = plan("llama", f"{spec}fit trainable < {counted[9]}")
    assert found.trainable == counted[8]
    assert found.fitted[0].chosen == ("r=8",)
    assert plan("llama", flattened(found.spec)).trainable == counted[8]


def test_no_rank_is_larger_than_the_layer() -> None:
    found = plan("llama", "apply lora(r=auto) to attn.q\nfit trainable <= 99%")
    assert found.fitted[0].chosen == ("r=32",)


def test_ranks_come_first_and_then_the_memory() -> None:
    limit = plan("llama", "apply lora(r=8) to attn.*\ncheckpoint block").memory(8, 64).total * 1.05 / 1000
    spec = f"fit memory(batch=8, seq=64) <= {limit} KB\napply lora(r=auto) to attn.*\nfit trainable <= 15%"
    found = plan("llama", spec)
    assert [one.statement.split()[1] for one in found.fitted] == ["trainable", "memory(batch=8,"]
    assert found.share <= 0.15
    assert found.memory(8, 64).total <= limit * 1000


# ---- The whole way -------------------------------------------------------------------------------------------------


def test_a_fitted_model_trains_and_is_read_back(tmp_path: Path) -> None:
    limit = plan("llama", f"{LORA}\ncheckpoint block\nquantize mlp.* with nf4").memory(4, 32).total * 1.01 / 1000
    model = ZOO["llama"]()
    compiled = peftc.compile(model, f"{LORA}\nfit memory(batch=4, seq=32) <= {limit} KB using checkpoint, nf4")
    assert compiled.plan.recomputed
    assert compiled.plan.packed
    assert "computed again" in compiled.report()
    batch = inputs(model)
    compiled(**batch).loss.backward()
    compiled.save(tmp_path / "adapter")
    again = peftc.load(tmp_path / "adapter", ZOO["llama"]())
    assert again.plan.packed.keys() == compiled.plan.packed.keys()
    assert torch.equal(again.eval()(**batch).logits, compiled.eval()(**batch).logits)


LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow
def test_llama_3_8b_in_24_gib(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    model, _ = load_model(parse_reference(str(path)), meta=True)
    found = capture(model, example_inputs(model))
    sites = find_sites(found)
    for limit, tools in ((60, ""), (24, "using checkpoint, nf4")):
        spec = f"apply lora(r=16) to attn.*, mlp.*\nfit memory(batch=4, seq=4096) <= {limit} GiB {tools}"
        plan = make_plan(found, sites, intend(spec))
        assert 0.97 * limit * 2**30 < plan.memory(4, 4096).total <= limit * 2**30
        assert bool(plan.packed) == bool(tools)


@pytest.mark.slow
def test_two_layers_of_it_keep_what_was_estimated() -> None:
    """As wide as they are, with a small vocabulary, one of them computed again."""
    config = LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0})
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1 / 64)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no parameters
    limit = peftc.plan(model, "apply lora(r=16) to attn.*, mlp.*").memory(4, 32).total - 1
    compiled = peftc.compile(
        model, f"apply lora(r=16) to attn.*, mlp.*\nfit memory(batch=4, seq=32) <= {limit / 1e3} KB"
    )
    assert len(compiled.plan.recomputed) == 1
    compiled.eval()
    assert compiled.plan.memory(4, 32).activations == pytest.approx(saved_bytes(compiled), rel=0.1)


# ---- The choice itself ---------------------------------------------------------------------------------------------

THINGS = st.lists(st.builds(Thing, st.integers(1, 9), st.integers(0, 9)), max_size=8)


@given(THINGS, st.integers(1, 40))
def test_no_choice_costs_less(things: list[Thing], needed: int) -> None:
    sets = (some for count in range(len(things) + 1) for some in itertools.combinations(range(len(things)), count))
    enough = [some for some in sets if sum(things[place].saves for place in some) >= needed]
    found = cheapest(things, needed)
    if not enough:
        assert found is None
        return
    assert found is not None
    assert sum(things[place].saves for place in found) >= needed
    assert sum(things[place].costs for place in found) == min(sum(things[i].costs for i in some) for some in enough)
