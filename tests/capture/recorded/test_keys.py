"""A model that would be captured as another graph has another key or none, and the key is no reason to fail."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from peftc.capture.inputs import example_inputs
from peftc.capture.recorded import code
from peftc.capture.recorded.disk import VARIABLE, Record
from peftc.capture.recorded.errors import NotRecordedError
from peftc.capture.recorded.key import key_of
from zoo import ZOO

Change = Callable[[pytest.MonkeyPatch], None]


def llama() -> PreTrainedModel:
    model = ZOO["llama"]()
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    return tmp_path / "graphs"


# ---- The code ------------------------------------------------------------------------------------------------------


def wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
    """Of code that says it is the library's."""

    @functools.wraps(own)
    def called(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return called


def with_a_wrapped_function(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", wrapped(modeling_llama.apply_rotary_pos_emb))


def with_a_wrapped_forward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama.LlamaRMSNorm, "forward", wrapped(modeling_llama.LlamaRMSNorm.forward))


def with_a_partial(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", functools.partial(lambda scale, q, k, *_: (q, k), 2))


def with_a_property(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PreTrainedModel, "loss_function", property(lambda _self: None))


def with_other_attention_of_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "scaled_dot_product_attention", lambda q, *_args, **_kwargs: q)


def with_another_product(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "matmul", lambda a, b: a @ b)


def with_a_loss_of_its_own(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", lambda logits, *_args, **_kwargs: logits.sum())


def with_a_function_that_a_function_calls(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sdpa_attention, "repeat_kv", lambda states, _times: states)


REPLACED = [
    with_a_wrapped_function, with_a_wrapped_forward, with_a_partial, with_a_property, with_other_attention_of_torch,
    with_another_product, with_a_loss_of_its_own, with_a_function_that_a_function_calls,
]  # fmt: skip


@pytest.mark.parametrize("change", REPLACED)
def test_what_somebody_put_in_the_place_of_a_librarys_code_has_no_record(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    example = example_inputs(model)
    key_of(model, example)
    change(monkeypatch)
    with pytest.raises(NotRecordedError, match="other code"):
        key_of(model, example)


def with_another_loss_of_the_library(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", loss_utils.ForMaskedLMLoss)


def with_another_attention_of_the_library(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", modeling_llama.eager_attention_forward)


def with_a_forward_of_another_class(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama.LlamaRMSNorm, "forward", nn.Identity.forward)


def with_a_number_in_its_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "CHUNK", 5, raising=False)


def with_a_number_on_its_class(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama.LlamaRMSNorm, "chunk", 5, raising=False)


SWAPPED = [
    with_another_loss_of_the_library, with_another_attention_of_the_library, with_a_forward_of_another_class,
    with_a_number_in_its_file, with_a_number_on_its_class,
]  # fmt: skip


@pytest.mark.parametrize("change", SWAPPED)
def test_what_is_of_the_library_but_another_thing_is_of_the_key(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    example = example_inputs(model)
    before = key_of(model, example)
    with monkeypatch.context() as patch:
        change(patch)
        assert key_of(model, example) != before
    assert key_of(model, example) == before


def test_a_file_that_was_written_after_it_was_read_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(code, "READ", Path(modeling_llama.__file__).stat().st_mtime - 1)
    with pytest.raises(NotRecordedError, match="written after"):
        key_of(model, example_inputs(model))


# ---- The process ---------------------------------------------------------------------------------------------------


class Other(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def hooked() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("surrounded", [Other, hooked])
def test_what_surrounds_every_call_leaves_no_record(surrounded: Callable[[], Any]) -> None:
    model = llama()
    example = example_inputs(model)
    with surrounded(), pytest.raises(NotRecordedError):
        key_of(model, example)


# ---- The model -----------------------------------------------------------------------------------------------------


class OwnParameter(nn.Parameter):
    pass


class OwnDict(dict[str, int]):
    pass


def nested() -> list[Any]:
    inner: list[Any] = []
    for _ in range(5000):
        inner = [inner]
    return inner


def unfinished() -> Callable[[], Any]:
    """A function of torch's whose cell is empty."""

    def outer(held: int) -> Any:
        return lambda: held

    code_of_inner = outer(1).__code__
    return types.FunctionType(code_of_inner, {"__name__": "torch"}, "inner", None, (types.CellType(),))


ODD: dict[str, Callable[[], Any]] = {
    "a dict of anybody's": OwnDict,
    "a list in a list": nested,
    "a function that is not whole": unfinished,
    "a generator": lambda: iter([1]),
    "a method of a list": lambda: [].append,
    "a wrapped function": lambda: wrapped(modeling_llama.apply_rotary_pos_emb),
    "a parameter of anybody's": lambda: OwnParameter(torch.ones(3)),
}


@pytest.mark.parametrize("name", ODD)
def test_a_model_that_holds_something_odd_is_captured(name: str, folder: Path) -> None:
    model = llama()
    model.get_input_embeddings().odd = ODD[name]()
    example = example_inputs(model)
    with pytest.raises(NotRecordedError):
        key_of(model, example)
    assert Record.of(model, example).file is None


def test_complex_numbers_are_described() -> None:
    model = llama()
    example = example_inputs(model)
    keys = set()
    for number in (1j, 2j):
        model.get_input_embeddings().turn = torch.full((3,), number)
        keys.add(key_of(model, example))
    assert len(keys) == 2
