"""The model that specs are meant for: captured once, on one thread beside the one that answers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TYPE_CHECKING

from peftc import language as ast
from peftc.cli.common.inputs import model_named
from peftc.cli.editor.pointing import told_places
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.spec.resolve import Intentions

if TYPE_CHECKING:
    from peftc import api
    from peftc.capture import capture, inputs
    from peftc.graph import surroundings
    from peftc.planning import planner, select
    from peftc.protocol.sites import Sites
    from peftc.roles import assign
else:
    api, capture, inputs = Lazy("peftc.api"), Lazy("peftc.capture.capture"), Lazy("peftc.capture.inputs")
    assign, planner, select = Lazy("peftc.roles.assign"), Lazy("peftc.planning.planner"), Lazy("peftc.planning.select")
    surroundings = Lazy("peftc.graph.surroundings")


@dataclass(frozen=True)
class Asked:
    """Which model, as the command line's arguments name it."""

    model: str
    task: str | None = None
    labels: int | None = None
    trust_remote_code: bool = False


class Known:
    """A captured model: what it offers, and what is wrong with a spec for it."""

    def __init__(self, asked: Asked) -> None:
        """Captures it. Raises `PeftcError` where it cannot be."""
        with surroundings.ordinary_tensors():
            module, given = api.as_model(model_named(Namespace(**vars(asked))), meta=True)
            self._captured = capture.capture(module, inputs.example_inputs(module, given))
            self.sites: Sites = assign.find_sites(self._captured)

    def problems(self, intentions: Intentions) -> tuple[Diagnostic, ...]:
        """What planning finds wrong with a spec."""
        try:
            with surroundings.ordinary_tensors():
                planner.make_plan(self._captured, self.sites, intentions)
        except PeftcError as error:
            return error.diagnostics
        return ()

    def match(self, selector: ast.Selector, parameters: bool) -> str:
        """The places that a selector means, in words."""
        found = select.Selection(self.sites)(selector, parameters=parameters)
        return told_places([site.name for site in found], self.sites.model)

    def names(self) -> list[str]:
        """All places, and the parameters."""
        return [*(site.name for site in self.sites), *self.sites.parameters]


Answer = Callable[[tuple[Diagnostic, ...]], None]


class Worker:
    """Plans specs on its thread: of each document the newest alone, so that typing waits for nothing."""

    def __init__(self, failed: Callable[[str], None], ready: Callable[[], None]) -> None:
        """`failed` is told why there is no model, `ready` that there is one; both on the thread."""
        self.known: Known | None = None
        self._failed, self._ready = failed, ready
        self._asked: Asked | None = None
        self._waiting: dict[str, tuple[Intentions, Answer]] = {}
        self._changed = Condition()
        self._thread: Thread | None = None

    def use(self, asked: Asked) -> None:
        """From now on plans are for this model."""
        with self._changed:
            self._asked, self.known = asked, None
            self._changed.notify()
        if self._thread is None:
            self._thread = Thread(target=self._work, name="peftc model", daemon=True)
            self._thread.start()

    def plan(self, name: str, intentions: Intentions, answer: Answer) -> None:
        """Has `answer` called, on the thread, with what is wrong with a document; an older question is dropped."""
        if self._thread is not None:
            with self._changed:
                self._waiting[name] = (intentions, answer)
                self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or (self.known and self._waiting))
                asked, self._asked = self._asked, None
                known = self.known
                question = None if asked or not known else self._waiting.pop(next(iter(self._waiting)))
            try:
                if asked:
                    self._learn(asked)
                elif known and question:
                    question[1](known.problems(question[0]))
            except PeftcError as error:
                self._failed("\n".join(problem.title for problem in error.diagnostics))
            except Exception as error:  # of a model's own code, too: the next question may have an answer
                self._failed(f"{type(error).__name__}: {error}")

    def _learn(self, asked: Asked) -> None:
        known = Known(asked)
        with self._changed:
            if self._asked is None:  # else another is wanted by now
                self.known = known
        self._ready()
