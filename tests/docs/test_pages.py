"""The documentation is run: the blocks of a page in their order, in a folder and a namespace of its own.

What stands in HTML comments right before a block says what is done with it:

    file: NAME       it is written there, for the blocks behind it
    not run: REASON  it is not run, for that reason
    output           it is what the block before it prints
    error: CODE      of a spec: it has that mistake
    status: 1        of a command: it ends so

Else Python and commands of peftc run, and specs have no errors. `smollm2_dir` is a tiny model's folder meanwhile.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import generated
import peftc
from paths import ROOT
from peftc.cli import COMMANDS, main
from smallest import folder_of_a_tiny_chat_model

PAGES = ROOT / "docs" / "pages"
BLOCK = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- ([a-z ]+)(?:: (.*))? -->")
MARKS = {"file", "not run", "output", "error", "status"}


@dataclass(frozen=True)
class Fenced:
    """A block, and what is said of it."""

    marks: dict[str, str]
    language: str
    text: str


def blocks(text: str) -> list[Fenced]:
    return [Fenced(dict(MARK.findall(marks)), language, block) for marks, language, block in BLOCK.findall(text)]


def written() -> Iterator[tuple[str, str]]:
    """The pages that somebody wrote, and those that are made."""
    for path in sorted(PAGES.rglob("*.md")):
        yield path.relative_to(PAGES).as_posix(), generated.filled(path.read_text())
    yield from generated.pages().items()


TEXTS = dict(written())
RUN = {
    name for name, text in TEXTS.items()
    if any(block.language in ("python", "sh") and not {"not run", "file"} & {*block.marks} for block in blocks(text))
} - {"extending.md", "index.md"}  # tests/test_extending.py and tests/test_readme.py run these  # fmt: skip

LONG = {"cookbook.md", "first.md"}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_done_with_a_block_is_known(name: str) -> None:
    assert TEXTS[name].count("```") == 2 * len(blocks(TEXTS[name])), "a block begins and ends at the margin"
    for block in blocks(TEXTS[name]):
        assert block.language in {"python", "sh", "peft", "text", "json"} or name == "index.md", block.text
        assert {*block.marks} <= MARKS or name == "index.md", block.marks
        assert all(block.marks.get(mark, "said") for mark in ("not run", "file", "error"))


def test_specs_have_no_errors() -> None:
    specs = [(name, block) for name, text in TEXTS.items() for block in blocks(text) if block.language == "peft"]
    for name, block in specs:
        codes = {diagnostic.code for diagnostic in peftc.check(block.text)}
        assert codes == {*filter(None, [block.marks.get("error")])}, f"{name}: {block.text}"


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # a Trainer's, where there is no GPU
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(RUN)], ids=str
)
def test_what_a_page_shows_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import models

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "smollm2_dir", lambda: folder_of_a_tiny_chat_model(tmp_path / "tiny"))
    torch.manual_seed(0)
    said = ""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(TEXTS[name]):
        if "not run" in block.marks:
            continue
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        elif "output" in block.marks:
            assert [line.rstrip() for line in said.splitlines()] == block.text.splitlines()
        elif block.language == "python":
            exec(compile(block.text, name, "exec"), namespace)
            said = capsys.readouterr().out
        elif block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "peftc", line
                status = main(arguments)
                out, err = capsys.readouterr()
                said = out + err
                assert status == int(block.marks.get("status", 0)), said


def test_links_lead_somewhere() -> None:
    """mkdocs looks at those among the pages; these are the README's, and those into the rest of the repository."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", (ROOT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists() and link.removeprefix("docs/pages/") not in TEXTS]


def test_every_command_is_in_the_table() -> None:
    assert {*re.findall(r"^\| `peftc (\w+)", TEXTS["commands.md"], re.MULTILINE)} == {*COMMANDS}


@pytest.mark.slow
def test_counts_are_what_the_methods_train() -> None:
    import counting

    assert generated.COUNTS.read_text() == counting.written(), "python docs/counting.py writes them anew"
