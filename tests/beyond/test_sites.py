"""`peftc sites` on models of other libraries: roles where the data flows so, names where it does not."""

import re
from collections.abc import Callable
from typing import Any

import pytest

import peftc
from foreign import FACTORIES, PACKAGES
from golden import check
from paths import GOLDEN, ROOT

HERE = ROOT / "tests/support/beyond/foreign.py"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of one layer stands in one line."""
    monkeypatch.setenv("COLUMNS", "240")


def without_lines(text: str) -> str:
    """A library's line numbers, and the width of a table with them, are its own."""
    text = re.sub(r" *\(?\w+\.py:\d+\)?", "", text)
    return re.sub(r"([━─ ])\1+", r"\1", text)


@pytest.mark.parametrize("name", FACTORIES)
def test_sites(name: str, run: Callable[..., Any], pytestconfig: pytest.Config) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    status, said, problems = run("sites", f"{HERE}:{name}")
    assert (status, problems) == (0, "")
    check(GOLDEN / "beyond" / f"{name}.txt", without_lines(said), pytestconfig)


def roles(name: str) -> dict[str, set[str]]:
    model, example = FACTORIES[name]()
    return {site.name: set(site.roles) for site in peftc.sites(model, example=example)}


def test_rows_of_one_weight_are_queries_and_keys_though_each_is_multiplied_by_alone() -> None:
    found = roles("translator")
    weight = "transformer.decoder.layers.1.multihead_attn.in_proj_weight"
    assert found[weight] == {"linear"}
    assert [found[f"{weight}[{letter}]"] for letter in "qkv"] == [
        {f"attn.{letter}", f"cross.attn.{letter}"} for letter in "qkv"
    ]
    assert found["transformer.decoder.layers.1.multihead_attn.in_proj_bias"] == {"bias"}


def test_what_an_attention_returns_of_its_weights_makes_no_head_of_its_queries() -> None:
    found = roles("reader")
    assert [name for name, own in found.items() if "head" in own] == ["head"]
