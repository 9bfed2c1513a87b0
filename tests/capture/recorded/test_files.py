"""No file runs, changes or breaks anything, whatever it says and whatever became of its folder."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peftc.capture.capture import Captured, capture
from peftc.capture.inputs import example_inputs
from peftc.capture.recorded.disk import LEFT, VARIABLE, Record, digest_of
from peftc.capture.recorded.errors import NotRecordedError
from peftc.capture.recorded.results import spec_as_text, spec_of_text


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    return tmp_path / "graphs"


def captured(model: nn.Module) -> Captured:
    return capture(model, example_inputs(model))


# ---- The folder ----------------------------------------------------------------------------------------------------


def test_without_a_home_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def home(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")  # as of a user that has no name

    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    captured(llama())


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graphs").write_text("mine")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    captured(llama())
    assert (tmp_path / "graphs").read_text() == "mine"


def test_a_folder_that_may_not_be_looked_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)
    model = llama()
    example = example_inputs(model)
    assert Record.of(model, example).read(example) is None


def test_a_folder_that_may_only_be_read_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    captured(llama())
    monkeypatch.setattr(os, "utime", closed)
    own = torch.export.export

    def export(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(model, PreTrainedModel), "it is captured again"
        return own(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    captured(llama())


def test_what_a_process_that_was_killed_left_goes(folder: Path) -> None:
    folder.mkdir()
    left, now = folder / "left.part", folder / "now.part"
    for one in (left, now):
        one.touch()
    os.utime(left, (time.time() - 2 * LEFT,) * 2)
    captured(llama())
    assert now.exists()
    assert not left.exists()


# ---- The file ------------------------------------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[Any, dict[str, torch.Tensor]], None], *, whole: bool = True) -> None:
    with safe_open(file, "pt") as opened:
        digest, _, text = opened.metadata()["graph"].partition(" ")
        constants = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    told = json.loads(text)
    change(told, constants)
    text = json.dumps(told)
    digest = digest_of(text, constants) if whole else digest
    save_file(constants, file, metadata={"graph": f"{digest} {text}"})


def read_again(file: Path) -> Any:
    model = llama()
    example = example_inputs(model)
    record = Record.of(model, example)
    assert record.file == file
    return record.read(example)


def test_a_name_in_a_file_does_not_get_into_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fx` writes the name of what a graph reads into the code that it makes of it."""
    name = 'a", print("run")) or getattr(self, "a'

    def change(told: Any, constants: dict[str, torch.Tensor]) -> None:
        constants[name] = torch.ones(1)
        place = next(place for place, node in enumerate(told["nodes"]) if node[0] == "get_attr")
        read = ["get_attr", "a", name, {"tuple": []}, {"dict": []}, ["torch.float32", "cpu", [1], [1]], [], ""]
        told["nodes"].insert(place, read)
        for node in told["nodes"][place + 1 :]:
            node[3:5] = shifted(node[3:5], place)

    captured(llama())
    (file,) = folder.iterdir()
    rewritten(file, change)
    assert read_again(file) is None
    assert "run" not in capsys.readouterr().out


def shifted(given: Any, place: int) -> Any:
    if isinstance(given, dict) and "node" in given:
        return {"node": given["node"] + (given["node"] >= place)}
    if isinstance(given, dict):
        return {name: shifted(one, place) for name, one in given.items()}
    return [shifted(one, place) for one in given] if isinstance(given, list) else given


def test_a_number_that_is_another_one_is_seen(folder: Path) -> None:
    def change(told: Any, _constants: Any) -> None:
        node = next(node for node in told["nodes"] if node[2] == "aten.add.Tensor" and "float" in str(node[3]))
        node[3] = json.loads(json.dumps(node[3]).replace("0x", "0x1"))

    captured(llama())
    (file,) = folder.iterdir()
    rewritten(file, change, whole=False)
    assert read_again(file) is None


@pytest.mark.parametrize("op", ["call_method", "call_module", "anything"])
def test_a_node_of_another_kind_is_none(op: str, folder: Path) -> None:
    def change(told: Any, _constants: Any) -> None:
        next(node for node in told["nodes"] if node[0] == "call_function")[0] = op

    captured(llama())
    (file,) = folder.iterdir()
    rewritten(file, change)
    assert read_again(file) is None


def test_what_is_returned_imports_nothing() -> None:
    spec = pytree.tree_structure({"a": [1, (2, None)]})
    assert spec_of_text(spec_as_text(spec)) == spec
    key = {"__enum__": True, "fqn": "antigravity:x", "name": "x"}
    made = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    for kind, context in (("builtins.dict", json.dumps([key])), ("collections.defaultdict", made)):
        with pytest.raises(NotRecordedError):
            spec_of_text(json.dumps([1, {"type": kind, "context": context, "children_spec": []}]))


def test_what_an_unfit_file_asked_of_sizes_is_no_question_of_the_models(folder: Path) -> None:
    """A model of fake tensors is captured in their own mode, which a file was read in before."""

    def faked() -> PreTrainedModel:
        with FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True):
            return llama()

    def change(told: Any, _constants: Any) -> None:
        told["nodes"][-2][5] = ["torch.float32", "cpu", [7], [1]]

    first = captured(faked())
    (file,) = folder.iterdir()
    rewritten(file, change)
    again = captured(faked())
    asked, asked_again = ({(str(q.holds), q.where) for q in one.assumptions.questions if q.of_model}
                          for one in (first, again))  # fmt: skip
    assert asked == asked_again
