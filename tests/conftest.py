"""Options of the whole test run."""

import os

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("claims", "subjects")

# Other processes may take the machine meanwhile: how long an example took says nothing. In CI a commit has the same
# examples each time: looking for new ones is for the runs before.
settings.register_profile("unhurried", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected outputs anew")


@pytest.fixture
def one_capture_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a model a second time starts from what was captured the first time."""
    from captures import captured_once
    from peftc import pipeline

    monkeypatch.setattr(pipeline, "capture", captured_once)
