"""A captured graph is used for the sizes that it was captured for; for others there is another graph, or a refusal."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftc
from peftc.runtime import module as runtime

SPEC = "apply lora(r=2) to linear"
LENGTHS = [(2, 6), (1, 6), (3, 1), (2, 7), (2, 8), (2, 12), (5, 9)]


class Asks(nn.Module):
    """Tokens, of which something is computed that may depend on how many there are."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.fc(nn.functional.one_hot(x, 8).to(self.fc.weight.dtype)))


# What a model does, with the lengths of LENGTHS for which the graph of length 6 is not.
ASKS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "nothing": (lambda y: y.cumsum(1), 0),
    "a smaller of two": (lambda y: y.sum(1) / min(y.shape[1], 8), 0),
    "a padding": (lambda y: nn.functional.pad(y, (0, 0, 0, -y.shape[1] % 4)).reshape(y.shape[0], -1, 4, 8).sum(2), 0),
    "a window": (lambda y: y.flip(1) if y.shape[1] > 8 else y, 2),
    "a rest": (lambda y: y if y.shape[1] % 4 else -y, 2),
    "a batch": (lambda y: y if y.shape[0] < 5 else -y, 1),
    "one": (lambda y: -y if y.shape[1] == 1 else y, 1),
    "a slice": (lambda y: y[:, :8].sum(1) / y[:, :8].shape[1], 2),
    "chunks": (lambda y: torch.cat([part.cumsum(1) for part in y.split(4, 1)], 1), 3),
    "a number": (lambda y: y * int(y.shape[1]), 5),
    "a loop": (lambda y: torch.stack([y[:, place] * place for place in range(y.shape[1])]), 5),
}


def _compiled(then: Callable[[Tensor], Tensor]) -> tuple[nn.Module, peftc.CompiledModule]:
    torch.manual_seed(0)
    model = Asks(then).double()
    return model, peftc.compile(model, SPEC, example=torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("asked", ASKS)
def test_other_sizes_than_the_captured_ones_give_the_models_result(asked: str) -> None:
    then, others = ASKS[asked]
    model, compiled = _compiled(then)
    for shape in LENGTHS:
        x = torch.randint(8, shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12, msg=f"at {shape}")
    assert (len(compiled.other_graphs) > 0) is (others > 0)
    assert len(compiled.other_graphs) <= others


@pytest.mark.parametrize("asked", ["a window", "a number", "chunks"])
def test_without_another_graph_they_are_refused_at_the_models_line(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MOST_GRAPHS", 1)
    model, compiled = _compiled(ASKS[asked][0])
    x = torch.randint(8, (3, 12))
    with pytest.raises(peftc.PeftcError) as refused:
        compiled(x)
    (problem,) = refused.value.diagnostics
    assert problem.code == "other-sizes"
    assert "x [3, 12]" in problem.title
    assert Path(__file__).name in problem.notes[0]
    assert asked == "chunks" or "x.shape[1]" in problem.title
    x = torch.randint(8, (3, 6))
    torch.testing.assert_close(compiled(x), model(x))


def test_all_graphs_of_a_model_train_the_same_tensors() -> None:
    """Steps of two lengths, one on either side of the branch, are the steps of one graph that has both sides."""
    model, compiled = _compiled(ASKS["a window"][0])
    optimizer = torch.optim.SGD(compiled.param_groups(lr=0.1))
    for step, length in enumerate((6, 12, 7, 11)):
        torch.manual_seed(step)
        x, target = torch.randint(8, (2, length)), torch.randn(2, length, 8, dtype=torch.double)
        merged = compiled.merge()
        torch.testing.assert_close(compiled(x), merged(x))
        (compiled(x) - target).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(compiled.other_graphs) == 1
    (other,) = compiled.other_graphs
    assert all(other.get_parameter(name) is p for name, p in compiled.trainable_parameters().items())
    assert not torch.equal(merged(x), model(x))
    copied = compiled.__deepcopy__({})
    torch.testing.assert_close(copied(x), compiled(x))
    assert copied.other_graphs[0] is not other


@pytest.mark.slow
@pytest.mark.whole
def test_a_graph_for_other_sizes_takes_packed_weights_and_prompts() -> None:
    config = hf.DogeConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        keep_window_size=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = hf.DogeForCausalLM(config).eval()
    spec = "quantize linear except head with nf4\napply lora(r=2) to attn.q\napply prompt(length=3)"
    at_five, at_ten = (peftc.compile(base, spec, example=_tokens(length)) for length in (5, 10))
    state = {
        name: torch.randn_like(tensor) for name, tensor in at_five.state_dict().items() if tensor.is_floating_point()
    }
    for compiled in (at_five, at_ten):
        compiled.load_state_dict(state, strict=False)
    for length in (5, 6, 10):  # with the prompt 8, which is the window, 9 and 13
        given = _tokens(length)
        for training in (True, False):
            torch.testing.assert_close(
                at_five.train(training)(**given).loss, at_ten.train(training)(**given).loss, rtol=1e-6, atol=1e-6
            )  # the fused operations are the same, their order of sums not
    assert [len(compiled.other_graphs) for compiled in (at_five, at_ten)] == [1, 1]


def _tokens(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids}


class TwoSided(nn.Module):
    """Longer inputs go through another layer, too."""

    def __init__(self, *, short: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.short = short

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        return self.second(h) if bool(x.shape[1] > 6) is not self.short else h


@pytest.mark.parametrize("short", [False, True])
def test_where_the_spec_would_mean_other_layers_a_call_is_refused(short: bool) -> None:
    compiled = peftc.compile(TwoSided(short=short), SPEC, example=torch.randn(2, 4, 8))
    compiled(torch.randn(3, 4, 8))
    with pytest.raises(peftc.PeftcError, match="other-sizes"):
        compiled(torch.randn(2, 9, 8))


def test_hooks_and_modes_of_blocks_hold_in_every_graph() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True) for _ in range(2)]
    compiled = peftc.compile(nn.Sequential(*layers), SPEC, example=torch.randn(2, 4, 8)).eval()
    calls: list[nn.Module] = []
    compiled.get_submodule("0").register_forward_hook(lambda block, *_: calls.append(block))
    x = torch.randn(2, 9, 8)
    first = compiled(x)
    torch.testing.assert_close(compiled(x), first)
    compiled.get_submodule("1").train()
    assert not torch.equal(compiled(x), first)
    compiled(torch.randn(2, 4, 8))
    assert len(calls) == 4


def test_a_graph_is_captured_in_any_surroundings() -> None:
    model, compiled = _compiled(ASKS["a window"][0])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(torch.randint(8, (2, 12)))
    x = torch.randint(8, (2, 13))
    torch.testing.assert_close(compiled(x), model(x))
    plain = nn.Sequential(nn.Linear(8, 8))
    with torch.inference_mode():
        linear = peftc.compile(plain, SPEC, example=torch.randn(2, 4, 8))
        linear(torch.randn(2, 5, 8))
    linear(torch.randn(2, 5, 8)).sum().backward()


def test_what_was_refused_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MOST_GRAPHS", 1)
    _, compiled = _compiled(ASKS["a window"][0])
    x = torch.randint(8, (2, 12))
    seen = weakref.ref(x)
    for _ in range(2):
        with pytest.raises(peftc.PeftcError, match="other-sizes"):
            compiled(x)
    del x
    gc.collect()
    assert seen() is None


def test_calibration_is_held_to_the_sizes() -> None:
    model = Asks(ASKS["a window"][0])
    spec, example = 'apply lora(r=2, init="eva") to linear', torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(peftc.PeftcError, match="other-sizes"):
        peftc.compile(model, spec, example=example, calibration=[torch.zeros(2, 12, dtype=torch.long)])


def test_numbers_of_any_length_share_one_graph() -> None:
    """Of a plain model's inputs of floats only the batch is known to differ, until another size is met."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).double()
    compiled = peftc.compile(model, SPEC, example=torch.randn(2, 6, 5, dtype=torch.double)).eval()
    for shape in ((2, 6), (2, 9), (3, 4), (1, 13)):
        x = torch.randn(*shape, 5, dtype=torch.double)
        torch.testing.assert_close(compiled(x), model.eval()(x))
    assert len(compiled.other_graphs) <= 2


def test_what_torch_compile_traces_is_refused() -> None:
    _, compiled = _compiled(ASKS["a window"][0])
    traced = torch.compile(compiled, backend="eager", dynamic=True)
    for length in (6, 8):
        x = torch.randint(8, (2, length))
        torch.testing.assert_close(traced(x), compiled(x))
    with pytest.raises(peftc.PeftcError, match="other-sizes"):
        traced(torch.randint(8, (2, 12)))
