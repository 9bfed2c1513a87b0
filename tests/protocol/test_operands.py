"""What a rewrite asks for by name is there, or is refused when the method registers, with the nearest name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from peftc.protocol import params
from peftc.protocol.method import Method, State, method, param
from peftc.protocol.stages import (
    AttentionMethod,
    BlockMethod,
    OutputMethod,
    SequenceMethod,
    SublayerMethod,
    WeightMethod,
)


class Place(NamedTuple):
    """A rewrite of a stage: what it is given, what it may ask for, and how one might misspell that."""

    base: type[Method]
    rewrite: str
    given: tuple[str, ...]
    operands: str
    misspelt: tuple[str, str]


LAYER = "weight, bias, training, here"
PLACES = [
    Place(WeightMethod, "rewrite", ("site", "x", "y"), LAYER, ("wieght", "weight")),
    Place(OutputMethod, "rewrite", ("site", "x", "y"), LAYER, ("biass", "bias")),
    Place(OutputMethod, "rewrite_input", ("site", "x"), LAYER, ("traning", "training")),
    Place(SublayerMethod, "rewrite", ("site", "x", "y"), "training", ("train", "training")),
    Place(BlockMethod, "rewrite", ("site", "x", "y"), "training, carry, memory, attend", ("memori", "memory")),
    Place(AttentionMethod, "extend", ("site",), "key_weight, key_bias, value_weight, value_bias, training",
          ("key_weigth", "key_weight")),
    Place(AttentionMethod, "rewrite", ("site", "x", "y"), "training", ("trainng", "training")),
    Place(SequenceMethod, "rewrite", ("site", "x"), "mask", ("maks", "mask")),
]  # fmt: skip
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.base.__name__}.{place.rewrite}")


def rewriting(*names: str, rest: str | None = None) -> Callable[..., Any]:
    """A function of these parameters, `self` first, and **rest."""

    def function(self: Any, *given: Any, **named: Any) -> Any:
        return given

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    if rest is not None:
        parameters.append(inspect.Parameter(rest, inspect.Parameter.VAR_KEYWORD))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def of(place: Place, function: Callable[..., Any]) -> type[Method]:
    """A method with one state, `scale`, and a rewrite."""
    members = {
        "name": "mine", "unmergeable": "it is none", place.rewrite: function,
        "state": lambda self, site: {"scale": State((4,))},
    }  # fmt: skip
    return type("Mine", (place.base,), members)


def refusal(cls: type[Method]) -> str:
    with pytest.raises(TypeError) as caught:
        cls.check()
    return str(caught.value)


@every_place
def test_every_operand_and_state_may_be_asked_for(place: Place) -> None:
    of(place, rewriting(*place.given, "scale", *place.operands.split(", "))).check()
    of(place, rewriting(*place.given, place.misspelt[1], rest="state")).check()
    of(place, rewriting(*place.given)).check()


@every_place
def test_a_misspelt_state(place: Place) -> None:
    assert refusal(of(place, rewriting(*place.given, "scalle"))) == (
        f"Mine.{place.rewrite} asks for 'scalle', which is no state of it and no operand; did you mean 'scale'? "
        f"(state: scale; operands: {place.operands})"
    )


@every_place
def test_a_misspelt_operand(place: Place) -> None:
    wrong, right = place.misspelt
    assert refusal(of(place, rewriting(*place.given, "scale", wrong))) == (
        f"Mine.{place.rewrite} asks for '{wrong}', which is no state of it and no operand; did you mean '{right}'? "
        f"(state: scale; operands: {place.operands})"
    )


@every_place
def test_nothing_is_near(place: Place) -> None:
    assert refusal(of(place, rewriting(*place.given, "zzz"))) == (
        f"Mine.{place.rewrite} asks for 'zzz', which is no state of it and no operand "
        f"(state: scale; operands: {place.operands})"
    )


@every_place
def test_wrong_leading_parameters(place: Place) -> None:
    given = ", ".join(place.given)
    wrong = ("place", *place.given[1:])
    assert refusal(of(place, rewriting(*wrong, "scale"))) == (
        f"Mine.{place.rewrite} is given ({given}) and then what it asks for by name, and it takes ({', '.join(wrong)})"
    )
    short = place.given[:-1]
    assert refusal(of(place, rewriting(*short))) == (
        f"Mine.{place.rewrite} is given ({given}) and then what it asks for by name, and it takes ({', '.join(short)})"
    )


def test_an_operand_of_another_stage() -> None:
    place = PLACES[-1]
    assert "asks for 'weight', which is no state of it and no operand (state" in refusal(
        of(place, rewriting("site", "x", "weight"))
    )


class Choosy(WeightMethod):
    """One state always, and one where a parameter says so."""

    name = "choosy"
    formula = "none"
    paper = "none"
    unmergeable = "it is none"
    shifted: bool = param(False, "whether there is a shift")

    def state(self, site: Any) -> dict[str, State]:
        return {"scale": State((4,))} | ({"shift": State((4,))} if self.shifted else {})

    def rewrite(self, site: Any, x: Any, y: Any, scale: Any, shift: Any = None) -> Any:
        return y


class Misspelt(Choosy):
    """The same, with a slip."""

    name = "misspelt"
    shifted: bool = param(False, "whether there is a shift")

    def rewrite(self, site: Any, x: Any, y: Any, scale: Any, shfit: Any = None) -> Any:
        return y


def test_registering_holds_every_method_against_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """State that there is with other parameters only is known, and a name that is near to it is said."""
    registries: dict[str, dict[str, type[params.Configured]]] = {}
    monkeypatch.setattr(params, "_registries", registries)
    monkeypatch.setattr(params, "registered", lambda kind: registries.get(kind.folder, {}))
    method(Choosy)
    params.check_registered()
    method(Misspelt)
    with pytest.raises(TypeError, match=r"Misspelt\.rewrite asks for 'shfit'.*; did you mean 'shift'\?"):
        params.check_registered()
