"""Random specs on five architectures: fused, unfused, merged and loaded again compute the same, and learn the same.

`pytest tests/fuzz --fuzz-cases 1000` draws so many, each from its number alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import agreement
from randomspecs import Drawn, draw, without_place
from variants import ARCHITECTURES

PATIENCE = 60  # seconds in which a spec that fails is made shorter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--fuzz-cases")))


def drawn(seed: int) -> tuple[str, Drawn]:
    name = ARCHITECTURES[seed % len(ARCHITECTURES)]
    return name, draw(seed, *agreement.offers(name))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_four_agree(seed: int, tmp_path: Path) -> None:
    name, found = drawn(seed)
    try:
        agreement.check(name, found.spec, seed, tmp_path / "adapter")
    except Exception as error:
        kind = type(error)

        def fails(lines: Sequence[str]) -> bool:
            try:
                agreement.check(name, "\n".join(lines), seed, tmp_path / "adapter")
            except Exception as other:
                return type(other) is kind
            return False

        raise AssertionError(f"{error}\n{told(name, shortened(found.lines, fails), seed)}") from error


def shortened(lines: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The lines without those that it fails without, too."""
    until = time.monotonic() + PATIENCE
    for line in reversed(lines):
        fewer = [other for other in lines if other is not line]
        if fewer and time.monotonic() < until and fails(fewer):
            lines = fewer
    return lines


def told(name: str, lines: Sequence[str], seed: int) -> str:
    return "\n".join([f"{name}, seed {seed}:", *lines, f'pytest "{__file__}" -k "[{seed}]" --fuzz-cases {seed + 1}'])


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_most_statements_are_taken_and_the_others_refused_with_a_place(name: str) -> None:
    specs = [draw(seed, *agreement.offers(name)) for seed in range(12)]
    assert all(found.lines for found in specs)
    assert not [problem for found in specs for _, error in found.refused for problem in without_place(error)]
    taken = sum(found.taken for found in specs)
    assert sum(len(found.refused) for found in specs) < taken
