"""Expected outputs kept in files; `pytest --update-golden` writes them anew, for review in the diff."""

from pathlib import Path

import pytest


def check(path: Path, actual: str, config: pytest.Config) -> None:
    """Compare a text with the golden file, or write the file when asked to."""
    if config.getoption("update_golden"):
        path.write_bytes(actual.encode())
        return
    if not path.exists():
        pytest.fail(f"{path} is missing; pytest --update-golden writes it")
    assert actual == path.read_bytes().decode()
