"""Of equal blocks one is traced: the graph is the one that a trace of each gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from captures import described
from peftc.capture.blocks.alike import deeds, groups_of
from peftc.capture.capture import Captured, _captured, capture
from peftc.capture.inputs import example_inputs
from peftc.capture.islands import Islands
from peftc.diagnostics.timings import Timings
from peftc.graph.ir import fake_mode, tensors
from peftc.graph.repeat import STANDS, repeated
from zoo import ZOO

QUICK = ("llama", "falcon", "mixtral")


def captured(model: nn.Module, example: Any = None, *, once: bool) -> Captured:
    return _captured(model, example_inputs(model, example), Timings(), Islands(model), once=once)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZOO])
def test_the_graph_is_the_one_of_a_trace_of_each(name: str) -> None:
    model = ZOO[name]()
    each, once = (described(captured(model, once=way), tensors(model)) for way in (False, True))
    for one, other in zip(each, once, strict=True):
        assert one == other


class Block(nn.Module):
    def __init__(self, index: int, use: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.index, self.use = index, use
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x + self.down(torch.relu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, use: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(index, use) for index in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * 2


def equal(_block: Block, y: Tensor) -> Tensor:
    return y


def times(block: Block, y: Tensor) -> Tensor:
    return y * block.index


def asks(block: Block, y: Tensor) -> Tensor:
    return y + 1 if isinstance(block.index, int) and block.index in (1, 3) else y


def quietly_asks(block: Block, y: Tensor) -> Tensor:
    index: int = vars(block).get("index", 1)
    return y * index


def asks_of_the_last(block: Block, y: Tensor) -> Tensor:
    return y + 1 if getattr(block, "index", 0) == 3 else y


def lists(block: Block, y: Tensor) -> Tensor:
    return y + [5, 6, 7, 8][block.index]


def writes(block: Block, y: Tensor) -> Tensor:
    block.last = str(y.shape[-1])  # type: ignore[assignment]
    return y


class Kept:
    """What a block leaves for the next is no argument of it."""

    last: Tensor | None = None

    def __call__(self, _block: Block, y: Tensor) -> Tensor:
        y = y if self.last is None else y + self.last
        self.last = y
        return y


def named(use: object) -> str:
    return str(getattr(use, "__name__", type(use).__name__ if isinstance(use, Kept) else use))


def writes_over(_block: Block, y: Tensor) -> Tensor:
    return y.mul_(3)


@pytest.mark.parametrize(
    "use", [equal, times, asks, quietly_asks, asks_of_the_last, lists, writes, writes_over, Kept()], ids=named
)
def test_numbers_are_those_of_the_model(use: Callable[[Block, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Stack(use), torch.randn(3, 5, 6)
    found = capture(model, example_inputs(model, x))
    if isinstance(use, Kept):
        assert use.last is None
    torch.testing.assert_close(found.module(x)[0], model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("use", "stood"),
    [
        (equal, 3),
        (writes_over, 3),
        (asks, 2),
        (asks_of_the_last, 2),
        (quietly_asks, 0),
        (times, 0),
        (lists, 0),
        (writes, 0),
        (Kept(), 0),
    ],
    ids=named,
)
def test_blocks_run_once_unless_they_look_at_what_tells_them_apart(
    use: Callable[[Block, Tensor], Tensor], stood: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standing(Stack(use), monkeypatch) == [stood]


def standing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many blocks one node stands, where the model is captured so."""
    seen: list[int] = []

    def counting(graph: fx.Graph, own: dict[str, Tensor]) -> Any:
        seen.append(len(graph.find_nodes(op="call_function", target=STANDS)))
        return repeated(graph, own)

    monkeypatch.setattr("peftc.capture.capture.repeated", counting)
    capture(model, example_inputs(model, torch.randn(3, 5, 6)))
    return seen


class Noted(Block):
    """The first ones have a part that others have not, and in it a number of their own."""

    def __init__(self, index: int) -> None:
        super().__init__(index, equal)
        if index < 2:
            self.note = nn.Identity()
            self.note.number = index  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if hasattr(self, "note") else 3)


def test_blocks_of_a_group_may_have_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack(equal), torch.randn(3, 5, 6)
    model.blocks = nn.ModuleList(Noted(index) for index in range(5))
    assert standing(model, monkeypatch) == [3]
    found = capture(model, example_inputs(model, x))
    torch.testing.assert_close(found.module(x)[0], model(x), rtol=0, atol=0)


class Odd(Block):
    """Reads of a thing of its own, in a way of its own, what is another in the fourth."""

    def __init__(self, index: int, how: str) -> None:
        super().__init__(index, equal)
        self.how, self.own = how, {"kept": [0.0, -0.0][index == 3]}
        if how == "a closure":
            self.way = self._made(index == 3)
        if how == "a tensor":
            self.kept = [torch.ones(6) * (1 + (index == 3))]

    @staticmethod
    def _made(last: bool) -> Callable[[Tensor], Tensor]:
        return lambda y: y * 3 if last else y

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        match self.how:
            case "a dict":
                return y + torch.copysign(torch.ones(6), torch.tensor(self.own["kept"]))
            case "a closure":
                return self.way(y)
            case "a tensor":
                return y * self.kept[0]
        return y


@pytest.mark.parametrize("how", ["a dict", "a closure", "a tensor", "nothing"])
def test_what_only_the_last_has_is_seen(how: str) -> None:
    model, x = Stack(equal), torch.randn(3, 5, 6)
    model.blocks = nn.ModuleList(Odd(index, how) for index in range(4))
    found = capture(model, example_inputs(model, x))
    torch.testing.assert_close(found.module(x)[0], model(x), rtol=0, atol=0)


def test_a_block_that_can_reach_the_same_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four has a number of its own, which it does not read: the first and the second run, then the first,
    without its number."""
    ran: list[int] = []

    def doing(block: nn.Module, *given: Any) -> Any:
        ran.append(vars(block).get("index", -1))
        return deeds(block, *given)

    monkeypatch.setattr("peftc.capture.blocks.once.deeds", doing)
    model = Stack(equal)
    before = [list(vars(block)) for block in model.blocks]
    capture(model, example_inputs(model, torch.randn(3, 5, 6)))
    assert ran == [0, 1, -1]
    assert [list(vars(block)) for block in model.blocks] == before
    assert [block.index for block in model.blocks] == [0, 1, 2, 3]


def test_blocks_of_other_kinds_are_no_group() -> None:
    model = Stack(equal)
    model.blocks[1].up.weight = model.blocks[0].up.weight  # type: ignore[union-attr]
    model.blocks[2].requires_grad_(False)
    assert groups_of(model) == [("blocks.0", "blocks.1")]  # of the one and the same


class Settings:
    """What a model keeps for its blocks, and they read."""

    factor = 1.0
    first: Tensor | None = None


class Reader(Block):
    """Reads what its model has set meanwhile."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(0, equal)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.settings.factor
        return y if self.settings.first is None else y + self.settings.first


class Setter(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.settings = how, Settings()
        self.blocks = nn.ModuleList(Reader(self.settings) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            if self.how == "a number":
                self.settings.factor = 1.0 + place
            if self.how == "an argument":  # of the first block, and still there for the others
                self.settings.first = x if place == 0 else self.settings.first
            with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast" and place > 1):
                x = block(x)
        return x


class Shared(nn.Module):
    """Two parts in turn, of which each block has one."""

    def __init__(self) -> None:
        super().__init__()
        parts = [Block(0, equal), Block(0, equal)]
        self.blocks = nn.ModuleList(nn.Sequential(parts[place % 2], nn.Linear(6, 6)) for place in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Gated(nn.Module):
    """Returns a parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.gate = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.gate


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, gate = block(x)
            x = x * gate
        return x


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{how: lambda how=how: Setter(how) for how in ("nothing", "a number", "an argument", "autocast")},  # type: ignore[misc]
    "shared parts": Shared,
    "gates": Gates,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_block_does_is_seen_and_not_taken_for_granted(name: str) -> None:
    torch.manual_seed(0)
    model, x = OTHERS[name](), torch.randn(3, 5, 6)
    found = capture(model, example_inputs(model, x))
    torch.testing.assert_close(found.module(x)[0], model(x), rtol=0, atol=0)


def test_shapes_are_kept_again_once_a_model_is_traced() -> None:
    def tells(_block: Block, y: Tensor) -> Tensor:
        assert not torch._dynamo.config.fake_tensor_cache_enabled
        return y

    graph = captured(Stack(tells), {"x": torch.randn(2, 6)}, once=False).module.graph
    assert torch._dynamo.config.fake_tensor_cache_enabled
    assert fake_mode(graph).cache_enabled
