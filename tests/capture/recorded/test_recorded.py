"""A graph that is read from disk is the one that was captured; of another model or other code it is captured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftc
from captures import described
from peftc.capture.capture import Captured, capture
from peftc.capture.inputs import example_inputs
from peftc.capture.recorded.disk import VARIABLE, digest_of
from peftc.capture.recorded.errors import NotRecordedError
from peftc.capture.recorded.expressions import as_lists, from_lists
from peftc.capture.recorded.key import key_of
from peftc.graph.ir import tensors
from zoo import ZOO

QUICK = ("llama", "bert", "mixtral")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    return tmp_path / "graphs"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are exported, without the graphs of inputs alone."""
    found: list[nn.Module] = []
    own = torch.export.export

    def export(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, PreTrainedModel):
            found.append(model)
        return own(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    return found


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return LlamaForCausalLM(config)


def captured(model: nn.Module) -> Captured:
    return capture(model, example_inputs(model))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZOO])
def test_what_is_read_is_what_was_captured(name: str, folder: Path, exports: list[nn.Module]) -> None:
    model = ZOO[name]()
    first = captured(model)
    assert len([*folder.glob("*.safetensors")]) == 1
    many = len(exports)
    again = captured(ZOO[name]())
    assert len(exports) == many
    for one, other in zip(described(first, tensors(model)), described(again, tensors(again.model)), strict=True):
        assert one == other
    assert again.assumptions.inputs.keys() == first.assumptions.inputs.keys()
    assert [(str(q.holds), q.where) for q in again.assumptions.questions] == [
        (str(q.holds), q.where) for q in first.assumptions.questions
    ]


def test_a_model_compiled_from_a_record_is_the_same_model(folder: Path) -> None:
    spec = "apply lora(r=4) to attn.*, mlp.*"
    batch = {"input_ids": torch.arange(22).reshape(2, 11), "labels": torch.arange(22).reshape(2, 11)}
    results: list[tuple[Tensor, list[Tensor]]] = []
    for _ in range(2):
        torch.manual_seed(1)
        compiled = peftc.compile(small(), spec)
        loss = compiled(**batch).loss
        loss.backward()
        results.append((loss, [p.grad for p in compiled.trainable_parameters().values() if p.grad is not None]))
    assert len([*folder.iterdir()]) == 1
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_every_record_is_found_and_none_is_made_where_there_is_to_be_none(
    folder: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(small())
    captured(small())
    assert len(exports) == 1
    monkeypatch.setenv(VARIABLE, "")
    captured(small())
    assert len(exports) == 2
    assert len([*folder.iterdir()]) == 1


def other_rope(model: LlamaForCausalLM) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def other_config(model: LlamaForCausalLM) -> None:
    model.config.pretraining_tp = 2


def untied(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def frozen(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.requires_grad_(False)


def other_epsilon(model: LlamaForCausalLM) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


@pytest.mark.parametrize("change", [other_rope, other_config, untied, frozen, other_epsilon])
def test_a_model_that_differs_has_another_record(change: Callable[[LlamaForCausalLM], None]) -> None:
    model, other = small(), small()
    assert key_of(model, example_inputs(model)) == key_of(other, example_inputs(other))
    change(other)
    assert key_of(model, example_inputs(model)) != key_of(other, example_inputs(other))


def test_other_weights_do_not() -> None:
    model, other = small(), small()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    assert key_of(model, example_inputs(model)) == key_of(other, example_inputs(other))


class Own(nn.Linear):
    pass


def with_a_layer_of_anybodys(model: LlamaForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj = Own(32, 48, bias=False)


def with_a_hook(model: LlamaForCausalLM) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def with_a_forward_of_its_own(model: LlamaForCausalLM) -> None:
    norm = model.model.norm
    vars(norm)["forward"] = lambda x: x


@pytest.mark.parametrize("change", [with_a_layer_of_anybodys, with_a_hook, with_a_forward_of_its_own])
def test_of_code_that_is_not_known_there_is_no_record(change: Callable[[LlamaForCausalLM], None]) -> None:
    model = small()
    example = example_inputs(model)
    change(model)
    with pytest.raises(NotRecordedError):
        key_of(model, example)


def test_nor_of_a_library_that_somebody_changed_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model = small()
    example = example_inputs(model)

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    with pytest.raises(NotRecordedError, match="other code"):
        key_of(model, example)


def rewritten(file: Path, change: Callable[[Any], None]) -> None:
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["graph"].partition(" ")[2])
        constants = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(told)
    text = json.dumps(told)
    save_file(constants, file, metadata={"graph": f"{digest_of(text, constants)} {text}"})


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def another_operation(file: Path) -> None:
    def change(told: Any) -> None:
        next(node for node in told["nodes"] if node[0] == "call_function")[2] = "os.system"

    rewritten(file, change)


def another_size(file: Path) -> None:
    def change(told: Any) -> None:
        node = next(node for node in told["nodes"] if node[2] == "aten.embedding.default")
        node[5][2][0] = 77

    rewritten(file, change)


@pytest.mark.parametrize("damage", [cut_off, another_operation, another_size])
def test_a_damaged_record_is_written_anew(
    damage: Callable[[Path], None], folder: Path, exports: list[nn.Module]
) -> None:
    captured(small())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    damage(file)
    captured(small())
    assert len(exports) == 2
    assert file.read_bytes() == whole


def test_expressions_are_read_as_they_were_written() -> None:
    import sympy
    from torch.utils._sympy.functions import FloorDiv, Max, Mod

    a, b = (sympy.Symbol(name, integer=True, positive=True) for name in "ab")
    symbols = {a: 0, b: 1}
    for one in (a + 2 * b, FloorDiv(a, 3), Mod(a * b, 8), Max(a, b), sympy.Eq(a, b), sympy.And(a > 2, b < 5), a**2):
        assert from_lists(json.loads(json.dumps(as_lists(one, symbols))), [a, b]) == one
    with pytest.raises(NotRecordedError):
        as_lists(sympy.sin(a), symbols)
    with pytest.raises(NotRecordedError):
        from_lists(["Lambda", 1], [a, b])


def test_what_a_process_computes_in_is_of_the_key() -> None:
    model = small()
    example = example_inputs(model)
    plain = key_of(model, example)
    with torch.autocast("cpu", torch.bfloat16):
        assert key_of(model, example) != plain
    assert key_of(model, example) == plain
