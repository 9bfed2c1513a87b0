"""What users do to a compiled model: unfreeze, freeze, cast, copy, pickle, hook and differentiate it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftc
from zoo import ZOO, inputs

LORA = "apply lora(r=4) to attn.*, mlp.*"
MIXED = "apply lora(r=4) to attn.*\napply adapter(size=3) to mlp\ntrain norm"
HEAD = "lm_head.weight"


def compiled(name: str = "llama", spec: str = LORA, *, fuse: bool = True, seed: int = 0) -> peftc.CompiledModule:
    """A zoo model whose adapters do something, so that no gradient is zero by chance."""
    torch.manual_seed(seed)
    model = peftc.compile(ZOO[name](), spec, fuse=fuse)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def made() -> peftc.CompiledModule:
    """For `copy.deepcopy`, which takes a fraction of a compile."""
    return compiled(spec=MIXED)


@pytest.fixture
def model(made: peftc.CompiledModule) -> peftc.CompiledModule:
    return copy.deepcopy(made)


def batch_of(model: peftc.CompiledModule) -> dict[str, Tensor]:
    return inputs(model.base)


def gradients(model: peftc.CompiledModule) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**batch_of(model)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(peftc.PeftcError, match=rf"error\[{code}\]"):
        yield


# ---- Unfreezing and freezing by hand --------------------------------------------------------------------------------


def assert_gradients_equal(fused: peftc.CompiledModule, unfused: peftc.CompiledModule) -> None:
    """Of the same tensors, and of all that learn."""
    found, expected = gradients(fused), gradients(unfused)
    learn = {name for name, parameter in fused.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in found.items() if gradient is not None} == learn
    for name in learn:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


FUSED = [
    pytest.param("llama", LORA, id="lora"),
    pytest.param("qwen2", "apply dora(r=4) to attn.*", id="dora"),
    pytest.param("mixtral", "apply lora(r=4) to expert, attn.q", id="experts"),
    pytest.param("gpt2", "apply lora(r=4) to attn.*\napply adapter(size=3) to mlp", id="tied"),
    pytest.param("bert", "apply lora(r=4) to attn.q", id="bert"),
    pytest.param("gpt2", "apply ia3 to attn.k, attn.v, mlp.down", id="ia3 on slices"),
    pytest.param("llama", "apply ia3 to attn.k, attn.v, mlp.down", id="ia3"),
]


@pytest.mark.parametrize(("name", "spec"), FUSED)
@pytest.mark.slow
def test_whatever_is_unfrozen_learns(name: str, spec: str) -> None:
    """All at once before the first step, then, with programs that were traced for other gradients, one by one."""
    models = [compiled(name, spec, fuse=fuse).eval() for fuse in (True, False)]
    frozen = [name for name, parameter in models[0].named_parameters() if not parameter.requires_grad]
    for model in models:
        model.requires_grad_(True)
    assert_gradients_equal(*models)
    few = [HEAD] if name == "llama" else frozen  # the others' ways are the same
    for model in models:
        for each in frozen:
            model.get_parameter(each).requires_grad_(False)
    assert_gradients_equal(*models)
    for each in few:
        for model in models:
            model.get_parameter(each).requires_grad_(True)
        assert_gradients_equal(*models)
        for model in models:
            model.get_parameter(each).requires_grad_(False)


@pytest.mark.slow
def test_what_is_frozen_by_hand_has_no_gradient(model: peftc.CompiledModule) -> None:
    before = {name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None}
    first, *_ = before
    model.get_parameter(first).requires_grad_(False)
    after = gradients(model)
    assert after.pop(first) is None
    for name, gradient in after.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, before[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def unfrozen(model: peftc.CompiledModule) -> peftc.CompiledModule:
    """Its head was unfrozen, made a step and was frozen again."""
    head = model.get_parameter(HEAD).requires_grad_(True)
    optimiser = torch.optim.SGD([head], lr=1.0)
    gradients(model)
    optimiser.step()
    head.requires_grad_(False)
    return model


@pytest.mark.slow
def test_a_state_dict_has_what_was_unfrozen(made: peftc.CompiledModule, unfrozen: peftc.CompiledModule) -> None:
    file = io.BytesIO()
    torch.save(unfrozen.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(made)
    assert set(unfrozen.state_dict()) == {*other.state_dict(), HEAD}
    other.load_state_dict(torch.load(file), strict=True)
    with torch.no_grad():
        assert torch.equal(other(**batch_of(other)).loss, unfrozen(**batch_of(other)).loss)
    assert not torch.equal(other.base.get_parameter(HEAD), other.get_parameter(HEAD))
    assert set(copy.deepcopy(other).state_dict()) == set(unfrozen.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_knows_what_was_unfrozen(
    model: peftc.CompiledModule, copied: Callable[[peftc.CompiledModule], peftc.CompiledModule], tmp_path: Path
) -> None:
    """Before the first step."""
    model.get_parameter(HEAD).requires_grad_(True)
    other = copied(model)
    before = other.base.get_parameter(HEAD).clone()
    optimiser = torch.optim.SGD([other.get_parameter(HEAD)], lr=1.0)
    gradients(other)
    optimiser.step()
    assert HEAD in other.state_dict()
    assert torch.equal(other.base.get_parameter(HEAD), before)
    with refused("not-in-spec"):
        other.save(tmp_path / "a")


def test_a_copy_of_a_frozen_model_is_saved(model: peftc.CompiledModule, tmp_path: Path) -> None:
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    other.save(tmp_path / "a")
    again = peftc.load(tmp_path / "a", model.base).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_torch_compile_notices_what_was_unfrozen(model: peftc.CompiledModule) -> None:
    head = model.get_parameter(HEAD).requires_grad_(True)
    before = model.base.get_parameter(HEAD).clone()
    fast = torch.compile(model, backend="eager")
    fast(**batch_of(model)).loss.backward()
    torch.optim.SGD([head], lr=1.0).step()
    head.requires_grad_(False)
    assert torch.equal(model.base.get_parameter(HEAD), before)
    assert HEAD in model.state_dict()


@pytest.mark.slow
def test_a_tied_weight_is_loaded_by_either_name() -> None:
    model = compiled("gpt2", "apply lora(r=4) to attn.*")
    table = model.base.get_parameter("transformer.wte.weight")
    before = table.clone()
    model.load_state_dict({HEAD: before + 1}, strict=False)
    assert torch.equal(table, before)
    assert torch.equal(model.get_parameter("transformer.wte.weight"), before + 1)
    assert {HEAD, "transformer.wte.weight"} & model.state_dict().keys()


def test_an_artifact_without_what_was_unfrozen_is_refused(unfrozen: peftc.CompiledModule, tmp_path: Path) -> None:
    with refused("not-in-spec"):
        unfrozen.save(tmp_path / "a")
    with refused("not-in-spec"):
        unfrozen.save_pretrained(tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_merged_model_has_what_was_unfrozen_and_the_base_model_has_not() -> None:
    model = compiled(spec="apply lora(r=4) to attn.q")
    names = [HEAD, "model.layers.0.self_attn.q_proj.weight"]
    optimiser = torch.optim.SGD([model.get_parameter(name).requires_grad_(True) for name in names], lr=0.1)
    gradients(model)
    optimiser.step()
    untouched = ZOO["llama"]()
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name)), name
        assert (parameter.data_ptr() == model.get_parameter(name).data_ptr()) == (name not in names)
    batch = batch_of(model)
    merged = model.merge()
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_weight_that_a_method_writes_cannot_be_unfrozen() -> None:
    model = compiled(spec="apply lora(r=2, init=pissa) to attn.q")
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(True)
    with refused("cannot-unfreeze"):
        gradients(model)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.func.functional_call(model, own, (), batch_of(model)).loss > 0
    weight.requires_grad_(False)
    gradients(model)


# ---- Casting and moving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_a_cast_is_refused_and_changes_nothing(model: peftc.CompiledModule, cast: object) -> None:
    assert callable(cast)
    before = gradients(model)
    with refused("fixed-precision"):
        cast(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    after = gradients(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), after.values(), strict=True)
        if a is not None and b is not None
    )


def test_a_cast_of_a_part_is_found_at_the_next_call(model: peftc.CompiledModule) -> None:
    model.get_submodule("model.layers.0").bfloat16()
    with refused("fixed-precision"), torch.no_grad():
        model(**batch_of(model))


def test_it_moves_and_is_shared(model: peftc.CompiledModule) -> None:
    before = model(**batch_of(model)).loss
    moved = model.cpu().to("cpu").to(torch.float32).float().share_memory()
    assert torch.equal(moved(**batch_of(model)).loss, before)
    assert model.to("meta").device.type == "meta"


# ---- Copies and files -----------------------------------------------------------------------------------------------


def test_pickling_is_refused(model: peftc.CompiledModule) -> None:
    with refused("no-pickle"):
        torch.save(model, io.BytesIO())
    with refused("no-pickle"):
        pickle.dumps(model)


def test_a_shallow_copy_has_the_same_tensors(model: peftc.CompiledModule) -> None:
    other = copy.copy(model)
    assert type(other).__name__ == type(copy.deepcopy(model)).__name__ == "LlamaForCausalLM"
    assert all(own is model.get_parameter(name) for name, own in other.named_parameters())
    assert torch.equal(other(**batch_of(model)).loss, model(**batch_of(model)).loss)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", MIXED),
        pytest.param("gpt2", "apply dora(r=2) to attn.q, mlp.*\ntrain norm", marks=pytest.mark.slow),
        pytest.param("t5", "apply prefix(length=3, reparam=8) to self.attn\ntrain norm", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_parameters_stand_in_one_order(name: str, spec: str, tmp_path: Path) -> None:
    """The base model's own, wherever a graph reads them; so an optimiser's state fits each of these models."""
    model, unfused = (compiled(name, spec, fuse=fuse) for fuse in (True, False))
    model.save(tmp_path)
    others = [unfused, copy.deepcopy(model), peftc.load(tmp_path, ZOO[name]())]
    names = [name for name, _ in model.named_parameters()]
    assert all([name for name, _ in other.named_parameters()] == names for other in others)
    assert all(list(other.state_dict()) == list(model.state_dict()) for other in others)
    base = [name for name, _ in model.base.named_parameters()]
    assert [name for name in names if name in base] == [name for name in base if name in names]


# ---- Hooks and what acts on modules ---------------------------------------------------------------------------------


def test_hooks_run_on_blocks_and_are_refused_elsewhere(model: peftc.CompiledModule) -> None:
    seen: list[str] = []
    block = model.get_submodule("model.layers.1")
    block.register_forward_hook(lambda *_: seen.append("forward"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    gradients(model)
    assert seen == ["forward", "backward"]
    with refused("never-called"):
        model.get_submodule("model.embed_tokens").register_forward_hook(lambda *_: None)


def test_what_acts_on_modules_is_said_to_be_the_base_models(model: peftc.CompiledModule) -> None:
    assert not hasattr(model, "resize_token_embeddings")
    with refused("on-the-base"):
        model.resize_token_embeddings(100)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = model.nonsense


# ---- Calls and gradients --------------------------------------------------------------------------------------------


def test_a_step_is_the_same_whatever_was_called_before(model: peftc.CompiledModule) -> None:
    batch = batch_of(model)
    before = {name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None}
    with torch.inference_mode():
        model(**batch)
    with torch.no_grad():
        model(**batch)
    assert model(input_ids=batch["input_ids"]).logits.requires_grad
    model.zero_grad()
    model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss.backward(retain_graph=True)
    for name, gradient in before.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name  # type: ignore[arg-type]


def test_gradients_add_up(model: peftc.CompiledModule) -> None:
    once = {name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None}
    model.zero_grad()
    loss = model(**batch_of(model)).loss
    loss.backward(retain_graph=True)
    loss.backward()
    model(**batch_of(model)).loss.backward()
    some = [*once][:2]
    few = torch.autograd.grad(model(**batch_of(model)).loss, [model.get_parameter(name) for name in some])
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 3 * gradient, rtol=1e-5, atol=1e-6)
    for name, gradient in zip(some, few, strict=True):
        torch.testing.assert_close(gradient, once[name], rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_to_learn_leaves_the_gradients_zero(model: peftc.CompiledModule) -> None:
    batch = batch_of(model)
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss.isnan()
    for parameter in model.trainable_parameters().values():
        assert parameter.grad is not None
        assert not parameter.grad.count_nonzero()


def test_other_tensors_in_place_of_its_own(model: peftc.CompiledModule) -> None:
    batch = batch_of(model)
    zero = {name: torch.zeros_like(parameter) for name, parameter in model.trainable_parameters().items()}
    found = torch.func.functional_call(model, zero, (), batch).loss
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.zero_()
    torch.testing.assert_close(found, model(**batch).loss)


def test_transforms_of_a_fused_model_are_refused(model: peftc.CompiledModule) -> None:
    """Its operations would lose a forward-mode tangent without a word."""
    batch = batch_of(model)
    own = {name: parameter.detach() for name, parameter in model.trainable_parameters().items()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, state, (), batch).loss
        return found

    with refused("transformed"):
        torch.func.grad(loss)(own)
    with torch.autograd.forward_ad.dual_level(), refused("transformed"):
        model(**batch)


@pytest.mark.slow
def test_transforms_of_an_unfused_model() -> None:
    model = compiled(fuse=False)
    own = {name: parameter.detach() for name, parameter in model.trainable_parameters().items()}
    found = torch.func.grad(lambda state: torch.func.functional_call(model, state, (), batch_of(model)).loss)(own)
    for name, gradient in gradients(model).items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)
