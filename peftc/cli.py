"""The `peftc` command. Exit status: 0 done, 1 a diagnostic, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.render import render
from peftc.diagnostics.timings import Timings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A traceback reaches the user only with PEFTC_DEBUG set."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        if not debug.level():
            warnings.simplefilter("ignore")
        try:
            return int(arguments.run(arguments) or 0)
        except PeftcError as error:
            _complain(error, as_json=getattr(arguments, "json", False))
            return 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if debug.level():
                raise
            print(
                f"peftc: {type(error).__name__}: {error}\n(set {debug.VARIABLE}=1 for the traceback)", file=sys.stderr
            )
            return 1


def _complain(error: PeftcError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"errors": [diagnostic.to_json() for diagnostic in error.diagnostics]}, indent=2))
        return
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    text = "\n\n".join(render(diagnostic, colour=colour) for diagnostic in error.diagnostics)
    count = len(error.diagnostics)
    print(text + (f"\n\n{count} errors" if count > 1 else ""), file=sys.stderr)


# --- the commands ------------------------------------------------------------------------------------------------


def _compile(given: argparse.Namespace) -> None:
    """Compiles, verifies, reports; with -o writes the artifact."""
    import peftc
    from peftc.driver.calibration import read_batches
    from peftc.show.tables import fusions_table, plan_table, timings_table

    with _progress(given) as timings:
        with timings.stage("check"):
            problems = peftc.check(Path(given.spec))
            if problems:
                raise PeftcError(*problems)
        batches = read_batches(Path(given.calibration)) if given.calibration else None
        model, example = _model_to_compile(given, timings, dtype=given.dtype)
        compiled = peftc.compile(
            model, Path(given.spec), example=example, calibration=batches, dtype=given.dtype, timings=timings
        )
        if given.output:
            with timings.stage("save"):
                compiled.save(given.output)
    if given.json:
        fusions = [fired.to_json() for fired in compiled.fired]
        told = {"fusions": fusions, "seconds": timings.seconds, "artifact": given.output}
        _print_json(compiled.plan.to_json() | told)
        return
    _print(plan_table(compiled.plan), fusions_table(compiled.fired))
    if given.timings:
        _print(timings_table(timings.seconds))
    if given.output:
        print(f"written to {given.output}")


def _plan(given: argparse.Namespace) -> None:
    """What each statement matches, and what a step needs, from shapes alone."""
    import peftc
    from peftc.show.tables import memory_table, plan_table

    with _progress(given) as timings:
        plan = peftc.plan(given.model, Path(given.spec), dtype=given.dtype, timings=timings)
    memory = plan.memory(given.batch, given.seq, given.optimizer)
    if given.json:
        _print_json(plan.to_json() | {"memory": memory.to_json(), "seconds": timings.seconds})
        return
    _print(plan_table(plan), memory_table(memory, given.batch, given.seq, given.optimizer))


def _check(given: argparse.Namespace) -> int:
    """Diagnostics without a model."""
    import peftc

    problems = peftc.check(Path(given.spec))
    if given.json:
        _print_json({"errors": [problem.to_json() for problem in problems]})
    elif problems:
        _complain(PeftcError(*problems), as_json=False)
    else:
        print(f"{given.spec}: no errors")
    return 1 if problems else 0


def _sites(given: argparse.Namespace) -> None:
    """The tree of sites with their roles."""
    import peftc
    from peftc.show.tables import sites_tree

    with _progress(given):
        found = peftc.sites(given.model)
    if given.json:
        _print_json({"model": found.model, "sites": found.to_json()})
        return
    _print(sites_tree(found, every=given.all))


def _methods(given: argparse.Namespace) -> None:
    """The registry of methods and storages, or one of it."""
    from peftc.protocol.method import methods
    from peftc.protocol.storage import storages
    from peftc.show import tables as report
    from peftc.spec.errors import UnknownMethod

    known = methods()
    if given.name and given.name not in known and given.name not in storages():
        raise PeftcError(UnknownMethod(name=given.name, known=tuple(known)))
    if given.json:
        everything = [*report.described_methods(), *report.described_storages()]
        _print_json([item for item in everything if given.name in (None, item["name"])])
    elif given.name in known:
        _print(report.method_page(known[given.name]))
    elif given.name:
        _print(report.storage_page(storages()[given.name]))
    else:
        _print(report.methods_table(), report.storages_table())


def _show(given: argparse.Namespace) -> None:
    """The graph before and after the passes."""
    import peftc
    from peftc.show import Format, render_show

    with _progress(given) as timings:
        model, example = _model_to_compile(given, timings)
        compiled = peftc.compile(model, Path(given.spec), example=example, timings=timings)
    wanted: dict[Format, str | None] = {"html": given.html, "dot": given.dot, "mermaid": given.mermaid}
    block = given.block if given.block else next(iter(compiled.plan.sites.blocks), None)
    chosen: dict[Format, str] = {kind: path for kind, path in wanted.items() if path}
    for kind, path in (chosen or {"text": "-"}).items():
        text = render_show(
            compiled, block=None if given.whole else block, after=given.after, format=kind, detail=given.detail
        )
        if path == "-":
            print(text)
        else:
            _write_text(path, text)
            print(f"written to {path}")


def _merge(given: argparse.Namespace) -> None:
    """Folds an artifact into a plain model."""
    import peftc
    from peftc.files.merge import save_merged
    from peftc.files.repack import Repacked, repack
    from peftc.show.tables import lost_table

    _watched_only()
    with _progress(given) as timings:
        with timings.stage("compile"):
            compiled = peftc.load(given.artifact, given.model)
        with timings.stage("merge"):
            again = repack(compiled) if given.requantize else Repacked(compiled.merge(), {}, None)
            merged, lost = again.model, again.lost
        with timings.stage("save"):
            packed = save_merged(merged, given.output, again.packing)
    if given.json:
        report = {"model": type(merged).__name__, "folder": given.output, "seconds": timings.seconds, "packed": packed}
        _print_json(report | {"lost": {name: asdict(rounding) for name, rounding in lost.items()}})
    else:
        if lost:
            _print(lost_table(lost))
        how = "packed for bitsandbytes, " if packed else "its weights rounded but not packed, " if lost else ""
        print(f"a plain {type(merged).__name__}, {how}written to {given.output}")


def _bench(given: argparse.Namespace) -> int:
    """Measures a training step against the frozen base model and HF PEFT."""
    import peftc
    from peftc.bench.bench import bench
    from peftc.bench.table import bench_table
    from peftc.driver.calibration import read_batches

    with _progress(given) as timings:
        with timings.stage("check"):
            problems = peftc.check(Path(given.spec))
            if problems:
                raise PeftcError(*problems)
        with timings.stage("load"):
            batches = read_batches(Path(given.calibration)) if given.calibration else None
            model, example = _load_model(given.model, random_weights=given.random_weights, dtype=given.dtype)
            _move(model, given.device)
        found = bench(
            model, Path(given.spec), example=example, calibration=batches, batch=given.batch, seq=given.seq,
            repeats=given.repeats, thread_count=given.threads, with_torch_compile=given.torch_compile, timings=timings,
        )  # fmt: skip
    if given.json:
        _print_json(found.to_json())
    else:
        _print(bench_table(found))
    return 0 if found.agrees else 1


def _model_to_compile(given: argparse.Namespace, timings: Timings, **options: Any) -> tuple[Any, Any]:
    """The reference itself, which `peftc.compile` reads in its own way, or a model of random weights."""
    _watched_only()
    if not given.random_weights:
        return given.model, None
    with timings.stage("load"):
        return _load_model(given.model, random_weights=True, **options)


def _load_model(text: str, **options: Any) -> tuple[Any, Any]:
    """The model and its example."""
    from peftc.capture.references import load_model, parse_reference

    _watched_only()
    return load_model(parse_reference(text), **options)


def _move(model: Any, device: str) -> None:
    """`model` on the device of that name."""
    from peftc.bench.errors import NoDevice

    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        raise PeftcError(NoDevice(name=device, reason=str(error).splitlines()[0])) from error


def _watched_only() -> None:
    """The progress bar of weights being read shows only where somebody watches it, and libraries keep to errors."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not debug.level():
        transformers_logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# --- the arguments -----------------------------------------------------------------------------------------------

MODEL_HELP = "a Hugging Face folder or id, a .gguf file, a config.json, or path/to/file.py:factory"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftc", description="A declarative graph compiler for parameter-efficient fine-tuning."
    )
    parser.add_argument("--version", action="version", version=f"peftc {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], *, model: bool, spec: bool) -> Any:
        summary = (run.__doc__ or "").strip()
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        if spec:
            made.add_argument("spec", metavar="SPEC", help="a .peft file")
        if model:
            made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
        made.add_argument("--json", action="store_true", help="print data instead of tables")
        return made

    def weights(made: Any) -> None:
        made.add_argument("--random-weights", action="store_true", help="initialise instead of reading weights")

    def dtype(made: Any) -> None:
        made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="precision of the base model")

    def calibration(made: Any) -> None:
        made.add_argument(
            "--calibration",
            metavar="FILE",
            help="a .safetensors file with one tensor [N, ...] for each input of the model, labels included, for "
            "methods that start from data; it is run in batches of 8",
        )

    made = command("compile", _compile, model=True, spec=True)
    made.add_argument("-o", "--output", metavar="DIR", help="write the artifact here")
    calibration(made)
    made.add_argument("--timings", action="store_true", help="print seconds by stage, and what capture alone takes")
    weights(made)
    dtype(made)
    made = command("plan", _plan, model=True, spec=True)
    made.add_argument("--batch", type=_positive, default=1, help="examples in a step, for the memory table")
    made.add_argument("--seq", type=_positive, default=512, help="tokens in an example, for the memory table")
    made.add_argument("--optimizer", choices=_optimizers(), default="adamw", help="for the memory table")
    dtype(made)
    command("check", _check, model=False, spec=True)
    made = command("sites", _sites, model=True, spec=False)
    made.add_argument("--all", action="store_true", help="every layer, not the first of each stack alone")
    made = command("methods", _methods, model=False, spec=False)
    made.add_argument("name", nargs="?", metavar="NAME", help="one method or storage, with its parameters")
    made = command("show", _show, model=True, spec=True)
    made.add_argument("--html", metavar="FILE", help="a self-contained page ('-' for standard output, as below)")
    made.add_argument("--dot", metavar="FILE", help="Graphviz")
    made.add_argument("--mermaid", metavar="FILE", help="Mermaid")
    made.add_argument("--after", metavar="PASS", help="the graph after this pass instead of the last")
    made.add_argument("--block", metavar="PATH", help="which block; the first by default")
    made.add_argument("--whole", action="store_true", help="the whole model, a node a block")
    made.add_argument("--detail", action="store_true", help="keep views and casts")
    weights(made)
    made = command("merge", _merge, model=False, spec=False)
    made.add_argument("artifact", metavar="DIR", help="what 'peftc compile -o' or save() wrote")
    made.add_argument("-o", "--output", metavar="DIR", required=True, help="where the plain model goes")
    made.add_argument(
        "--requantize",
        action="store_true",
        help="quantise again what was, print what that loses, and write it as bitsandbytes packs it",
    )
    made.add_argument("--model", metavar="MODEL", help=f"the base model, if it moved: {MODEL_HELP}")
    made = command("bench", _bench, model=True, spec=True)
    made.add_argument("--batch", type=_positive, default=2, help="examples in a step")
    made.add_argument("--seq", type=_positive, default=128, help="tokens in an example")
    made.add_argument("--repeats", type=_positive, default=5, help="rounds, of which the fastest counts")
    made.add_argument("--threads", type=_positive, default=1, help="threads to compute with on the CPU")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    made.add_argument("--torch-compile", action="store_true", help="each also under torch.compile(fullgraph=True)")
    calibration(made)
    weights(made)
    dtype(made)
    return parser


def _version() -> str:
    from peftc import __version__

    return __version__


def _optimizers() -> tuple[str, ...]:
    from peftc.planning.memory import STATE_BYTES

    return tuple(STATE_BYTES)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expects a whole number, at least 1, not {text!r}")
    return int(text)


# --- output ------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(given: argparse.Namespace) -> Iterator[Any]:
    """Timings whose stages show as they run: a spinner on a terminal, nothing elsewhere."""

    console = Console(stderr=True)
    if not console.is_terminal or given.json:
        yield Timings()
        return
    with Status("starting", console=console) as status:
        yield Timings(progress=lambda stage: status.update(f"{stage} …"))


def _print(*items: Any) -> None:
    from peftc.show.tables import print_all

    print_all(*items)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _write_text(path: str, text: str) -> None:
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
