"""Options of the whole test run."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings

from peftc.protocol import params

pytest.register_assert_rewrite("byhooks", "claims", "fusioncases", "subjects")

# Other processes may take the machine meanwhile: how long an example took says nothing. In CI a commit has the same
# examples each time: looking for new ones is for the runs before.
settings.register_profile("unhurried", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected outputs anew")
    parser.addoption("--fuzz-cases", type=int, default=200, help="how many random specs tests/fuzz tries")


@pytest.fixture(autouse=True, scope="session")
def _captured_each_time() -> None:
    """No test sees what another, or an earlier run, captured."""
    os.environ["PEFTC_GRAPHS"] = ""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(status, stdout, stderr) of one command."""

    def command(*arguments: object) -> tuple[int, str, str]:
        from peftc.cli import main

        return (main([str(argument) for argument in arguments]), *capsys.readouterr())

    return command


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    """What a test registers is gone behind it: all that is registered is held against what it is made for."""
    before = {folder: {*known} for folder, known in params._registries.items()}
    yield
    for folder, known in params._registries.items():
        for name in known.keys() - before.get(folder, set()):
            if not known[name].__module__.startswith("peftc."):
                del known[name]


SHARE = 32


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the slow cases of one test all but every 32nd are `exhaustive`, too, where it is not `whole`.

    Which ones they are differs by file: another file takes other models. Of fewer cases one is left.
    """
    tables: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.get_closest_marker("slow"):
            tables.setdefault((item.path, item.originalname), []).append(item)
    for (path, _), cases in tables.items():
        step = 1 if cases[0].get_closest_marker("whole") else min(SHARE, len(cases))
        for place, item in enumerate(cases):
            if (place + crc32(path.name.encode())) % step:
                item.add_marker(pytest.mark.exhaustive)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what looks for leaks at the end finds none


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_looked_at_again() -> Iterator[None]:
    """Captured and compiled models stay: going through them again and again would be a sixth of the time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_capture_a_kind_of_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a model like an earlier one starts from what was captured then, but where a test is about capture."""
    from captures import captured_once
    from peftc import api
    from peftc.driver import planned

    if request.node.get_closest_marker("captures") is None:
        for module in (api, planned):
            monkeypatch.setattr(module, "capture", captured_once)
