"""`peftc show` runs the passes as far as the one that it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from torch import nn

import peftc
from golden import check
from paths import GOLDEN
from peftc import api
from peftc.cli import main
from peftc.driver import passes
from peftc.driver.passes import PASSES, up_to
from peftc.driver.pipeline import Graphs
from peftc.graph.printing import as_text
from peftc.optimise.fuse import fuse
from peftc.show.formats import Format, render_show
from tiny import Stack, example

SPEC = "apply lora(r=2) to mlp.*\n"
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each time that fusions are looked for in the model's graph."""
    found: list[object] = []

    def counted(*given: Any) -> Any:
        found.append(given)
        return fuse(*given)

    monkeypatch.setattr(passes, "fuse", counted)
    return found


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Show:
    """(status, stdout, stderr) of `peftc show` with some options, on a stack of one block."""
    (tmp_path / "factory.py").write_text(
        "from tiny import Stack, example\n\n\ndef make():\n    model = Stack()\n    return model, example(model)\n"
    )
    (tmp_path / "lora.peft").write_text(SPEC)

    def show(*options: str) -> tuple[int, str, str]:
        status = main(["show", str(tmp_path / "lora.peft"), f"{tmp_path / 'factory.py'}:make", *options])
        told = capsys.readouterr()
        return status, told.out, told.err

    return show


@cache
def compiled() -> peftc.CompiledModule:
    return peftc.compile(Stack(), SPEC, example=example(Stack()))


def graphs(steps: Sequence[passes.Pass] = PASSES) -> Graphs:
    model: nn.Module = Stack()
    return api.graphs(model, SPEC, steps, example=example(model))


@pytest.mark.parametrize("format", ["dot", "mermaid"])
def test_passes_behind_the_one_asked_for_do_not_run(show: Show, fused: list[object], format: str) -> None:
    status, out, _ = show("--after", "weight methods", f"--{format}", "-")
    assert (status, "lora" in out, fused) == (0, True, [])


def test_as_text_too(show: Show, fused: list[object]) -> None:
    status, out, _ = show("--after", "weight methods")
    assert (status, "lora" in out, fused) == (0, True, [])
    assert show("--after", "weight methods", "--detail")[1] != show("--detail")[1]
    assert len(fused) == 1


def test_a_page_has_every_pass(show: Show, fused: list[object]) -> None:
    status, out, _ = show("--after", "weight methods", "--html", "-")
    assert status == 0
    assert all(f'data-name="{step.name}"' in out for step in PASSES)
    assert len(fused) == 1


def test_what_is_captured_needs_no_pass(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "materialise", None)
    status, out, _ = show("--after", "capture")
    assert (status, "lora" in out, "linear" in out) == (0, False, True)


def test_an_image_is_of_the_first_block_that_the_spec_touches(show: Show, tmp_path: Path) -> None:
    (tmp_path / "lora.peft").write_text("apply lora(r=2) to mlp.* in layers[1:]\n")
    (tmp_path / "factory.py").write_text("from zoo import ZOO\n\n\ndef make():\n    return ZOO['llama']()\n")
    status, out, _ = show("--image", str(tmp_path / "block.svg"), "--after", "weight methods")
    assert (status, out) == (0, f"written to {tmp_path / 'block.svg'}\n")
    title = ElementTree.parse(tmp_path / "block.svg").getroot()[0]
    assert title.text == "LlamaForCausalLM model.layers.1 after weight methods"


def test_another_kind_of_image_is_refused_before_the_model_is_read(
    show: Show, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setattr(api, "load_and_plan", None)
    status, out, err = show("--image", "block.png")
    assert (status, out) == (1, "")
    check(GOLDEN / "show" / "not-an-image.err", err, pytestconfig)


@pytest.mark.parametrize("options", [[], ["--html", "-"], ["--dot", "-"]])
def test_an_unknown_pass_is_refused_before_the_model_is_read(
    show: Show, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, options: list[str]
) -> None:
    monkeypatch.setattr(api, "load_and_plan", None)
    status, out, err = show("--after", "tidi", *options)
    assert (status, out) == (1, "")
    check(GOLDEN / "show" / "unknown-pass.err", err, pytestconfig)


@pytest.mark.parametrize("name", ["capture", *(step.name for step in PASSES)])
def test_graphs_are_those_of_a_compiled_model(name: str) -> None:
    """The same after each pass, and the same text, as far as the passes ran."""
    whole, part = compiled(), graphs(up_to(name))
    assert [*part.history] == [*whole.history][: len(part.history)]
    assert [*part.history][-1] == name
    assert all(as_text(graph) == as_text(whole.history[step]) for step, graph in part.history.items())
    formats: tuple[Format, ...] = ("text", "dot", "mermaid")
    for format in formats:
        assert render_show(part, format=format) == render_show(whole, after=name, format=format)


def test_all_passes_make_the_same_page() -> None:
    assert render_show(graphs(), format="html") == render_show(compiled(), format="html")
