"""Rules of the house that a machine can hold: no architecture has a name, no pickle, no eval."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from paths import ROOT

SOURCES = sorted(path for folder in ("peftc", "passes", "grammar") for path in (ROOT / folder).rglob("*.py"))

# Module names of well-known models: whoever writes one into the compiler is making a table.
MODULE_NAMES = {
    "q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj", "c_fc", "query_key_value", "qkv_proj", "Wqkv",
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "self_attn", "SelfAttention", "lm_head",
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports at its top level, those for type checkers left out."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def constants(path: Path) -> Iterator[str]:
    """Every string in the code that is no docstring."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_architecture_has_a_name(path: Path) -> None:
    """But for words that people write in a spec, which are answered with what they are called here."""
    known = set(CONFIG_MAPPING) | (set() if path.name == "words.py" else MODULE_NAMES)
    assert not known & set(constants(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "__import__"}
    assert not {"pickle", "dill", "cloudpickle"} & set(imports(path))
    loads = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "torch.load" not in loads
