"""What a first command costs: seconds of wall clock and of one core, the fastest of ten.

    python examples/command_time.py [--times 10]

`peftc check` is to answer within 0.3 s, `peftc methods` within 0.5 s, `peftc --help` and `peftc train --help`
within 0.2 s: none imports torch.
What Python itself takes to start stands first, and what a plan takes, which needs torch and transformers, last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SPEC, MODEL = str(HERE / "recipes" / "lora.peft"), str(HERE / "configs" / "llama-3-8b.json")
COMMANDS: dict[str, tuple[list[str], float | None]] = {  # and the seconds that it may take
    "python": (["-c", "pass"], None),
    "peftc --help": (["-m", "peftc", "--help"], 0.2),
    "peftc train --help": (["-m", "peftc", "train", "--help"], 0.2),
    "peftc check SPEC": (["-m", "peftc", "check", SPEC], 0.3),
    "peftc methods": (["-m", "peftc", "methods"], 0.5),
    "peftc plan SPEC MODEL": (["-m", "peftc", "plan", SPEC, MODEL], None),
}
# As anybody's: a module is compiled once, not by every command.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def once(arguments: list[str]) -> tuple[float, float]:
    """Seconds of wall clock, and of all cores together."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    wall, after = time.perf_counter() - start, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    late = False
    for name, (arguments, most) in COMMANDS.items():
        wall, cores = map(min, zip(*(once(arguments) for _ in range(times)), strict=True))
        too_late = most is not None and wall > most
        late = late or too_late
        print(f"{name:24} {wall:6.2f} s {cores:6.2f} s of a core" + (f", above {most} s" if too_late else ""))
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
