"""What a notebook shows of a plan, a report and a compiled model."""

from __future__ import annotations

import re
from base64 import b64decode
from xml.etree import ElementTree

import pytest
import torch

import peftc
from peftc.show import notebook
from tiny import Stack, example

SVG = "{http://www.w3.org/2000/svg}"
SPEC = "apply lora(r=2) to mlp.* where in_features < 1000 & linear # <b>\n"


def _parsed(text: str) -> ElementTree.Element:
    """Well-formed as XML too, but for images, which HTML does not close."""
    closed = re.sub("<img ([^>]*)>", r"<img \1/>", text)
    return ElementTree.fromstring(f"<div>{closed}</div>")


def test_a_plan_is_its_table_and_the_block_with_the_lines_that_reach_it() -> None:
    """The block as it was captured: once, for the plan."""
    plan = peftc.plan(Stack(), f"# a line before\n{SPEC}", example=example(Stack()))
    found = _parsed(plan._repr_html_())
    (image,) = found.iter("img")
    (summary,) = found.iter("summary")
    assert summary.text == image.attrib["alt"] == "picture of blocks.0, the first block that the spec touches"
    tree = ElementTree.fromstring(b64decode(image.attrib["src"].partition(",")[2]))
    marked = {
        "".join(text.itertext()): [badge for badge in group if "badge" in badge.attrib.get("class", "")]
        for group in tree.iter(f"{SVG}g")
        if group.attrib.get("class", "").startswith("node operation")
        for text in group.findall(f"{SVG}text")
    }
    assert {name: len(badges) for name, badges in marked.items()} == {
        "linear up.weight": 1, "gelu": 0, "linear down.weight": 1, "add": 0,
    }  # fmt: skip
    assert {"".join(badge.itertext()) for badges in marked.values() for badge in badges} == {"2"}
    assert plan._repr_html_() == plan._repr_html_()
    cells = [cell.text for cell in found.iter("td")]
    assert cells[0] == "apply lora(r=2) to mlp.* where in_features < 1000 & linear"
    assert cells[-2:] == cells[2:4]  # one statement is all


def test_a_compiled_model_is_its_report_and_an_image_of_the_block_that_the_spec_touches() -> None:
    model = peftc.compile(Stack(), SPEC, example=example(Stack()))
    before, state = dict(model.__dict__), torch.get_rng_state()
    report, text = model.report(), model._repr_html_()
    assert isinstance(report, str)
    assert text.startswith(report._repr_html_())
    found = _parsed(text)
    (image,) = found.iter("img")
    tree = ElementTree.fromstring(b64decode(image.attrib["src"].partition(",")[2]))
    assert sum("lora" in (element.text or "") for element in tree.iter("{http://www.w3.org/2000/svg}text")) > 0
    assert model.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peftc.compile(Stack(), SPEC, example=example(Stack()))
    first = model._repr_html_()
    monkeypatch.setattr(notebook, "render_show", None)
    assert model._repr_html_() == first
