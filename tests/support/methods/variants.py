"""What a method can be tried as, from its declared parameters: by default, and once for each value that differs.

No method is named here: a file added under `passes/methods` is tried without a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import peftc
from peftc.protocol.method import Data, Method, Stage, kinds, methods
from peftc.protocol.params import Param, registered
from peftc.protocol.site import Attention, Block, Experts, Linear, Sequence, Site, Sublayer
from peftc.protocol.sites import site_kinds
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve

# Where a method is tried, by the kind of site it wants; a kind that is not here says itself what is written for it.
# On GPT-2, attn.q is a slice of a fused, transposed weight; on all of them mlp.down has more inputs than outputs.
PLACES: dict[type[Site], str] = {
    Linear: "attn.q, mlp.down", Sublayer: "attn, mlp", Block: "block", Experts: "mlp.gate, mlp.down",
    Sequence: "the whole input", Attention: "attn",
}  # fmt: skip
ARCHITECTURES = ("llama", "gpt2", "bert", "t5", "vit")
# Of stacked experts, a slice of a fused weight and a whole one; the second stores them transposed, slices interleaved.
MIXTURES = ("mixtral", "gpt_oss")

# Sites as the smallest models have them, to ask a method whether it would stand there.
LIKELY = (
    *(
        Linear("attn.q", "", frozenset({"attn.q"}), n_out=n_out, n_in=n_in)
        for n_out, n_in in ((16, 24), (32, 32), (48, 32))
    ),
    *(
        Linear("mlp.down", "", frozenset({"mlp.down"}), n_out=n_out, n_in=n_in)
        for n_out, n_in in ((24, 40), (32, 48), (32, 80))
    ),
    *(Sublayer(name, "", frozenset({name}), width=24, entry_width=24) for name in ("attn", "mlp")),
)
EXPERTS = Experts("experts", "", frozenset({"expert"}), n_out=48, n_in=32, experts=4)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in site_kinds()}  # of files under `passes`
CONV, EMBEDDING = KINDS["Conv"], KINDS["Embedding"]
KERNELS, TABLES = CONV.samples(), EMBEDDING.samples()
# How a call is spelt small where its default is too large for models this small.
SMALL = {"phm": "(n=2)"}
# What a method is told of these models' inputs.
TOLD = {"tokens": 'ids="14, 31"'}


def other_values(parameter: Param) -> list[Any]:
    """Each other choice; the other truth; other numbers that the parameter allows; every call that it takes."""
    if parameter.nested:
        return [f"{name}{SMALL.get(name, '')}" for name in registered(parameter.nested)]
    if parameter.choices:
        return [choice for choice in parameter.choices if choice != parameter.default]
    if parameter.kind is bool:
        return [not parameter.default]
    if parameter.kind is str:
        return []
    start = parameter.default or 0
    numbers = [3, 5, 4] if parameter.kind is int else [start + 2.5, start + 0.25]
    return [value for value in numbers if value != parameter.default and parameter.problem(value) is None]


def changes_how(parameter: Param) -> bool:
    """Whether a number does more than say how much: one that is left out by default, or a probability."""
    return parameter.optional or "dropout" in parameter.name


def spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def variants(cls: type[Method]) -> Iterator[str]:
    """The method by default, and once for each value that makes it work otherwise and goes with the sizes here.

    Numbers that only say how much are left to the test on any shape.
    """
    required = [parameter for parameter in cls.parameters.values() if parameter.required]
    starts = [f"{p.name}={value}" for p in required for value in other_values(p)] or [TOLD.get(cls.name, "")]
    starts = [start for start in starts if fitting(cls.name, start)]
    for start in starts:
        yield str(fitting(cls.name, start))
    for parameter in cls.parameters.values():
        if parameter.required or (parameter.kind in (int, float) and not changes_how(parameter)):
            continue
        values = [f"{parameter.name}={spelt(value)}" for value in other_values(parameter)]
        found = [call for value in values if (call := fitting(cls.name, ", ".join(filter(None, (starts[0], value)))))]
        yield from found if parameter.choices or parameter.nested else found[:1]


@cache
def fitting(name: str, given: str) -> str | None:
    """The call, if need be with one number smaller than its default, as the models here are; None if none fits."""
    numbers = [
        number for number, p in methods()[name].parameters.items() if p.kind is int and f"{number}=" not in given
    ]
    calls = [
        f"{name}({', '.join(filter(None, (given, more)))})".removesuffix("()")
        for more in ("", *(f"{number}={size}" for number in numbers for size in (8, 4)))
    ]
    calls = [call for call in calls if not complaints(call)]
    return next((call for call in calls if place(call) == usual_place(built(call))), None) or next(
        (call for call in calls if place(call)), None
    )


def complaints(call: str) -> list[peftc.Diagnostic]:
    """What a spec says of a call by itself: methods that do not go together, parameters that do not."""
    return peftc.check(f"apply {call} to attn")


@cache
def built(variant: str) -> Method:
    """The method that a variant spells."""
    (application,) = resolve(as_spec(f"apply {variant} to attn")).applications
    return application.method


def default(variant: str) -> bool:
    """Whether the variant is its method as it is by default: of a combinator, the first method that it takes."""
    return variant == next(variants(type(built(variant))))


def usual_place(method: Method) -> str:
    """Where methods of its kind are tried."""
    kind, *_ = kinds(method)
    return PLACES.get(kind, kind.written)


@cache
def place(variant: str) -> str:
    """Where the variant can stand, of the places for its kind of site; empty if nowhere."""
    method = built(variant)
    likely = [site for site in LIKELY if isinstance(site, kinds(method)[0])]
    if not likely:
        kind, *_ = kinds(method)
        samples = () if kind in PLACES else kind.samples()
        return "" if samples and all(map(method.refuses, samples)) else usual_place(method)
    refused = {site.name for site in likely if method.refuses(site)}
    return ", ".join(name for name in dict.fromkeys(site.name for site in likely) if name not in refused)


def statement(variant: str) -> str:
    return f"apply {variant}" + ("" if built(variant).stage is Stage.SEQUENCE else f" to {place(variant)}")


def statement_on(name: str, variant: str) -> str:
    """The statement for one model: on a mixture of experts it is about them, and so on convolutions."""
    if name == "convolved":
        grouped = any(isinstance(site, CONV) and site.groups > 1 and built(variant).refuses(site) for site in KERNELS)
        return f"apply {variant} to conv" + (" where groups <= 1" if grouped else "")
    if name == "looking":
        return f"apply {variant} to embed"
    return f"apply {variant} to {PLACES[Experts]}" if name in MIXTURES else statement(variant)


def chosen(variant: str) -> bool:
    """Whether the variant is the default or another choice, which may change how a method works, not only how much."""
    last = variant.rstrip(")").rpartition("=")[0].rpartition("(")[2].rpartition(" ")[2]
    parameter = built(variant).parameters.get(last)
    return default(variant) or (parameter is not None and (parameter.choices or parameter.nested) is not None)


# Gradients are of a loss, which a plain module does not return.
NEEDS_LOSS = {Data.WEIGHT_GRADIENTS, Data.STATE_GRADIENTS}


def home(variant: str) -> str:
    """The smallest model that the variant can be tried on."""
    elsewhere = kinds(built(variant))[0] not in PLACES  # of a kind of its own, which a plain module may lack
    return "llama" if built(variant).data in NEEDS_LOSS or elsewhere else "plain"


VARIANTS = [variant for cls in methods().values() for variant in variants(cls) if place(variant)]
DEFAULTS = [variant for variant in VARIANTS if default(variant)]
