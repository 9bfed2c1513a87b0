"""Methods that start from data: where FISH puts its mask, what EVA makes of inputs, and batches that are no use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import eva
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import save_file
from torch import Tensor, nn

import peftc
from peftc.capture.inputs import example_inputs
from peftc.cli import main
from peftc.diagnostics.timings import Timings
from peftc.driver import calibration, planned
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from peftc.rewrite.weights import dense_weight
from peftc.spec.check import intend
from zoo import VOCABULARY, ZOO

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

FISH = "apply fish(keep=0.05) to attn.q, attn.v, mlp.up"
EVA = "apply lora(r=4, init=eva) to attn.q, attn.v, mlp.up, mlp.down"
Batch = dict[str, Tensor]


def batch(seed: int, length: int = 7, rows: int = 3) -> Batch:
    """Texts of different lengths, padded on the right; labels where there is text."""
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask == 1, tokens, -100)}


BATCHES = [batch(0), batch(1, length=9, rows=2)]


@cache
def base(name: str) -> Any:
    return ZOO[name]().eval()


@cache
def _plan(name: str, spec: str) -> Any:
    return planned.plan_model(base(name), intend(spec), example_inputs(base(name)), Timings())


def observed(name: str, spec: str, batches: Iterable[Any]) -> dict[Binding, Any]:
    """What calibration sees, without a compile for each question."""
    return calibration.observed(_plan(name, spec), batches)


@cache
def compiled(name: str, spec: str) -> peftc.CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peftc.compile(base(name), spec, calibration=BATCHES)


def state(model: peftc.CompiledModule, binding: Binding) -> dict[str, Tensor]:
    return {name: get_attribute(model, full).detach() for name, full in binding.names.items()}


# ---- FISH ----------------------------------------------------------------------------------------------------------


@cache
def fisher(name: str) -> dict[str, Tensor]:
    """Sums of squared gradients of the Hugging Face model itself, by one backward pass for each example."""
    model = copy.deepcopy(base(name)).requires_grad_(True)
    sums = {key: torch.zeros_like(parameter) for key, parameter in model.named_parameters()}
    for given in BATCHES:
        for row in range(len(given["labels"])):
            model.zero_grad()
            model(**{key: tensor[row : row + 1] for key, tensor in given.items()}).loss.backward()
            for key, parameter in model.named_parameters():
                sums[key] += parameter.grad.square()
    return sums


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fish_trains_the_places_of_most_information(name: str) -> None:
    model = compiled(name, FISH)
    for binding in model.plan.bindings:
        site = binding.site
        expected = dense_weight(fisher(name)[site.weight], site)  # type: ignore[attr-defined, arg-type]
        count = round(0.05 * expected.numel())
        mask = torch.zeros(expected.numel(), dtype=torch.bool)
        places = state(model, binding)["places"]
        mask[places] = True
        assert mask.sum() == count == len(places)
        ranked = expected.flatten().sort(descending=True)
        # exactly the largest, but for what fp32 cannot rank
        assert expected.flatten()[mask].min() >= ranked.values[count - 1] * (1 - 1e-4)
        assert mask[ranked.indices[: count // 2]].all()


def test_fish_sums_over_batches_in_any_cut() -> None:
    """Two batches at once, one after the other, or one example at a time; and from a generator."""
    whole = observed("gpt2", FISH, BATCHES)
    parts = [observed("gpt2", FISH, [part]) for part in BATCHES]
    rows = (
        {key: tensor[row : row + 1] for key, tensor in given.items()}
        for given in BATCHES
        for row in range(len(given["labels"]))
    )
    single = observed("gpt2", FISH, rows)
    for binding, found in whole.items():
        assert found.any()
        torch.testing.assert_close(parts[0][binding] + parts[1][binding], found, rtol=1e-5, atol=0)
        torch.testing.assert_close(single[binding], found, rtol=1e-5, atol=0)


def test_fish_does_not_see_what_is_padding() -> None:
    """Other tokens under the mask, labelled -100, change no gradient."""
    given = BATCHES[0]
    other = {**given, "input_ids": torch.where(given["attention_mask"] == 1, given["input_ids"], 5)}
    assert not torch.equal(other["input_ids"], given["input_ids"])
    one, two = observed("gpt2", FISH, [given]), observed("gpt2", FISH, [other])
    for binding, found in one.items():
        torch.testing.assert_close(two[binding], found, rtol=1e-4, atol=1e-12)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = ZOO["gpt2"]().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # a caller's habit
        made = peftc.compile(model, FISH, calibration=BATCHES)
    assert model.training
    assert made.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name.rsplit(".", 1)[1] for name in made.trainable_parameters()} == {"values"}
    for binding in made.plan.bindings:  # seen in eval mode: dropout would have made other places of them
        full = binding.names["places"]
        assert torch.equal(get_attribute(made, full), get_attribute(compiled("gpt2", FISH), full))


# ---- EVA -----------------------------------------------------------------------------------------------------------


def hooked(name: str, modules: Iterable[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The inputs of modules of the Hugging Face model over all tokens that are no padding, [tokens, n_in]."""
    seen: dict[str, list[Tensor]] = {module: [] for module in modules}
    model, handles = base(name), []
    mask: Tensor

    def watch(module: str) -> Callable[..., None]:
        return lambda _module, args, _result: seen[module].append(args[0][mask].double())

    for module in seen:
        handles.append(model.get_submodule(module).register_forward_hook(watch(module)))
    with torch.no_grad():
        for given in batches:
            mask = given["attention_mask"].bool()
            model(**given)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(found) for module, found in seen.items()}


def up_to_sign(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Rows are equal but for their signs."""
    cosines = torch.nn.functional.cosine_similarity(actual.double(), expected.double())
    torch.testing.assert_close(actual.double(), cosines.sign()[:, None] * expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eva_starts_from_the_singular_vectors_of_the_inputs(name: str) -> None:
    model = compiled(name, EVA)
    bindings = {binding: binding.site.parameters[0].removesuffix(".weight") for binding in model.plan.bindings}
    inputs = hooked(name, set(bindings.values()), BATCHES)
    for binding, module in bindings.items():
        a = state(model, binding)["A"]
        assert not state(model, binding)["B"].any()
        _, singular, right = torch.linalg.svd(inputs[module], full_matrices=False)
        # rows are as certain as their singular values are apart: fp32's 1e-7 over the relative gap
        gap = ((singular[:4] - singular[1:5]) / singular[0]).min().item()
        assert gap > 1e-3
        up_to_sign(a, right[:4], 1e-6 / gap)
        torch.testing.assert_close(a @ a.t(), torch.eye(4), rtol=0, atol=1e-5)


def test_eva_is_hf_pefts_but_for_its_centring(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF PEFT runs an incremental PCA, which takes the mean out of the inputs; the paper has a plain SVD.

    With each input given twice, once negative, the mean is zero and the singular vectors are the same. One batch:
    the incremental kind loses what it cuts off between batches. HF leaves tokens out that have no label, too; here
    those are the padding. Its randomised SVD is replaced by the exact one that it has, too.
    """
    monkeypatch.setattr(eva, "IncrementalPCA", lambda n_components, **_: IncrementalPCA(n_components, copy=True))
    given = BATCHES[0]
    modules = [f"model.layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("q_proj", "v_proj")]
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.99),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base("llama")), config, low_cpu_mem_usage=True)

    def both_signs(layer_input: Any, model_input: Any, _name: str) -> Tensor:
        x = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        kept = x[model_input[:, 0], model_input[:, 1]]
        return torch.cat([kept, -kept])

    peft.initialize_lora_eva_weights(theirs, [given] * 3, prepare_layer_inputs_fn=both_signs, show_progress_bar=False)
    seen = {
        binding.site.parameters[0].removesuffix(".weight"): moments
        for binding, moments in observed("llama", EVA, [given]).items()
    }
    for module in modules:
        a = theirs.get_parameter(f"base_model.model.{module}.lora_A.default.weight")
        ours = torch.linalg.eigh(seen[module]).eigenvectors.flip(1)[:, :4].t()
        up_to_sign(a.detach(), ours, 1e-4)  # theirs in fp32


def test_eva_leaves_padding_out_and_needs_no_labels() -> None:
    unlabelled = [{key: tensor for key, tensor in given.items() if key != "labels"} for given in BATCHES]
    other = [{**g, "input_ids": torch.where(g["attention_mask"] == 1, g["input_ids"], 5)} for g in unlabelled]
    expected = observed("llama", EVA, BATCHES)
    for batches in (unlabelled, other):
        for binding, found in observed("llama", EVA, batches).items():
            torch.testing.assert_close(found, expected[binding], rtol=1e-6, atol=1e-6)


def test_eva_masks_an_encoder_and_not_its_decoder() -> None:
    """Both are six tokens long: the mask is about the encoder's, whatever the decoder's length."""
    given = {**batch(0, length=6), "labels": batch(1, length=6)["input_ids"]}
    stacks = ("encoder", "decoder")
    modules = {stack: f"{stack}.block.1.layer.0.SelfAttention.q" for stack in stacks}
    found = observed("t5", "apply lora(r=4, init=eva) to self.attn.q in layers[1]", [given])
    moments = {binding.site.parameters[0].removesuffix(".weight"): data for binding, data in found.items()}
    inputs = hooked("t5", modules.values(), [given])["encoder.block.1.layer.0.SelfAttention.q"]
    torch.testing.assert_close(moments[modules["encoder"]], inputs.t() @ inputs, rtol=1e-5, atol=1e-5)
    every = hooked("t5", modules.values(), [{**given, "attention_mask": torch.ones(3, 6).long()}])
    assert len(every[modules["decoder"]]) == 18
    trace = every[modules["decoder"]].square().sum().item()  # the norm makes every token about as long
    assert moments[modules["decoder"]].trace().item() == pytest.approx(trace, rel=0.05)


# ---- Plain modules -------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x,), lambda x: [x]], ids=["tensor", "tuple", "list"])
def test_eva_of_a_plain_module(kind: Callable[[Tensor], Any]) -> None:
    module, x = plain(), torch.randn(20, 5)
    first = module.get_submodule("0")
    made = peftc.compile(module, "apply lora(r=2, init=eva) to linear", example=x[:3], calibration=[kind(x)])
    for binding, seen in zip(made.plan.bindings, (x, torch.tanh(first(x))), strict=True):
        right = torch.linalg.svd(seen.double(), full_matrices=False).Vh
        up_to_sign(state(made, binding)["A"], right[:2], 1e-4)


def test_fish_needs_a_loss() -> None:
    with pytest.raises(peftc.PeftcError, match="Sequential returns no loss to take gradients of"):
        peftc.compile(plain(), "apply fish to linear", example=torch.zeros(3, 5), calibration=[torch.zeros(3, 5)])


# ---- Batches that are no use ---------------------------------------------------------------------------------------


def test_without_batches_the_statement_is_shown() -> None:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile("no model is read", f"train norm\n{FISH}\napply lora(r=4, init=eva) to mlp.down")
    assert str(raised.value) == NO_DATA


NO_DATA = """
error[needs-calibration]: fish starts from data, and there is none
 --> <spec>:2:1
2 | apply fish(keep=0.05) to attn.q, attn.v, mlp.up
  | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  = pass calibration=, some batches as the model is called; on the command line, --calibration FILE

error[needs-calibration]: lora starts from data, and there is none
 --> <spec>:3:1
3 | apply lora(r=4, init=eva) to mlp.down
  | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""[1:-1]
LABELLED = batch(0)


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([], "there are no batches"),
        ([LABELLED, {"input_ids": LABELLED["input_ids"]}], "a batch has no labels"),
        ([{"labels": LABELLED["labels"]}], "the compiled model needs input_ids"),
        ([{**LABELLED, "inputs_ids": LABELLED["labels"]}], "the compiled model has no input inputs_ids; it takes"),
        (LABELLED, "input_ids is a str, and the model takes a tensor"),
        ([{**LABELLED, "labels": [[1, 2]]}], "labels is a list, and the model takes a tensor"),
        ([{**LABELLED, "input_ids": torch.rand(3, 7)}], "input_ids is float32 of 2 dimensions, and the model takes"),
        ([{k: v[0] for k, v in LABELLED.items()}], "input_ids is int64 of 1 dimensions, and the model takes"),
        ([{k: v[:0] for k, v in LABELLED.items()}], "input_ids is empty"),
        ([{**LABELLED, "labels": torch.full((3, 7), -100)}], "the loss of an example is nan, as where every label"),
    ],
)
def test_batches_that_cannot_be_used(batches: Any, reason: str) -> None:
    with pytest.raises(peftc.PeftcError, match=reason) as raised:
        observed("gpt2", FISH, batches)
    assert raised.value.diagnostics[0].code == "bad-calibration"


# ---- The command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2 as a folder, eleven examples, and a spec that wants them."""
    made = tmp_path_factory.mktemp("calibration")
    base("gpt2").save_pretrained(made / "model")
    (made / "fish.peft").write_text(FISH)
    save_file(batch(3, rows=11, length=20), made / "good.safetensors")
    return made


def test_the_command_line_reads_batches_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [str(folder / name) for name in ("fish.peft", "model")]
    file = str(folder / "good.safetensors")
    status = main(["compile", *where, "--calibration", file, "-o", str(folder / "artifact")])
    assert (status, capsys.readouterr().err) == (0, "")
    loaded = peftc.load(folder / "artifact")
    read = calibration.read_batches(Path(file))
    assert [len(given["labels"]) for given in read] == [8, 3]
    expected = observed("gpt2", FISH, [batch(3, rows=11, length=20)])
    for binding, data in zip(loaded.plan.bindings, expected.values(), strict=True):
        places = state(loaded, binding)["places"]
        least = data.flatten().topk(len(places)).values.min()
        assert data.flatten()[places].min() >= least * (1 - 1e-4)


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        (None, "needs-calibration", "on the command line, --calibration FILE"),
        ("absent.safetensors", "bad-calibration", "cannot be read: there is no such file"),
        ("fish.peft", "bad-calibration", "is no .safetensors file, or was cut short"),
        ("cut.safetensors", "bad-calibration", "is no .safetensors file, or was cut short"),
        ("empty.safetensors", "bad-calibration", "there are no batches"),
        ("uneven.safetensors", "bad-calibration", "differ in how many examples they hold: input_ids 3, labels 2"),
        ("unknown.safetensors", "bad-calibration", "has no input tokens; it takes input_ids, attention_mask, labels"),
    ],
)
def test_files_that_cannot_be_used(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str | None, code: str, words: str
) -> None:
    given = batch(3)
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:200])
    save_file({}, folder / "empty.safetensors")
    save_file({"input_ids": given["input_ids"], "labels": given["labels"][:2]}, folder / "uneven.safetensors")
    save_file({**given, "tokens": given["labels"].clone()}, folder / "unknown.safetensors")
    arguments = ["compile", str(folder / "fish.peft"), str(folder / "model")]
    status = main(arguments + (["--calibration", str(folder / file)] if file else []))
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert f"error[{code}]" in captured.err
    assert words in captured.err
