"""`quantize`: what the plan says of it, what is in memory, and models that hold packed weights through their life."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftc
from marks import first_is_quick
from peftc.graph.ir import get_attribute
from peftc.protocol.site import Projection
from peftc.rewrite.packed import frozen_weight
from zoo import ZOO, inputs

torch.set_num_threads(1)

LORA = "apply lora(r=4, alpha=8) to attn.*, mlp.*"
SLOW = pytest.mark.slow
STACKED = ["mixtral", "gpt_oss"]  # experts, in the second transposed
OTHERS = ["gpt2", "falcon", "t5", *STACKED]  # transposed, by a matmul, tied
STORAGES = ["nf4", "nf4(double=true)", "fp4(double=true)", "int8"]


@cache
def base_of(name: str) -> PreTrainedModel:
    """One for all tests of a process, which share its capture; compiling leaves it as it is."""
    return ZOO[name]()


def compiled(base: nn.Module, spec: str, seed: int = 0, *, fuse: bool = True) -> peftc.CompiledModule:
    torch.manual_seed(seed)
    return peftc.compile(base, spec, fuse=fuse)


def rounded(model: peftc.CompiledModule) -> PreTrainedModel:
    """The base model with the weights that the compiled one computes with: a plain module."""
    base = copy.deepcopy(model.base)
    assert isinstance(base, PreTrainedModel)
    with torch.no_grad():
        for name in model.plan.packed:
            get_attribute(base, name).copy_(frozen_weight(model, model.plan, name))
    return base


def randomise(model: peftc.CompiledModule) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


# ---- What is packed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", first_is_quick(STORAGES))
@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2", *STACKED]))
def test_the_plan_counts_the_bytes_that_are_there(name: str, storage: str) -> None:
    base = base_of(name)
    spec = f"quantize linear except head with {storage}\napply lora(r=4) to attn.*"
    planned = peftc.plan(base, spec)
    model = compiled(base, spec)
    tensors = {id(t): t for t in (*model.parameters(), *(b for n, b in model.named_buffers() if "rotary" not in n))}
    assert planned.memory().weights == sum(tensor.nbytes for tensor in tensors.values())
    assert model.plan.memory().weights == planned.memory().weights  # the graph is used up by then
    packed = sum(get_attribute(model, full).nbytes for item in planned.packed.values() for full in item.buffers)
    (row,) = [row for row in planned.rows if row.packed is not None]
    assert row.packed == packed
    assert row.dense == sum(get_attribute(base, weight).nbytes for weight in planned.packed)
    assert {weight for weight, _ in model.named_parameters()}.isdisjoint(planned.packed)
    assert planned.to_json()["stored"][0]["storage"] == repr(next(iter(planned.packed.values())).storage)


def test_a_fused_weight_is_stored_once_and_as_a_whole() -> None:
    model = compiled(base_of("gpt2"), f"quantize attn.q with nf4\nquantize mlp.up with int8\n{LORA}")
    assert [*model.plan.packed] == [
        f"transformer.h.{layer}.{leaf}.weight" for leaf in ("attn.c_attn", "mlp.c_fc") for layer in (0, 1)
    ]
    item = model.plan.packed["transformer.h.0.attn.c_attn.weight"]
    assert item.shape == (96, 32)  # rows are output features, as bitsandbytes packs it, and not as the model has it
    code = {str(node.target) for graph in model.history.values() for node in graph.nodes}
    assert {"peftc.dequantize_4bit.default", "peftc.dequantize_int8.default"} <= code


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_it_computes_with_the_rounded_weights(name: str) -> None:
    """Outputs and gradients of a plain model whose weights the test itself has rounded."""
    base = base_of(name)
    batch = inputs(base)
    model = compiled(base, "quantize linear except head with nf4(double=true)\ntrain norm", fuse=False)
    plain = rounded(model)
    for mode in (model, plain):
        mode.train()
        torch.manual_seed(0)
        mode(**batch).loss.backward()
    for key, parameter in model.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, get_attribute(plain, key).grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)


@pytest.mark.slow
def test_storage_stands_first_wherever_it_is_written() -> None:
    base = base_of("llama")
    outputs = []
    for lines in ([LORA, "quantize attn.* with nf4"], ["quantize attn.* with nf4", LORA]):
        model = compiled(base, "\n".join(lines)).eval()
        assert [*model.history].index("storage") < [*model.history].index("weight methods")
        outputs.append(model(**inputs(base)).logits)
    assert torch.equal(*outputs)


def test_no_unpacked_weight_is_kept_for_the_backward_pass() -> None:
    """It is unpacked again: a step keeps what it keeps over dense weights, and no more."""
    base = base_of("llama")
    kept = [bytes_kept(compiled(base, spec), inputs(base)) for spec in (LORA, f"quantize linear with nf4\n{LORA}")]
    assert kept[0] == kept[1]


def bytes_kept(model: peftc.CompiledModule, batch: dict[str, Tensor]) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(found.values())


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph() -> None:
    base = base_of("llama")
    model, batch = compiled(base, f"quantize linear with nf4(double=true)\n{LORA}"), inputs(base)
    compiled_again = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_again(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)


# ---- Through a model's life --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", first_is_quick(["lora(r=4)", "lora(r=4, init=pissa)", "relora(every=2)", "dora(r=4)"])
)
def test_saved_loaded_and_copied(method: str, tmp_path: Path) -> None:
    base = base_of("llama")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    batch = inputs(base)
    model = compiled(base, f"quantize attn.*, mlp.* with nf4(double=true)\napply {method} to attn.q, mlp.down")
    optimizer = torch.optim.AdamW(model.param_groups(1e-2))
    model.follow(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval().save(tmp_path / "artifact")
    expected = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(peftc.load(tmp_path / "artifact", base).eval()(**batch).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
        again = compiled(base, model_spec(model), seed=5).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(**batch).logits, expected)
    assert not any("nf4" in key for key in model.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def model_spec(model: peftc.CompiledModule) -> str:
    from peftc.files.artifact import flattened

    return flattened(model.plan.spec)


@pytest.mark.slow
def test_a_cast_leaves_the_packed_numbers_alone() -> None:
    """To the precision that all else has already: rounding the scales would change every weight."""
    base = copy.deepcopy(base_of("llama")).bfloat16()
    model = peftc.compile(base, "quantize attn.* with nf4(double=true)\ntrain norm")
    item = next(iter(model.plan.packed.values()))
    before = {full: get_attribute(model, full).clone() for full in item.buffers}
    assert torch.float32 in {tensor.dtype for tensor in before.values()}
    model.to(torch.bfloat16)
    assert all(torch.equal(get_attribute(model, full), tensor) for full, tensor in before.items())
    assert all(get_attribute(model, full).dtype is tensor.dtype for full, tensor in before.items())


def test_dora_starts_from_the_lengths_of_what_is_stored() -> None:
    """As in HF PEFT, which dequantises: the start is what the model computes, not what it was before."""
    model = compiled(base_of("llama"), "quantize attn.* with fp4\napply dora(r=4) to attn.q")
    for binding in model.plan.bindings:
        assert isinstance(binding.site, Projection)
        weight = frozen_weight(model, model.plan, binding.site.weight)
        torch.testing.assert_close(get_attribute(model, binding.names["m"]).detach(), weight.norm(dim=1))


def test_pissa_is_taken_out_before_the_rest_is_rounded() -> None:
    """As the paper's QPiSSA: the residual is quantised, so that it loses less than the whole weight would."""
    base = base_of("llama")
    model = compiled(base, "quantize attn.q with nf4\napply lora(r=8, alpha=8, init=pissa) to attn.q")
    for binding in model.plan.bindings:
        assert isinstance(binding.site, Projection)
        weight = get_attribute(base, binding.site.weight).detach()
        state = {key: get_attribute(model, full).detach() for key, full in binding.names.items()}
        rest = weight - binding.method.delta(binding.site, **state)
        item = model.plan.packed[binding.site.weight]
        expected = item.unpack(item.pack(rest))
        assert torch.equal(frozen_weight(model, model.plan, binding.site.weight), expected)
        whole = item.unpack(item.pack(weight))
        kept = expected + binding.method.delta(binding.site, **state)
        assert (weight - kept).norm() < (weight - whole).norm()


@pytest.mark.parametrize("storage", ["nf4(double=true)", "fp4", "int8"])
def test_loftq_fits_what_its_storage_loses(storage: str) -> None:
    base = base_of("llama")
    model = compiled(base, f"quantize attn.q with {storage}\napply lora(r=8, init=loftq) to attn.q")
    for binding in model.plan.bindings:
        assert isinstance(binding.site, Projection)
        item, method = model.plan.packed[binding.site.weight], cast(Any, binding.method)
        weight = get_attribute(base, item.weight).detach()
        state = {key: get_attribute(model, full).detach() for key, full in binding.names.items()}
        rest = weight - method.scale * state["B0"] @ state["A0"]
        packed = frozen_weight(model, model.plan, item.weight)
        assert torch.equal(packed, item.storage.rounded(rest))
        kept = packed + method.delta(binding.site, **state)
        assert (weight - kept).norm() < 0.9 * (weight - item.storage.rounded(weight)).norm()


@pytest.mark.slow
def test_loftq_rounds_to_what_is_stored() -> None:
    base = base_of("llama")
    spec = "apply lora(r=4, init=loftq) to attn.q, mlp.down"
    with torch.random.fork_rng():
        plain, packed = (compiled(base, text).eval() for text in (spec, f"quantize attn.q, mlp.down with nf4\n{spec}"))
    for name in packed.plan.packed:
        assert torch.equal(frozen_weight(packed, packed.plan, name), get_attribute(plain, name))
    batch = inputs(base)
    assert torch.equal(plain(**batch).logits, packed(**batch).logits)


# ---- Merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first_is_quick(["llama", "gpt2", "mixtral"]))
@pytest.mark.parametrize("storage", first_is_quick(["nf4(double=true)", "int8"]))
def test_merging_dequantises_or_rounds_again(name: str, storage: str) -> None:
    base = base_of(name)
    batch = inputs(base)
    model = compiled(base, f"quantize linear except head with {storage}\n{LORA}").eval()
    randomise(model)
    merged, (again, lost) = model.merge().eval(), model.merge(requantize=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert lost.keys() == model.plan.packed.keys()
    for weight, rounding in lost.items():
        item = model.plan.packed[weight]
        plain, packed = get_attribute(merged, weight).detach(), get_attribute(again, weight).detach()
        assert torch.equal(packed, item.unpack(item.pack(plain)))
        assert rounding.largest == float((plain - packed).abs().max())
        assert rounding.relative == pytest.approx(float((plain - packed).norm() / plain.norm()))
        touched = any(binding.site.parameters[0] == weight for binding in model.plan.bindings)
        assert rounding.relative < (0.02 if storage == "int8" else 0.2)
        assert rounding.relative > 0 or not touched


# ---- Beside HF PEFT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", first_is_quick(["lora(r=4, alpha=8)", "dora(r=4, alpha=8)"]))
@pytest.mark.parametrize(
    ("storage", "fuse"),
    first_is_quick([("nf4(double=true)", True), ("nf4(double=true)", False), ("fp4", True), ("int8", True)]),
)
def test_outputs_and_gradients_are_hf_pefts(method: str, storage: str, fuse: bool, tmp_path: Path) -> None:
    """On a model of the dequantised weights: bitsandbytes' modules must not be run on some CPUs."""
    peft = pytest.importorskip("peft")
    base = base_of("llama")
    batch = inputs(base)
    spec = f"quantize linear except head with {storage}\napply {method} to attn.q, attn.v, mlp.down"
    model = compiled(base, spec, fuse=fuse)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(rounded(model), tmp_path / "adapter", is_trainable=True)
    for mode in (model, theirs):
        mode.train()(**batch).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, theirs.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(model.trainable_parameters())
    for key, parameter in model.trainable_parameters().items():
        leaf = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
        path, _, name = key.rpartition(".")
        found = gradients[f"base_model.model.{path.rpartition('.')[0]}.{leaf[name]}"]
        torch.testing.assert_close(parameter.grad, found, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_hf_peft_goes_onto_a_quantised_base(tmp_path: Path) -> None:
    """The folder holds the adapter alone; what it stands on is the reader's."""
    base = base_of("llama")
    model = compiled(base, f"quantize attn.* with nf4\n{LORA}")
    randomise(model)
    model.save_pretrained(tmp_path)
    read = peftc.load_peft(base, tmp_path)
    assert not read.plan.packed
    values = [parameter.detach() for parameter in model.trainable_parameters().values()]
    assert all(torch.equal(a, b) for a, b in zip(values, read.trainable_parameters().values(), strict=True))


# ---- Optimisers --------------------------------------------------------------------------------------------------


def bitsandbytes_optimizers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.optim")


@pytest.mark.parametrize(
    "name",
    ["AdamW8bit", pytest.param("Lion8bit", marks=SLOW), pytest.param("PagedAdamW8bit", marks=pytest.mark.gpu),
     pytest.param("PagedAdamW32bit", marks=pytest.mark.gpu)],
)  # fmt: skip
@pytest.mark.slow
def test_bitsandbytes_optimizers_take_the_groups(name: str) -> None:
    """With LoRA+'s two rates. State of fewer than 4096 numbers stays in fp32, so that B here has eight bits."""
    device = "cuda" if "Paged" in name else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("paged memory is of CUDA")
    base = cast(Any, copy.deepcopy(base_of("llama"))).to(device)
    batch = {key: tensor.to(device) for key, tensor in inputs(base).items()}
    spec = "quantize attn.*, mlp.* with nf4(double=true)\napply lora(r=160, lr_ratio=4) to attn.*, mlp.*"
    model = compiled(base, spec)
    groups = model.param_groups(1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 4e-3]
    optimizer = getattr(bitsandbytes_optimizers(), name)(groups)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    if "8bit" in name:
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        assert any(tensor.dtype is torch.uint8 for tensor in tensors)
