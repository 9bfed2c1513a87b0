"""Compiling leaves nothing on the base model: its modules hold what they held, and it computes what it computed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

import peftc
from marks import first_is_quick
from tiny import Tagger, example
from zoo import GROUPED, SIZES, ZOO, inputs

pytestmark = pytest.mark.captures

LORA = "apply lora(r=2) to linear except expert\n"


def longrope(kind: Any = hf.Phi3ForCausalLM) -> Callable[[], PreTrainedModel]:
    """Keeps the frequencies for long inputs on its rotary module, and writes those that it takes over a buffer."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        rope = {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "factor": 4.0, "original_max_position_embeddings": 10,
        }  # fmt: skip
        lengths = {"max_position_embeddings": 40, "original_max_position_embeddings": 10}
        settings: dict[str, Any] = {
            **GROUPED,
            **lengths,
            "num_hidden_layers": 1,
            "head_dim": 8,
            "rope_parameters": rope,
        }
        model: PreTrainedModel = kind(hf.Phi3Config(**settings))
        return model

    return build


def beit() -> PreTrainedModel:
    """Remembers in an `lru_cache` what each size of image makes of its positions."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
        "patch_size": 8, "num_labels": 3, "use_relative_position_bias": True, "drop_path_rate": 0.0,
    }  # fmt: skip
    return hf.BeitForImageClassification(hf.BeitConfig(**settings))


def conformer() -> PreTrainedModel:
    """Caches rotary embeddings of the longest input so far."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **SIZES, "intermediate_size": 48, "feature_projection_input_dim": 12, "position_embeddings_type": "rotary",
        "layerdrop": 0.0, "apply_spec_augment": False,
    }  # fmt: skip
    return hf.Wav2Vec2BertModel(hf.Wav2Vec2BertConfig(**settings))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "longrope": longrope(),
    "longrope_classifier": longrope(hf.Phi3ForSequenceClassification),
    "beit": beit,
    "conformer": conformer,
    **ZOO,
}


def given(model: PreTrainedModel, length: int) -> dict[str, Tensor]:
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, length, 12, generator=torch.Generator().manual_seed(length))}
    return inputs(model, length=length)


def held(model: nn.Module) -> dict[str, Any]:
    """What each module has in each attribute, and in the containers and the config among these: the objects."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, thing in vars(module).items():
            found[f"{path}.{name}"] = thing
            inner = vars(thing) if isinstance(thing, hf.PreTrainedConfig | SimpleNamespace) else thing
            if isinstance(inner, dict):
                found |= {f"{path}.{name}[{key!r}]": item for key, item in inner.items()}
            if isinstance(inner, list | set | tuple):
                found |= {f"{path}.{name}[{place}]": item for place, item in enumerate(inner)}
    return found


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert not now.keys() ^ before.keys()
    assert [name for name, thing in before.items() if now[name] is not thing] == []


def fakes(model: nn.Module) -> list[Any]:
    """The fake tensors that the garbage collector sees from `model`, past the code of libraries."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, FunctionType):
            waiting += thing.__closure__ or ()
        elif not isinstance(thing, type) or thing.__module__.startswith(("transformers.models", __name__)):
            waiting += gc.get_referents(thing)
    return [thing for thing in seen.values() if isinstance(thing, FakeTensor)]


def result(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    tensor: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return tensor


@pytest.mark.parametrize("name", first_is_quick(list(MODELS)))
def test_the_base_is_as_it_was(name: str) -> None:
    """Where it has not run, and where it has and keeps what it made of a long input."""
    base = MODELS[name]().eval()
    short, long = given(base, 7), given(base, 14)
    shown = short if name == "conformer" else None
    twin = copy.deepcopy(base)
    for compile_it in (peftc.plan, peftc.compile):
        before, numbers = held(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
        compiled: Any = compile_it(base, LORA, example=shown)
        assert_same(held(base), before)
        assert fakes(base) == []
        assert all(torch.equal(tensor, numbers[name]) for name, tensor in base.state_dict().items())
        for batch in (long, short, long):
            assert torch.equal(result(base, batch), result(twin, batch))
    compiled.eval()
    for batch in (short,) if shown else (short, long):  # which of its dimensions is a length is not known of an example
        torch.testing.assert_close(result(compiled, batch), result(twin, batch), rtol=0, atol=1e-5)


class State:
    """Kept by a model, and no module."""

    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0
        self.last: Any = None


REMEMBERED: dict[str, Tensor] = {}


@lru_cache
def steps(length: int) -> Tensor:
    return torch.arange(length)


class Keeper(nn.Module):
    """Writes wherever a module can."""

    total: Tensor
    closed: Callable[[Tensor], None]
    of_all: ClassVar[dict[str, Any]] = {}
    latest: ClassVar[Any] = None

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.inner, self.fails = nn.Linear(4, 4), fails
        self.calls, self.state, self.space = 0, State(), SimpleNamespace(last=None)
        self.last: Any = None
        self.log: list[Any] = []
        self.by_length: dict[int, list[Any]] = {}
        self.kinds = {"none"}
        self.pair: tuple[list[Any], str] = ([], "")
        self.inner.__dict__["log"] = self.log
        self.count = torch.zeros(4)
        self.register_buffer("total", torch.zeros(4))
        self.totals = [self.total]
        self.closed = counter()
        self.config = hf.LlamaConfig()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + self.count + self.total
        self.calls += 1
        self.last = self.state.last = self.space.last = type(self).latest = y
        self.state.count += 1
        self.log.append(y)
        self.by_length.setdefault(x.shape[1], []).append(y)
        self.of_all["y"] = REMEMBERED["y"] = y
        self.kinds.add("some")
        self.pair[0].append(y)
        self.count += 1
        self.total.add_(1)
        self.totals[0].add_(1)
        self.closed(y)
        steps(x.shape[1])
        self.config.use_cache = not self.config.use_cache
        self.inner.register_forward_hook(lambda *_: None)
        self.inner.weight.requires_grad_(False)
        self.register_buffer("late", y.detach())
        self.add_module("later", nn.Linear(2, 2))
        self.inner.eval()
        if self.fails:
            raise ValueError("it fails")
        return y


def counter() -> Callable[[Tensor], None]:
    count, seen = 0, []

    def note(y: Tensor) -> None:
        nonlocal count
        count += 1
        seen.append(y)

    return note


def insides(model: Keeper) -> dict[str, Any]:
    """The state of a `Keeper` that `held` does not see."""
    cells = cast(Any, model.closed).__closure__
    shared = {"latest": Keeper.latest, "of_all": dict(Keeper.of_all), "global": dict(REMEMBERED)}
    cached = {"steps": steps.cache_info().currsize, "closed": [str(cell.cell_contents) for cell in cells]}
    own = {"state": (model.state.count, model.state.last), "pair": str(model.pair), "lengths": str(model.by_length)}
    return own | shared | cached | {"count": model.count.tolist(), "total": model.total.tolist()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_that_a_forward_writes_stays(fails: bool) -> None:
    model = Keeper(fails=fails)
    before, inside = held(model), insides(model)
    with pytest.raises(peftc.PeftcError, match="it fails") if fails else nullcontext():
        peftc.sites(model, example=torch.randn(2, 4))
    assert_same(held(model), before)
    assert insides(model) == inside
    assert fakes(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_hook_keeps_is_what_it_kept() -> None:
    """The list is the user's, and the hook is a part of the model."""
    model, seen = Tagger(), []
    model.head.register_forward_hook(lambda _module, _given, y: seen.append(y))
    peftc.sites(model, example=example(model))
    assert seen == []
    model(**example(model))
    assert len(seen) == 1


def test_random_numbers_are_left() -> None:
    model, before = Tagger(), torch.get_rng_state()
    peftc.plan(model, "train bias\n", example=example(model))
    assert torch.equal(torch.get_rng_state(), before)
