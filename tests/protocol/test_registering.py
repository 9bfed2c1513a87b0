"""What is no method, storage, fusion or kind of site is refused where it registers, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from peftc.graph.patterns import add, value
from peftc.planning.packed_weight import PackedWeight
from peftc.protocol.method import Method, State, method, methods, param
from peftc.protocol.params import Configured, check, register
from peftc.protocol.rule import Editor, Fusion, Match, fusion
from peftc.protocol.site import Linear, Site
from peftc.protocol.sites import site
from peftc.protocol.stages import OutputMethod, SublayerMethod, WeightMethod
from peftc.protocol.storage import Buffer, Storage, storages

LOADED = methods(), storages()  # what registers from here on is in neither


class Moves(OutputMethod):
    """Complete, but for what a test leaves out."""

    name = "moves"
    formula = "y + v"
    unmergeable = "a test asks for no merging"

    def state(self, site: Linear) -> dict[str, State]:
        return {"v": State((site.n_out,))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return y + v


def loaded(cls: type[Configured]) -> None:
    """What a registry does with a class that a file of its folder defines."""
    register(cls)
    check(cls)


def refused(cls: type[Configured], *words: str) -> None:
    """Whether a class is refused, with these words."""
    with pytest.raises((TypeError, ValueError)) as raised:
        loaded(cls)
    assert all(word in str(raised.value) for word in words), raised.value


def test_what_every_name_in_the_language_needs() -> None:
    class Nameless(OutputMethod):
        """It has no name."""

        formula = "y"

    class Undocumented(Moves):
        pass

    class Spaced(Moves):
        """Its name is none."""

        name = "moves more"

    class Half(Moves):
        """Its name is that of a method of `torch.nn.Module`."""

        name = "half"

    class Bias(Moves):
        """Its name is that of a parameter beside which its state lies."""

        name = "bias"

    class Lora(Moves):
        """Its name is another's."""

        name = "lora"

    refused(Nameless, "Nameless has no name: the word that a spec calls it by")
    refused(Undocumented, "Undocumented has no docstring", "`peftc methods moves`")
    refused(Spaced, "'moves more', which is no word that a spec can call")
    refused(Half, "Half is called half: every torch module has 'half' already")
    refused(Bias, "a layer has its bias there")
    refused(Lora, "two methods are called lora")


def test_parameters() -> None:
    class Bare(Moves):
        """A parameter without a type."""

        name = "bare"
        size = param(1, "how much")

    class Listed(Moves):
        """A parameter of a type that the language lacks."""

        name = "listed"
        sizes: list[int] = param([1], "how much")

    class Rated(Moves):
        """A parameter that hides a method of every method."""

        name = "rated"
        rate: float = param(1.0, "how fast")  # type: ignore[assignment]

    class Low(Moves):
        """A default that is out of bounds."""

        name = "low"
        size: int = param(0, "how much", min=1)

    refused(Bare, "Bare.size needs an annotation: int, float, bool or str")
    refused(Listed, "Listed.sizes needs an annotation")
    refused(Rated, "Rated.rate is a parameter, and 'rate' means something else of a method: rename it")
    refused(Low, "the default of Low.size must be at least 1")


def test_a_subclass_has_its_bases_parameters() -> None:
    class Scaled(Moves):
        """One with two parameters."""

        scale: float = param(1.0, "how much")
        times: int = param(1, "how often")

    @method
    class MoreScaled(Scaled):
        """One of them set, and another."""

        name = "more_scaled"
        size: int = param(1, "how large")
        times = 2

    assert MoreScaled(scale=2).values == {"scale": 2.0, "size": 1}
    assert MoreScaled().times == 2


def test_methods() -> None:
    class Placeless(Method):
        """It has no stage."""

        name = "placeless"
        formula = "y"

    class Stateless(OutputMethod):
        """It learns nothing."""

        name = "stateless"
        formula = "y"

    class Idle(OutputMethod):
        """It computes nothing."""

        name = "idle"
        formula = "y"

        def state(self, site: Linear) -> dict[str, State]:
            return {}

    class Meaningless(WeightMethod):
        """It does not say what it means."""

        name = "meaningless"
        formula = "y"

        def state(self, site: Linear) -> dict[str, State]:
            return {}

        def rewrite(self, site: Linear, x: Tensor, y: Tensor) -> Tensor:
            return y

    class Misplaced(SublayerMethod):
        """Its place is no kind of site."""

        name = "misplaced"
        formula = "y"
        site = Tensor  # type: ignore[assignment]

        def state(self, site: Any) -> dict[str, State]:
            return {}

    refused(Placeless, "Placeless has no rewrites: take the base class of its stage from peftc.protocol.stages")
    refused(Stateless, "Stateless has no state: it says which tensors the method keeps at a site")
    refused(Idle, "Idle has no rewrite: it says what the method computes")
    refused(Meaningless, "Meaningless has neither delta nor fold", "`unmergeable`")
    refused(Misplaced, "Misplaced.site is <class 'torch.Tensor'>, and no kind of site")


def test_names_of_state() -> None:
    class Hiding(Moves):
        """Its state is called as an operand."""

        name = "hiding"

        def state(self, site: Linear) -> dict[str, State]:
            return {"weight": State((site.n_out,))}

        def rewrite(self, site: Linear, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return y

    class Typed(Moves):
        """Its state is called as a method of `torch.nn.Module`."""

        name = "typed"

        def state(self, site: Linear) -> dict[str, State]:
            return {"type": State((site.n_out,))}

        def rewrite(self, site: Linear, x: Tensor, y: Tensor, type: Tensor) -> Tensor:
            return y

    refused(Hiding, "Hiding keeps 'weight' as state: a rewrite is given something else by that name")
    refused(Typed, "Typed keeps 'type' as state: every torch module has 'type' already")


def test_storages() -> None:
    class Unpacked(Storage):
        """It never reads what it packs."""

        name = "unpacked"
        formula = "W"

        def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Buffer]:
            return {"all": Buffer(shape, dtype)}

        def pack(self, weight: Tensor) -> dict[str, Tensor]:
            return {"all": weight[:1]}

    refused(Unpacked, "Unpacked has no unpack: it makes the weight out of the buffers")
    weight = torch.zeros(4, 3)
    item: Any = PackedWeight(0, Unpacked(), "w", "p", (4, 3), weight.dtype, transposed=False, span=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Unpacked.pack makes .*\(1, 3\).* said to be .*\(4, 3\)"):
        item.pack(weight)


def test_fusions() -> None:
    class Patternless(Fusion):
        name = "patternless"

    class Valued(Fusion):
        name = "valued"
        pattern = value("x")

        def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
            return []

    class Idle(Fusion):
        name = "idle"
        pattern = add(value("x"), value("y"))

    for cls, words in (
        (Patternless, "Patternless has no pattern: it says what the rule looks for"),
        (Valued, "the pattern of Valued is no operation"),
        (Idle, "Idle has no rewrite: it says what stands there instead"),
    ):
        with pytest.raises(TypeError, match=words):
            fusion(cls)


def test_kinds_of_site() -> None:
    class Nowhere(Site):
        kind = "nowhere"
        own_roles = ("nowhere",)
        noun, nouns, written = "a place", "places", "nowhere"

    class Somewhere(Nowhere):
        @classmethod
        def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
            return iter(())

        def reads(self) -> tuple[fx.Node, ...]:
            return ()

        def changes(self) -> tuple[fx.Node, ...]:
            return ()

    @dataclass(frozen=True, eq=False, repr=False)
    class Wordless(Somewhere):
        noun = Site.noun

    for cls, words in (
        (Nowhere, "Nowhere has no find: it finds the places in a graph"),
        (Somewhere, "Somewhere lacks @dataclass"),
        (Wordless, "Wordless has no noun: it says in words what one of it is"),
    ):
        with pytest.raises(TypeError, match=words):
            site(cls)
