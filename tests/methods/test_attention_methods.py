"""Prefixes and LLaMA-Adapter against HF PEFT itself; where they can stand, and the positions they take."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftc
from peftc.protocol.site import Attention
from zoo import GROUPED, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- HF PEFT ------------------------------------------------------------------------------------------------------

LENGTH = 3
# Where HF PEFT can put a prefix; the models of the last line only in the slow suite.
PARITY = [
    *("llama", "gpt2", "bloom", "mistral", "mixtral"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gemma2", "gemma3", "t5", "bart", "bert")),
]
PADDING = {"none": (), "left": (slice(0, 1), slice(0, 2)), "right": (slice(0, 1), slice(-2, None))}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    return model


def with_hf_prefix(model: PreTrainedModel) -> Any:
    """HF PEFT's own, and its one tensor [length, layers * 2 * width]."""
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    task = "SEQ_CLS" if "Sequence" in type(model).__name__ else task
    sizes: dict[str, Any] = {"token_dim": 48, "num_attention_heads": 4} if model.config.model_type == "t5" else {}
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH, **sizes)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def hf_columns(model: PreTrainedModel, layers: int) -> list[tuple[int, int]]:
    """Which part of HF PEFT's tensor is the keys and the values of each layer.

    For an encoder-decoder it doubles the list and gives each layer four of it, of which the decoder's own attention
    reads two; so half of the list is never read.
    """
    if model.config.is_encoder_decoder:
        return [(4 * layer % (2 * layers), (4 * layer + 1) % (2 * layers)) for layer in range(layers)]
    return [(2 * layer, 2 * layer + 1) for layer in range(layers)]


@cache
def parity_case(name: str) -> tuple[Any, peftc.CompiledModule, PreTrainedModel]:
    model = without_dropout(ZOO[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = with_hf_prefix(model)
    where = "self.attn in decoder" if model.config.is_encoder_decoder else "attn"
    ours = peftc.compile(model, f"apply prefix(length={LENGTH}, windowed=true) to {where}").eval()
    flat = theirs.prompt_encoder.default.embedding.weight.detach()
    columns = hf_columns(model, len(ours.plan.bindings))
    parts = flat.view(LENGTH, 2 * len(columns), -1)
    with torch.no_grad():
        for binding, (key, value) in zip(ours.plan.bindings, columns, strict=True):
            ours.get_parameter(binding.names["keys"]).copy_(parts[:, key])
            ours.get_parameter(binding.names["values"]).copy_(parts[:, value])
    return theirs, ours, model


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", PARITY)
def test_a_prefix_is_hf_pefts(name: str, padding: str) -> None:
    """From the same state: logits, loss and gradients, also of a model whose window passes the prefix by."""
    theirs, ours, model = parity_case(name)
    batch = inputs(model)
    batch["attention_mask"][PADDING[padding]] = 0
    theirs.zero_grad()
    ours.zero_grad()
    try:
        expected = theirs(**batch)
    except ValueError as refused:  # of encoders, with transformers from 5.24 on
        pytest.skip(str(refused))
    found = ours(**batch)
    seen = batch["attention_mask"].bool()
    logits = [out.logits[seen] if out.logits.shape[:2] == seen.shape else out.logits for out in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    weight = theirs.prompt_encoder.default.embedding.weight
    gradients = torch.zeros_like(weight).view(LENGTH, 2 * len(ours.plan.bindings), -1)
    columns = hf_columns(model, len(ours.plan.bindings))
    for binding, places in zip(ours.plan.bindings, columns, strict=True):
        for place, part in zip(places, ("keys", "values"), strict=True):
            gradient = ours.get_parameter(binding.names[part]).grad
            assert gradient is not None
            gradients[:, place] += gradient
    torch.testing.assert_close(gradients.view(LENGTH, -1), weight.grad, rtol=1e-5, atol=1e-7)


def small_llama() -> LlamaForCausalLM:
    """Heads that fill the width, as HF PEFT's adaption prompt needs them to count its copies of the keys' heads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**GROUPED, "hidden_size": 48, "num_hidden_layers": 3}
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return model


def test_llama_adapter_is_hf_pefts() -> None:
    """In the top two of three layers, gates away from zero: outputs and gradients."""
    model = small_llama()
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    ours = peftc.compile(model, "apply llama_adapter(length=4) to attn in layers[-2:]").eval()
    pairs: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for binding in ours.plan.bindings:
            attention = theirs.base_model.model.get_submodule(binding.site.path)
            attention.adaption_gate.fill_(0.7)
            prompt, gate = (ours.get_parameter(binding.names[name]) for name in ("prompt", "gate"))
            prompt.copy_(attention.adaption_prompt[0])
            gate.fill_(0.7)
            pairs |= {prompt: attention.adaption_prompt, gate: attention.adaption_gate}
    batch = inputs(model)
    batch["attention_mask"][0, :2] = 0
    expected, found = theirs(**batch), ours(**batch)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[seen], expected.logits[seen], rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    assert len(pairs) == 4
    for mine, yours in pairs.items():
        assert yours.grad is not None
        torch.testing.assert_close(mine.grad, yours.grad.view_as(mine), rtol=1e-5, atol=1e-7)


# ---- Sites --------------------------------------------------------------------------------------------------------


def attentions(name: str) -> list[Attention]:
    return [site for site in peftc.sites(ZOO[name]()) if isinstance(site, Attention)]


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "width", "groups", "positions"),
    [
        ("llama", 4, 2, 12, (0, 0, 1, 1), None),
        ("gpt2", 4, 4, 8, (0, 1, 2, 3), 64),
        ("opt", 4, 4, 8, (0, 1, 2, 3), 64),  # of 66 rows the first two are never looked up
        ("roberta", 4, 4, 8, (0, 1, 2, 3), 63),  # its positions begin behind the padding's, here 0
        ("bert", 4, 4, 8, (0, 1, 2, 3), 64),
        pytest.param("bloom", 4, 4, 8, (0, 1, 2, 3), None, marks=pytest.mark.slow),
        pytest.param("falcon", 4, 1, 8, (0,), None, marks=pytest.mark.slow),
        pytest.param("falcon_new", 4, 2, 8, (0, 0, 1, 1), None, marks=pytest.mark.slow),
        pytest.param("deberta_v2", 4, 4, 8, (0, 1, 2, 3), 64, marks=pytest.mark.slow),
        pytest.param("gemma2", 4, 2, 12, (0, 0, 1, 1), None, marks=pytest.mark.slow),
        ("vit", 4, 4, 8, (0, 1, 2, 3), None),
    ],
)
def test_heads_and_positions(
    name: str, heads: int, kv_heads: int, width: int, groups: tuple[int, ...], positions: int | None
) -> None:
    found = attentions(name)
    assert len(found) == 2
    for site in found:
        assert (site.heads, site.kv_heads, site.key_width, site.value_width) == (heads, kv_heads, width, width)
        assert (site.groups, site.positions, site.cross) == (groups, positions, False)


def test_cross_attention() -> None:
    found = {site.name: (site.cross, site.positions) for site in attentions("bart")}
    assert sorted(found.values(), key=str) == [(False, 64)] * 4 + [(True, None)] * 2


# ---- Positions ----------------------------------------------------------------------------------------------------


def rows_looked_up(model: PreTrainedModel, table: str, spec: str) -> list[int]:
    """The rows of a table of positions that a batch of seven tokens reads."""
    compiled = peftc.compile(model, f'{spec}\ntrain "{table}"').eval()
    batch = inputs(model)
    compiled(**batch).logits.square().sum().backward()
    gradient = compiled.get_parameter(f"{table}.weight").grad
    assert gradient is not None
    return gradient.abs().sum(1).nonzero().flatten().tolist()


def test_all_layers_count_behind_the_longest_prefix() -> None:
    """Also those that have none, and those whose own is shorter: there is one count of tokens."""
    model = without_dropout(ZOO["gpt2"]())
    spec = "apply prefix(length=2) to attn in layers[:1]\napply gated(adapter(size=4)) to mlp"
    assert rows_looked_up(model, "transformer.wpe", spec) == list(range(2, 9))
    spec = "apply prefix(length=2) to attn in layers[:1]\napply prefix(length=5) to attn in layers[1:]"
    assert rows_looked_up(model, "transformer.wpe", spec) == list(range(5, 12))
    assert rows_looked_up(model, "transformer.wpe", "apply llama_adapter to attn") == list(range(7))


def test_each_stack_counts_for_itself() -> None:
    """Decoder tokens (nine, positions from 2) move where the decoder has a prefix; encoder tokens do not."""
    model = without_dropout(ZOO["bart"]())
    tables = "model.encoder.embed_positions", "model.decoder.embed_positions"
    spec = "apply prefix(length=5) to self.attn in decoder"
    assert [rows_looked_up(model, table, spec)[0] for table in tables] == [2, 7]
    assert [rows_looked_up(model, table, "apply prefix(length=5) to cross.attn")[0] for table in tables] == [2, 2]


@pytest.mark.parametrize(("windowed", "is_seen"), [("false", True), ("true", False)])
def test_a_window_does_not_hide_the_prefix_unless_it_shall(windowed: str, is_seen: bool) -> None:
    """A window of 4 has left the prefix behind at the seventh token."""
    model = ZOO["mistral"]().eval()
    compiled = peftc.compile(model, f"apply prefix(length=2, windowed={windowed}) to attn in layers[1:]").eval()
    batch = inputs(model)
    compiled(**batch).logits[:, -1].square().sum().backward()
    for parameter in compiled.trainable_parameters().values():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) is is_seen


# ---- What else a prefix is ----------------------------------------------------------------------------------------


def test_the_network_makes_a_prefix_like_any_other() -> None:
    model = ZOO["llama"]().eval()
    made = peftc.compile(model, "apply prefix(length=4, reparam=6) to attn").eval()
    plain = peftc.compile(model, "apply prefix(length=4) to attn").eval()
    shared = {full for binding in made.plan.bindings for name, full in binding.names.items() if name in binding.shared}
    assert len(shared) == 3  # embedding, weight and bias, once for the statement
    with torch.no_grad():
        for source, target in zip(made.plan.bindings, plain.plan.bindings, strict=True):
            state = {name: made.get_parameter(full) for name, full in source.names.items()}
            for name, tensor in zip(("keys", "values"), source.method.extend(source.site, **state), strict=True):
                plain.get_parameter(target.names[name]).copy_(tensor)
    batch = inputs(model)
    torch.testing.assert_close(made(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("method", ["prefix", "llama_adapter"])
def test_state_of_a_half_precision_model_is_in_full_precision(method: str) -> None:
    model: nn.Module = ZOO["llama"]().eval()
    batch = inputs(ZOO["llama"]())
    compiled = peftc.compile(model.bfloat16(), f"apply {method}(length=3) to attn")
    compiled.logits_in_training = True
    out = compiled(**batch)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    for parameter in compiled.trainable_parameters().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_goes_on_behind_a_prefix(name: str) -> None:
    """The same words as HF PEFT's, from a batch with padding at its left."""
    theirs, ours, model = parity_case(name) if name == "gpt2" else parity_case("llama")
    batch = inputs(model)
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    mask[0, :2] = 0  # the prefix's keys are not turned, so that padding behind it would part it from the text
    found = ours.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row in range(len(ids)):
        bare = ids[row][mask[row].bool()][None]
        for _ in range(3):
            with torch.no_grad():
                logits = theirs(input_ids=bare, attention_mask=torch.ones_like(bare)).logits
            bare = torch.cat([bare, logits[:, -1].argmax(-1)[:, None]], 1)
        assert found[row, -3:].tolist() == bare[0, -3:].tolist()


# ---- HF PEFT's folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prefix(length=3)", "prefix(length=3, reparam=5)"])
def test_hf_peft_reads_what_it_writes(method: str, tmp_path: Path) -> None:
    """The network that made the prefix is not in the folder: what it makes is."""
    model = ZOO["llama"]().eval()
    ours = peftc.compile(model, f"apply {method} to attn").eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    batch = inputs(model)
    torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, rtol=1e-5, atol=1e-5)
    loaded = peftc.load_peft(model, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, ours(**batch).logits, rtol=1e-5, atol=1e-5)


def test_it_reads_what_hf_peft_writes(tmp_path: Path) -> None:
    theirs, _, model = parity_case("mistral")
    theirs.save_pretrained(tmp_path)
    loaded = peftc.load_peft(model, tmp_path).eval()
    batch = inputs(model)
    torch.testing.assert_close(loaded(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("llama", "apply prefix(length=3) to attn in layers[1:]", "for all layers"),
        ("mistral", "apply prefix(length=3) to attn", "windowed=true"),
        ("llama", "apply llama_adapter to attn", "it has no llama_adapter"),
    ],
)
def test_what_hf_pefts_folder_cannot_hold(name: str, spec: str, reason: str, tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO[name](), spec)
    with pytest.raises(peftc.PeftcError, match=reason):
        compiled.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_the_caller_gives_count_on_from_behind_the_prefix(name: str) -> None:
    model = ZOO[name]().eval()
    batch = inputs(model)
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    given = batch | {"position_ids": places.contiguous()}
    torch.manual_seed(0)
    by_itself = peftc.compile(model, "apply prefix(length=5) to attn").eval()
    told = peftc.compile(model, "apply prefix(length=5) to attn", example=given).eval()
    told.load_state_dict(by_itself.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(told(**given).logits, by_itself(**batch).logits, rtol=1e-5, atol=1e-6)


# ---- Several at one attention ----------------------------------------------------------------------------------------

SHORT, COPIES = "apply prefix(length=3) to attn", "apply mixture(prefix(length=4), n=2, consistency=0) to attn"


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("lines", [(SHORT, COPIES), (COPIES, SHORT)], ids=["short first", "copies first"])
@pytest.mark.parametrize("name", ["vit", "llama", "bert", "bloom"])
def test_two_prefixes_are_one_with_the_later_in_front(name: str, lines: tuple[str, str], fuse: bool) -> None:
    """Under one softmax, at the positions of one, whether the attention is one operation or spelt out."""
    model = without_dropout(ZOO[name]())
    two = peftc.compile(model, "\n".join(lines), fuse=fuse).eval()
    one = peftc.compile(model, "apply prefix(length=7) to attn", fuse=fuse).eval()
    state, whole = two.trainable_parameters(), one.trainable_parameters()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in state.values():
            tensor.normal_()
        for path, tensor in whole.items():
            copies = state[path.replace(".prefix.", ".mixture_prefix.method.")].mean(0)
            rows = [state[path], copies] if lines[0] == COPIES else [copies, state[path]]
            tensor.copy_(torch.cat(rows))
        batch = inputs(model, batch=3)
        if "attention_mask" in batch:
            batch["attention_mask"][0, :2] = 0
        torch.testing.assert_close(two(**batch).logits[1:], one(**batch).logits[1:])


def test_what_is_attended_apart_or_gated_reads_no_prefix_of_another_statement() -> None:
    """In whatever order the file has them; Bloom's attention is spelt out."""
    model = without_dropout(ZOO["bloom"]())
    lines = [SHORT, "apply gated(prefix(length=2)) to attn", "apply llama_adapter(length=5) to attn"]
    results = []
    for order in (lines, lines[::-1]):
        compiled = peftc.compile(model, "\n".join(order))
        with torch.no_grad():
            for path, tensor in sorted(compiled.trainable_parameters().items()):
                tensor.copy_(torch.linspace(-1, 1, tensor.numel()).cos().roll(len(path)).reshape(tensor.shape))
            results.append(compiled(**inputs(model)).logits)
    torch.testing.assert_close(*results)


def test_prefixes_that_leave_no_position_together_and_two_gates_are_refused() -> None:
    model = ZOO["gpt2"]()
    long = "apply prefix(length=40) to attn\napply mixture(prefix(length=30), consistency=0) to attn"
    with pytest.raises(peftc.PeftcError, match="70 of the model's 64 positions are taken"):
        peftc.plan(model, long)
    gates = "apply gated(prefix) to attn\napply gated(mixture(prefix, consistency=0)) to attn"
    with pytest.raises(peftc.PeftcError, match="keys of two gates would share one softmax"):
        peftc.plan(model, gates)
