"""mkdocs' side of `generated.py` and `drawing.py`: what is made among the pages, and in the navigation."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

import drawing
import generated


def on_config(config: Any) -> Any:
    """Every method has a page below the table of all."""
    (methods,) = (part["Methods"] for part in config.nav if isinstance(part, dict) and "Methods" in part)
    made = sorted(path for path in generated.pages() if path.startswith("methods/"))
    methods.append({"Each": made})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, and a drawing to each method that has one."""
    drawn = drawing.drawings()
    for path, text in generated.pages().items():
        if (name := path.removeprefix("methods/").removesuffix(".md")) in drawn:
            text += generated.framed(name)
            files.append(File.generated(config, f"methods/{name}-block.html", content=drawn[name]))
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts in what is made."""
    return generated.filled(markdown)
