"""The house: a folder of peftc/ is a stage, and imports what stands before it in LAYERS and nothing behind it.

Every import counts: at the top, for type checkers, inside a function. So a circle cannot hide behind TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import ROOT

LAYERS = [
    "diagnostics", "kernels", "language", "graph", "protocol", "spec", "capture", "roles", "planning", "rewrite",
    "optimise", "runtime", "files", "show", "driver", "distributed", "api", "training", "bench", "cli", "__main__",
]  # fmt: skip
# What a file under passes/ may know.
PASSES = {"protocol", "graph", "kernels"}
# A folder of such a name would hide the function.
PUBLIC = {"compile", "plan", "sites", "check", "load", "load_peft"}
MOST_FILES, MOST_LINES = 12, 400
# Of kernels, fusions and methods there are as many as there are; each has a file.
LARGE = {"peftc/kernels", "peftc/kernels/gpu", "tests/methods", "passes/fusions", "passes/methods"}

SOURCES = sorted((ROOT / "peftc").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RULES = sorted((ROOT / "passes").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def relative(path: Path) -> Iterator[str]:
    """What a file imports by where it lies itself, with the dots: no name by which `imports` could know it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")


def layer(module: str) -> str:
    """The folder of peftc/ that a module is in, '' for any other."""
    return module.split(".")[1] if module.startswith("peftc.") else ""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_folder_has_its_place() -> None:
    found = {path.name for path in (ROOT / "peftc").iterdir() if path.is_dir() and path.name != "__pycache__"}
    found |= {path.stem for path in (ROOT / "peftc").glob("*.py") if path.stem != "__init__"}
    assert found == set(LAYERS)


def test_imports_run_down() -> None:
    found = []
    for path in SOURCES:
        own = path.relative_to(ROOT / "peftc").parts[0].removesuffix(".py")
        found += [
            f"{path.relative_to(ROOT)}:{line} ({own}) imports {module}, which stands above it"
            for line, module in imports(path)
            if own != "__init__" and layer(module) in LAYERS and LAYERS.index(layer(module)) > LAYERS.index(own)
        ]
    assert not found, "\n".join(found)


def test_no_circle() -> None:
    known = {module_name(path) for path in SOURCES}
    graph = {
        module_name(path): {module for _, module in imports(path) if module in known and module != "peftc"}
        for path in SOURCES
        if module_name(path) != "peftc"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_file_under_passes_knows_what_it_is_written_against(path: Path) -> None:
    """And of the others under passes/, the kinds of site: a method may be one for them."""
    assert {layer(module) for _, module in imports(path) if module.startswith("peftc.")} <= PASSES
    assert all(module.startswith("..sites.") for module in relative(path))


def test_who_imports_what_is_said_in_full() -> None:
    assert not [(path.name, module) for path in (*SOURCES, *TESTS) for module in relative(path)]


def test_passes_are_reached_through_the_registries_only() -> None:
    found = [
        (path.name, module) for path in SOURCES for _, module in imports(path) if module.startswith("peftc.passes")
    ]
    assert not found


def test_no_folder_hides_a_public_function() -> None:
    assert not PUBLIC & set(LAYERS)


def test_a_folder_can_be_read_at_a_glance() -> None:
    folders = {path.parent for path in (*SOURCES, *TESTS, *RULES)}
    counts = {
        str(folder.relative_to(ROOT)): len({*folder.glob("*.py")} - {folder / "__init__.py"}) for folder in folders
    }
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES and folder not in LARGE}


def test_a_file_is_about_one_thing() -> None:
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*SOURCES, *TESTS, *RULES)}
    assert not {path: count for path, count in counts.items() if count > MOST_LINES}
