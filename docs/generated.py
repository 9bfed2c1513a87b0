"""What the pages have from the code: methods, storages, words of others, commands, recipes. Nothing of it is kept.

`MADE` has what stands in a page where it says `<!-- made: NAME -->`, `pages` the pages that are made as a whole.
"""

from __future__ import annotations

import inspect
import json
import re
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sweeping
from peftc.cli import COMMANDS, command
from peftc.language import words
from peftc.protocol.combinator import Combinator
from peftc.protocol.method import Method, kinds, methods
from peftc.protocol.params import Configured
from peftc.show.registry import parameterisations_markdown, storages_markdown

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "docs" / "counts.json"
MARK = re.compile(r"<!-- made: (\w+) -->")

# Where a method is counted: the places that LoRA's paper takes of linear layers, and all that there are of the rest.
PLACES = {"linear layers": "attn.q, attn.v", "where its method does": "attn, mlp", "the whole input": ""}


def statement(cls: type[Method]) -> str:
    """A statement with the method as it is by default."""
    written = kinds(cls)[0].written
    call = f"{cls.name}(adapter)" if issubclass(cls, Combinator) else cls.name
    place = PLACES.get(written, written)
    return f"apply {call} to {place}" if place else f"apply {call}"


def pages() -> dict[str, str]:
    """Path of each page that is made as a whole, and its text."""
    counts = json.loads(COUNTS.read_text())
    made = {f"methods/{name}.md": method_page(cls, counts) for name, cls in methods().items()}
    return made | {"index.md": index(), "extending.md": extending(), "together.md": together()}


def filled(text: str) -> str:
    """A page with what is made in its place."""
    return MARK.sub(lambda found: MADE[found[1]](), text)


# Methods


def method_page(cls: type[Method], counts: Mapping[str, Mapping[str, int]]) -> str:
    """All that a method says of itself, what it counts, and the recipes that have it."""
    merges = f"no: {cls.unmergeable}" if cls.unmergeable else "yes"
    facts = [("attaches to", _places(cls)), ("merges", merges), ("paper", _linked(cls.paper))]
    if peft_type := getattr(cls, "peft_type", None):
        facts.append(("in HF PEFT", f"`{peft_type}`"))
    lines = [
        f"# {cls.name}",
        f"```text\n{cls.formula}\n```",
        _docstring(cls),
        "\n".join(f"- **{name}** {value}" for name, value in facts if value),
    ]
    if cls.parameters:
        lines += ["## Parameters", parameters(cls)]
    if counted := counts.get(cls.name):
        cells = " | ".join(f"{number:,}".replace(",", " ") for number in counted.values())
        lines += [
            "## What trains",
            f"```peft\n{statement(cls)}\n```",
            f"| {' | '.join(counted)} |\n|{'---:|' * len(counted)}\n| {cells} |",
        ]
    if found := [path.stem for path in recipes() if re.search(rf"\b{cls.name}\b", _statements(path))]:
        links = ", ".join(f"[{name}](../recipes.md#{name})" for name in found)
        lines += ["## Recipes", links]
    return "\n\n".join(lines) + "\n"


def framed(name: str) -> str:
    """A block of a small Llama with the method, as a part of its page."""
    address = f"{name}-block.html"
    return (
        "\n## A block with it\n\nOf a Llama with one layer; *Compare* shows it beside the block as it was. "
        f"It opens [by itself]({address}), too.\n\n"
        f'<iframe class="block" src="{address}" title="a block with {name}" loading="lazy"></iframe>\n'
    )


def parameters(cls: type[Configured]) -> str:
    """A method's parameters as a table."""
    lines = ["| parameter | default | what it is | takes |", "|---|---|---|---|"]
    for item in cls.parameters.values():
        name = f"`{item.name}`" + (f", `{item.alias}`" if item.alias else "")
        default = "required" if item.required else "" if item.default is None else f"`{_value(item.default)}`"
        lines.append(f"| {name} | {default} | {_cell(item.doc)} | {_cell(item.expects)} |")
    return "\n".join(lines)


def methods_index() -> str:
    """The registry as a table, each method with its page."""
    lines = ["| method | formula | attaches to | merges | paper |", "|---|---|---|---|---|"]
    for name, cls in methods().items():
        merges = "no" if cls.unmergeable else "as its method" if issubclass(cls, Combinator) else "yes"
        cells = (f"[`{name}`]({name}.md)", _plain(_cell(cls.formula)), _places(cls), merges, _linked(cls.paper))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _places(cls: type[Method]) -> str:
    return " and ".join(kind.written for kind in kinds(cls))


# Words of others


def words_table(known: Mapping[str, words.Word]) -> str:
    """What others call something, and what a spec has for it."""
    lines = ["| there | here | |", "|---|---|---|"]
    for name, word in known.items():
        lines.append(f"| `{name}` | {f'`{word.here}`' if word.here else 'nothing'} | {_cell(word.why)} |")
    return "\n".join(lines)


# Commands


def commands() -> str:
    """What each command says of itself with --help."""
    made = []
    for name in COMMANDS:
        one = command(name)
        parser = ArgumentParser(
            prog=f"peftc {name}",
            description=one.help,
            formatter_class=partial(HelpFormatter, width=100),
            epilog=one.epilog,
        )
        one.add_to(parser)
        made.append(f"## {name}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(made)


# Recipes


def recipes() -> list[Path]:
    """The files of examples/recipes, by name."""
    return sorted((ROOT / "examples" / "recipes").glob("*.peft"))


def recipes_page() -> str:
    """Every recipe as it stands."""
    return "\n\n".join(f"## {path.stem}\n\n```peft\n{path.read_text().strip()}\n```" for path in recipes())


def _statements(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))


# The READMEs


def index() -> str:
    """The README, whose links are to other pages here."""
    text = (ROOT / "README.md").read_text().replace("](passes/README.md)", "](extending.md)")
    text = text.replace("](docs/pages/", "](")
    start, end = "<!-- methods: begin -->\n", "<!-- methods: end -->"
    return re.sub(rf"(?<={start}).*?(?={end})", lambda found: _with_pages(found[0]), text, flags=re.DOTALL)


def benchmarks() -> str:
    """The README's table of measured steps."""
    text = (ROOT / "README.md").read_text()
    return text.partition("<!-- benchmarks: begin -->\n")[2].partition("\n<!-- benchmarks: end -->")[0]


def _with_pages(table: str) -> str:
    return re.sub(r"`(\w+)`", r"[`\1`](methods/\1.md)", table)


# passes/README.md, whose examples tests/test_extending.py runs


def _passes() -> tuple[str, str]:
    text = (ROOT / "passes" / "README.md").read_text()
    before, pairs = text.split("## Which two go together\n")
    return before, pairs


def extending() -> str:
    """How to write a method, a storage, a fusion, a kind of site."""
    return _passes()[0].replace("# What is inserted\n", "# Write a method, a storage, a fusion\n", 1)


def together() -> str:
    """The table of pairs."""
    return "# Which two go together\n" + _passes()[1]


# Text


def _docstring(cls: type) -> str:
    return _plain(inspect.getdoc(cls) or "")


def _plain(text: str) -> str:
    """Matrices and shapes, [n, m], are no links."""
    return re.sub(r"(`[^`]*`)|\[", lambda found: found[1] or "&#91;", text)


def _linked(paper: str) -> str:
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"(?<![\w/])(openreview\.net/\S+)", r"[\1](https://\1)", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _value(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


MADE: dict[str, Callable[[], str]] = {
    "methods": methods_index,
    "benchmarks": benchmarks,
    "storages": storages_markdown,
    "parameterisations": parameterisations_markdown,
    "lora_config": lambda: words_table(words.LORA_CONFIG),
    "method_words": lambda: words_table(words.METHODS),
    "selector_words": lambda: words_table(words.SELECTORS),
    "other_words": lambda: words_table(words.OTHERS),
    "commands": commands,
    "recipes": recipes_page,
    "architectures": sweeping.tables,
}
