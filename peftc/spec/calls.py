"""Calls in a spec -> methods and what else is `Configured`: names looked up, parameters checked, calls inside built."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, suggest
from peftc.diagnostics.source import Span
from peftc.language import words
from peftc.protocol.method import Method
from peftc.protocol.parameterisation import Parameterisation
from peftc.protocol.params import Configured, Param, registered
from peftc.protocol.storage import Storage
from peftc.spec import errors as say

AUTO = "auto"
RANK = "r"
K = TypeVar("K", bound=Configured)
KINDS: tuple[type[Configured], ...] = (Method, Storage, Parameterisation)


class Calls:
    """Builds what calls describe; problems collect in `problems`. `later`: where some line gives each name."""

    def __init__(self, problems: list[Diagnostic], lets: dict[str, ast.Let], later: dict[str, Span]) -> None:
        self.problems = problems
        self.lets = lets
        self.later = later
        self.broken: set[str] = set()  # names of methods already complained of
        self.automatic: dict[Span, None] = {}  # ranks that `fit trainable` is to find

    def build(self, call: ast.Call, kind: type[K]) -> K | None:
        """What `call` describes, or None with the reasons noted."""
        name = call.name.text
        if kind is Method and (let := self.lets.get(name)) is not None:
            return self._named(call, let, kind)
        if name not in registered(kind):
            known = (*registered(kind), *(self.lets if kind is Method else ()))
            nouns = [other.noun for other in KINDS if name in registered(other)]
            self.problems.append(
                say.UnknownMethod(
                    name=name, noun=kind.noun, known=known, is_a=nouns[0] if nouns else "",
                    later=self.later.get(name) if kind is Method else None, span=call.name.span,
                )
            )  # fmt: skip
            return None
        cls = registered(kind)[name]
        before = len(self.problems)
        values = self._arguments(cls, call)
        if len(self.problems) > before:
            return None
        if any(parameters.nested and values.get(name, 0) is None for name, parameters in cls.parameters.items()):
            return None  # a broken name inside, which was complained of where it was defined
        built = cls(**values)
        if conflict := built.conflict():
            self.problems.append(say.ParametersConflict(method=name, problem=conflict, span=call.span))
            return None
        return cast(K, built)

    def _named(self, call: ast.Call, let: ast.Let, kind: type[K]) -> K | None:
        if call.name.text in self.broken:
            return None
        if isinstance(let.value, ast.Selector):
            wrong = say.WrongKindOfName(
                name=call.name.text, is_a="selector", wanted="method", defined=let.name.span, span=call.name.span
            )  # fmt: skip
            self.problems.append(wrong)
            return None
        return self.build(self.spelt_out(call), kind)

    def spelt_out(self, call: ast.Call) -> ast.Call:
        """The call of the method itself, where it is one of a name for a method."""
        let = self.lets.get(call.name.text)
        if let is None or isinstance(let.value, ast.Selector):
            return call
        return ast.Call(let.value.name, (*let.value.args, *call.args), span=call.span)

    def _arguments(self, cls: type[Configured], call: ast.Call) -> dict[str, object]:
        parameters = cls.parameters
        aliases = {parameter.alias: name for name, parameter in parameters.items() if parameter.alias}
        values: dict[str, object] = {}
        spans: dict[str, Span] = {}
        for place, argument in enumerate(call.args):
            span = argument.name.span if argument.name else argument.value.span
            given = argument.name.text if argument.name else self._unnamed(cls, place, argument)
            if given is None:
                continue
            name = aliases.get(given, given)
            if name not in parameters:
                self.problems.append(_unknown_parameter(cls, given, span))
                continue
            if name in spans:
                self.problems.append(say.GivenTwice(method=cls.name, name=name, first=spans[name], span=span))
                continue
            spans[name] = span
            if is_rank(cls, name) and argument.value == ast.Name(AUTO, span=span):
                self.automatic[argument.value.span] = None
                values[name] = parameters[name].default  # until one is found
                continue
            values[name] = self._value(cls, parameters[name], argument.value)
        missing = [parameter for name, parameter in parameters.items() if parameter.required and name not in spans]
        self.problems += [
            say.MissingParameter(method=cls.name, name=item.name, expects=item.expects, span=call.span)
            for item in missing
        ]
        return values

    def _unnamed(self, cls: type[Configured], place: int, argument: ast.Arg) -> str | None:
        """The parameter that a value without a name is for: only a first one that takes a call may have none."""
        first = next(iter(cls.parameters.values()), None)
        if place == 0 and first is not None and first.nested:
            return first.name
        name = [*cls.parameters][place] if place < len(cls.parameters) else None
        self.problems.append(say.PositionalArgument(method=cls.name, first=name, span=argument.value.span))
        return None

    def _value(self, cls: type[Configured], parameter: Param, given: ast.Value) -> Any:
        if parameter.nested and isinstance(given, ast.Name | ast.Call):
            call = given if isinstance(given, ast.Call) else ast.Call(given, span=given.span)
            return self.build(call, parameter.nested)
        match given:
            case ast.Number():
                value: object = given.scaled
            case ast.Bool() | ast.String():
                value = given.value
            case ast.Name():
                value = given.text
            case _:
                value = None
        problem = parameter.problem(value) if value is not None else f"expects {parameter.expects}"
        if problem:
            other = None
            if isinstance(value, str):
                brought = words.meant(parameter.name)  # HF PEFT's bias="all"
                other = "leave it out" if value.casefold() == "none" else brought.label if brought else None
            hint = suggest(str(value), parameter.choices) if parameter.choices else other
            self.problems.append(
                say.BadValue(method=cls.name, name=parameter.name, problem=problem, hint=hint, span=given.span)
            )
        return value


def is_rank(cls: type[Configured], name: str) -> bool:
    """Whether a parameter may be `auto`: a method's rank."""
    return issubclass(cls, Method) and name == RANK


def _unknown_parameter(cls: type[Configured], given: str, span: Span) -> Diagnostic:
    parameters = cls.parameters.items()
    takes = tuple(f"{name} ({p.alias})" if p.alias else name for name, p in parameters)
    names = (*cls.parameters, *(p.alias for _, p in parameters if p.alias))
    return say.UnknownParameter(method=cls.name, name=given, takes=takes, names=names, span=span)
