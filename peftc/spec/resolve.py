"""AST -> intentions: `let` and `use` expanded, methods built and their parameters checked. No model is needed.

Everything `peftc check` can say is said here, all of it at once.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, in_file_order
from peftc.diagnostics.source import Span
from peftc.language import errors as mistakes
from peftc.protocol.method import Method, Stage, methods
from peftc.protocol.sites import site_kinds
from peftc.protocol.storage import Storage
from peftc.spec import errors as say
from peftc.spec.budget_errors import FitsTasks
from peftc.spec.budgets import Budget, Fit, budget, fitting, misfits
from peftc.spec.calls import Calls
from peftc.spec.groups import GROUPINGS, Group, InGroup
from peftc.spec.tasks import fits_of, of_task, tasks_of, without_tasks

ROLES = (
    "attn", "attn.q", "attn.k", "attn.v", "attn.o", "attn.*", "mlp", "mlp.up", "mlp.gate", "mlp.down", "mlp.*",
    "block", "norm", "embed", "head", "linear", "conv", "bias", "expert", "self", "cross",
)  # fmt: skip
KINDS_OF_ATTENTION = ("self", "cross")
FIELDS = ("in_features", "out_features", "width", "experts")
STACKS = ("encoder", "decoder")
LAYERS = "layers"
DEEPEST_NAME = 128  # what `let` names stand for, names within names: walks over it stay within Python's own stack


@dataclass(frozen=True)
class Application:
    """`apply METHOD to SELECTOR`, with the method built. A sequence method may have no target."""

    method: Method
    target: ast.Selector | None
    span: Span

    @property
    def where(self) -> Span:
        """What an error about the sites points at."""
        return self.target.span if self.target else self.span


@dataclass(frozen=True)
class Training:
    """`train SELECTOR` or, with `on` false, `freeze SELECTOR`."""

    target: ast.Selector
    on: bool
    span: Span


@dataclass(frozen=True)
class Recomputing:
    """`checkpoint SELECTOR`."""

    target: ast.Selector
    span: Span


@dataclass(frozen=True)
class Packing:
    """`quantize SELECTOR with STORAGE`, with the storage built."""

    storage: Storage
    target: ast.Selector
    span: Span


@dataclass
class Intentions:
    """What a spec wants, in file order, with every name looked up; `spec` is what it was read from.

    `tasks`: what each of its tasks wants, which is in no other list here, with what all of them have in common.
    `automatic`: where a rank is `auto`. `rows`: the tasks that the rows of one batch are of, beside what they have in
    common.
    """

    spec: ast.Spec
    applications: list[Application] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    packings: list[Packing] = field(default_factory=list)
    recomputings: list[Recomputing] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    automatic: tuple[Span, ...] = ()
    tasks: dict[str, Intentions] = field(default_factory=dict)
    rows: tuple[Intentions, ...] = ()
    may_be_empty: bool = False  # whether it may come to a model in which nothing learns

    def common(self) -> Intentions:
        """What all tasks have in common, without budgets: what a model computes that is planned already."""
        return replace(self, tasks={}, budgets=[], fits=[], may_be_empty=True)

    def off(self) -> Intentions:
        """How weights are stored, and nothing else."""
        return replace(self.common(), applications=[], trainings=[], recomputings=[])

    def task(self, name: str) -> Intentions:
        """What one task comes to, without budgets."""
        return self.tasks[name].common()

    def by_row(self, tasks: tuple[str, ...]) -> Intentions:
        """What comes to these tasks, one for each row of a batch."""
        return replace(self.common(), rows=tuple(map(self.task, tasks)))


def resolve(spec: ast.Spec) -> Intentions:
    """Looks up every name of `spec` and builds its methods.

    Raises:
        PeftcError: with everything that is wrong and can be known without a model.
    """
    tasks: dict[str, ast.Task] = {}
    problems: list[Diagnostic] = []
    for task in tasks_of(spec.statements):
        if (first := tasks.setdefault(task.name.text, task)) is not task:
            name, what = task.name, "a task"
            problems.append(say.NameTaken(name=name.text, what=what, first=first.name.span, span=name.span))
        problems += (mistakes.NestedTask(outer=task.name.span, span=i.name.span) for i in tasks_of(task.body))
    problems += (FitsTasks(span=statement.span) for statement in fits_of(spec.statements) if tasks)
    specs = {None: without_tasks(spec)} | {name: of_task(spec, task) for name, task in tasks.items()}
    found = {name: _resolved(one, problems) for name, one in specs.items()}
    if problems:
        raise PeftcError(*in_file_order(dict.fromkeys(problems)))  # what tasks have in common is wrong in each
    return replace(found.pop(None), spec=spec, tasks={name: one for name, one in found.items() if name is not None})


def _resolved(spec: ast.Spec, problems: list[Diagnostic]) -> Intentions:
    """What a spec without tasks wants; `problems` are added to."""
    resolver = _Resolver(spec)
    resolver.statements(spec.statements)
    problems += (*resolver.problems, *misfits(resolver.found.fits, resolver.calls.automatic))
    return replace(resolver.found, automatic=tuple(resolver.calls.automatic))


def _defined(statements: tuple[ast.Statement, ...]) -> Iterator[tuple[str, Span]]:
    """Every name that a line gives, of these files or those that they use, and where."""
    for statement in statements:
        match statement:
            case ast.Use(spec=ast.Spec(statements=included)):
                yield from _defined(included)
            case ast.Let(name):
                yield name.text, name.span
            case ast.Group(names):
                yield from ((name.text, name.span) for name in names)


class _Resolver:
    def __init__(self, spec: ast.Spec) -> None:
        self.found = Intentions(spec)
        self.problems: list[Diagnostic] = []
        self.lets: dict[str, ast.Let] = {}
        self.depths: dict[int, int] = {}  # of the selectors that names stand for, by id; `lets` holds them
        self.groups: dict[str, Group] = {}
        self.later = dict(_defined(spec.statements))
        self.calls = Calls(self.problems, self.lets, self.later)

    def statements(self, statements: tuple[ast.Statement, ...]) -> None:
        for statement in statements:
            match statement:
                case ast.Use(spec=None):
                    self.problems.append(mistakes.UseWithoutFile(path=statement.path.value, span=statement.path.span))
                case ast.Use(spec=ast.Spec(statements=included)):
                    self.statements(included)
                case ast.Let():
                    self._let(statement)
                case ast.Apply():
                    self._apply(statement)
                case ast.Train() | ast.Freeze():
                    target = self.selector(statement.target)
                    on = isinstance(statement, ast.Train)
                    self.found.trainings.append(Training(target, on, statement.span))
                case ast.Require():
                    self.found.budgets += budget(statement, self.problems)
                case ast.Fit():
                    self.found.fits += fitting(statement, self.calls)
                case ast.Quantize():
                    target = self.selector(statement.target)
                    built = self.calls.build(statement.storage, Storage)
                    if built is not None:
                        self.found.packings.append(Packing(built, target, statement.span))
                case ast.Checkpoint():
                    self.found.recomputings.append(Recomputing(self.selector(statement.target), statement.span))
                case ast.Group():
                    self._group(statement)

    def _let(self, statement: ast.Let) -> None:
        name = statement.name.text
        if not self._taken(statement.name, {"a role": roles(), "a method": methods()}):
            value = statement.value
            if isinstance(value, ast.Role) and value.text in methods():
                value = ast.Call(ast.Name(value.text, span=value.span), span=value.span)
            if isinstance(value, ast.Selector):
                value = self._not_too_deep(self.selector(value), statement.span)
            else:
                value = self.calls.spelt_out(value)
                if self.calls.build(value, Method) is None:
                    self.calls.broken.add(name)
            self.lets[name] = ast.Let(statement.name, value, span=statement.span)

    def _not_too_deep(self, selector: ast.Selector, span: Span) -> ast.Selector:
        """The selector, unless names within names make it too deep for every walk over it."""
        depth = self._depth(selector)
        if depth > DEEPEST_NAME:
            self.problems.append(say.NamesTooDeep(limit=DEEPEST_NAME, span=span))
            return ast.Role(("linear",), span=span)
        self.depths[id(selector)] = depth
        return selector

    def _depth(self, selector: ast.Selector) -> int:
        known = self.depths.get(id(selector))
        return 1 + max(map(self._depth, ast.within(selector)), default=0) if known is None else known

    def _taken(self, name: ast.Name, reserved: dict[str, Container[str]]) -> bool:
        """Whether `name` cannot be defined, with the reason noted: it is reserved, or defined already."""
        what = next((what for what, names in reserved.items() if name.text in names), None)
        first = next((known[name.text].name.span for known in (self.lets, self.groups) if name.text in known), None)
        if what or first:
            self.problems.append(say.NameTaken(name=name.text, what=what or "defined", first=first, span=name.span))
        return bool(what or first)

    def _group(self, statement: ast.Group) -> None:
        """Its names are known from here on, even if something is wrong with them: one complaint is enough."""
        call = statement.call
        grouping = call.name.text
        if grouping not in GROUPINGS:
            self.problems.append(say.UnknownGrouping(name=grouping, known=tuple(GROUPINGS), span=call.name.span))
        elif not _is_of_layers(call):
            self.problems.append(say.GroupsLayers(name=grouping, span=call.span))
        for index, name in enumerate(statement.names):
            self._taken(name, {"a role": roles(), "a method": methods(), "a part of a model": (*STACKS, LAYERS)})
            self.groups.setdefault(name.text, Group(name, grouping, index, len(statement.names)))

    def _apply(self, statement: ast.Apply) -> None:
        built = self.calls.build(statement.method, Method)
        target = self.selector(statement.target) if statement.target else None
        if built is None:
            return
        if target is None and built.stage is not Stage.SEQUENCE:
            example = "attn, mlp" if built.stage is Stage.MODULE else "attn.q, attn.v"
            self.problems.append(
                say.NoTarget(method=built.name, hint=f"add 'to {example}'", span=statement.method.span)
            )
            return
        self.found.applications.append(Application(built, target, statement.span))

    # Selectors

    def selector(self, selector: ast.Selector) -> ast.Selector:
        """The selector with every `let` name replaced by what it stands for."""
        match selector:
            case ast.Role():
                return self._role(selector)
            case ast.Union(items) | ast.Intersect(items):
                return type(selector)(tuple(map(self.selector, items)), span=selector.span)
            case ast.Except(base, removed):
                return ast.Except(self.selector(base), self.selector(removed), span=selector.span)
            case ast.InLayers(base, start, stop, step):
                if not _has_layers(start, stop, step):
                    self.problems.append(say.EmptySlice(span=selector.span))
                return ast.InLayers(self.selector(base), start, stop, step, span=selector.span)
            case ast.InStack(base, name):
                if name.text in self.groups:
                    return InGroup(self.selector(base), self.groups[name.text], span=selector.span)
                if name.text not in STACKS:
                    known = (*STACKS, *self.groups)
                    later = self.later.get(name.text)
                    self.problems.append(say.UnknownStack(name=name.text, known=known, later=later, span=name.span))
                return ast.InStack(self.selector(base), name, span=selector.span)
            case ast.Where(base, name, op, value):
                self._where(name, value)
                return ast.Where(self.selector(base), name, op, value, span=selector.span)
        return selector

    def _role(self, role: ast.Role) -> ast.Selector:
        let = self.lets.get(role.text)
        if let is not None:
            if isinstance(let.value, ast.Selector):
                return let.value
            wrong = say.WrongKindOfName(
                name=role.text, is_a="method", wanted="selector", defined=let.name.span, span=role.span
            )  # fmt: skip
            self.problems.append(wrong)
        elif not _is_role(role.parts):
            known = (
                *roles(),
                *(name for name, let in self.lets.items() if isinstance(let.value, ast.Selector)),
            )
            later = self.later.get(role.text)
            self.problems.append(say.UnknownRole(name=role.text, known=known, later=later, span=role.span))
        return role

    def _where(self, name: ast.Name, value: ast.Value) -> None:
        known = (*FIELDS, *(field for kind in site_kinds() for field in kind.fields if field not in FIELDS))
        if name.text not in known:
            self.problems.append(say.UnknownField(name=name.text, known=known, span=name.span))
        if not isinstance(value, ast.Number):
            self.problems.append(say.NotANumber(name=name.text, span=value.span))


def _has_layers(start: int | None, stop: int | None, step: int | None) -> bool:
    """Whether some model has layers in a slice: where its bounds change places is near their sizes and their sum."""
    bounds = [abs(bound) for bound in (start, stop) if bound is not None]
    counts = {size + near for size in (0, *bounds, sum(bounds)) for near in (0, 1, 2)}
    return any(range(*slice(start, stop, step).indices(count)) for count in counts)


def _is_of_layers(call: ast.Call) -> bool:
    """Whether a grouping's one argument is the word `layers`."""
    return [(argument.name, argument.value) for argument in call.args] == [(None, ast.Name(LAYERS, span=call.span))]


def roles() -> tuple[str, ...]:
    """Every word that names a role: the language's own, and those of further kinds of site."""
    return tuple(dict.fromkeys((*ROLES, *(role for kind in site_kinds() for role in kind.own_roles))))


def _is_role(parts: tuple[str, ...]) -> bool:
    """A word of `ROLES`, with `self.` or `cross.` before anything of attention."""
    text = ".".join(parts)
    if parts[0] in KINDS_OF_ATTENTION and len(parts) > 1:
        text = ".".join(parts[1:])
        return text in ROLES and text.startswith("attn")
    return text in roles()
