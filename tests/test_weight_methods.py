"""Weight methods beyond LoRA: against HF PEFT where it has them, else against a slow transcription."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftc
from peftc.ir import get_attribute
from peftc.method import Method, methods, wanted
from peftc.site import Linear
from zoo import ZOO, inputs

torch.set_num_threads(1)

NEAR = 1e-5  # fp32, two implementations of one sum
EXACT = 1e-12  # fp64, two orders of one sum


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- HF PEFT: the same state, the same outputs, loss and gradients -----------------------------------------------


def randomised(model: Any) -> Any:
    """With adapters that are no start: a zero factor would hide what is wrong with the other."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def without_dropout(name: str) -> Any:
    """A tiny model that computes the same in `train()` and `eval()`."""
    model = ZOO[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients_by_their_names(compiled: peftc.CompiledModule) -> dict[str, Tensor]:
    """The gradients of a compiled model under the names that HF PEFT has for the tensors."""
    found: dict[str, Tensor] = {}
    for binding in compiled.plan.bindings:
        state = {name: get_attribute(compiled, full) for name, full in binding.names.items()}
        own = {name: tensor if tensor.grad is None else tensor.grad for name, tensor in state.items()}
        renamed = binding.method.to_peft(binding.site, own)[1]
        found |= {f"{binding.site.name}.{name}": tensor for name, tensor in renamed.items()}
    return found


def assert_same(compiled: peftc.CompiledModule, theirs: Any, batch: dict[str, Tensor]) -> None:
    penalised = compiled.plan.bindings[0].method.name == "adalora"  # the penalty joins the loss in training
    ours, expected = compiled.train(penalised)(**batch), theirs.train(penalised)(**batch)
    close(ours.logits, expected.logits, NEAR)
    close(ours.loss, expected.loss, NEAR)
    ours.loss.backward()
    expected.loss.backward()
    found = gradients_by_their_names(compiled)
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            largest = parameter.grad.abs().max()  # may be 1e-5, where the attention is nearly uniform
            assert largest > 0, f"{name} proves nothing"
            close(found[short] / largest, parameter.grad / largest, NEAR)
            compared += 1
    assert compared == len(compiled.trainable_parameters())


# Without a task, their PeftModel goes past the forward that adds the penalty.
AdaLoraConfig = partial(peft.AdaLoraConfig, task_type="CAUSAL_LM")
BOTH = ["q_proj", "down_proj"]  # 48 x 32 and 32 x 80 on the tiny Llama
CONFIGS = {
    "loha, factored": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=BOTH)),
    "loha, dense": ("llama", peft.LoHaConfig(r=8, target_modules=BOTH)),
    "loha, two ranks": (
        "llama",
        peft.LoHaConfig(r=3, target_modules=BOTH, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    ),
    "lokr": ("llama", peft.LoKrConfig(r=3, alpha=5, target_modules=BOTH)),
    "lokr, dense": ("llama", peft.LoKrConfig(r=8, target_modules=BOTH)),
    "lokr, a factor": ("llama", peft.LoKrConfig(r=2, decompose_factor=4, target_modules=BOTH)),
    "lokr, a factor that divides nothing": ("llama", peft.LoKrConfig(r=2, decompose_factor=7, target_modules=BOTH)),
    "lokr, a large factor": ("llama", peft.LoKrConfig(r=2, decompose_factor=16, target_modules=BOTH)),
    "lokr, both thin": (
        "llama",
        peft.LoKrConfig(r=2, decompose_both=True, target_modules=BOTH, init_weights="lycoris"),
    ),
    "vera": ("llama", peft.VeraConfig(r=5, target_modules=BOTH)),
    "vera, gpt2": ("gpt2", peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "adalora": ("llama", AdaLoraConfig(init_r=5, target_r=3, target_modules=BOTH, total_step=10)),
    "adalora, no penalty": (
        "llama",
        AdaLoraConfig(init_r=5, target_modules=BOTH, total_step=10, orth_reg_weight=0.0, lora_alpha=3),
    ),
    "adalora, gpt2": (
        "gpt2",
        AdaLoraConfig(init_r=3, target_r=2, target_modules=["c_attn"], total_step=9, fan_in_fan_out=True),
    ),
    "lokr, bert": ("bert", peft.LoKrConfig(r=2, target_modules=["value", "intermediate.dense"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_in_hf_peft(name: str, tmp_path: Path) -> None:
    """Their adapter, read by peftc: outputs, loss and every gradient; and peftc's own folder, read by them."""
    zoo_model, config = CONFIGS[name]
    base = without_dropout(zoo_model)
    batch = inputs(base)
    theirs = randomised(peft.get_peft_model(without_dropout(zoo_model), config))
    theirs.save_pretrained(tmp_path / "theirs")
    compiled = peftc.load_peft(base, tmp_path / "theirs")
    assert_same(compiled, theirs, batch)
    theirs.eval()
    compiled.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(ZOO[zoo_model](), str(tmp_path / "ours"))
    assert torch.equal(back.eval()(**batch).logits, theirs(**batch).logits)


@pytest.mark.filterwarnings("ignore:Specified to not")
def test_vera_without_its_projections(tmp_path: Path) -> None:
    """A folder that leaves out A and B: they are drawn anew from the seed, bit for bit as HF PEFT draws them."""
    config = peft.VeraConfig(r=5, target_modules=BOTH, save_projection=False, projection_prng_key=7)
    theirs = randomised(peft.get_peft_model(ZOO["llama"](), config))
    theirs.save_pretrained(tmp_path)
    compiled = peftc.load_peft(ZOO["llama"](), tmp_path)
    state = compiled.state_dict()
    assert torch.equal(state["vera.A"], theirs.base_model.vera_A["default"])
    assert torch.equal(state["vera.B"], theirs.base_model.vera_B["default"])
    assert_same(compiled, theirs, inputs(ZOO["llama"]()))


@pytest.mark.parametrize("spec", ["loha(r=3)", "lokr(r=3)"])
def test_hf_peft_has_none_on_transposed_weights(spec: str, tmp_path: Path) -> None:
    compiled = peftc.compile(ZOO["gpt2"](), f"apply {spec} to mlp.up")
    with pytest.raises(peftc.PeftcError, match="no transposed weight"):
        compiled.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["w1", "w2"])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_starts_are_hf_peft_s(name: str, init: str) -> None:
    """Zero where theirs is zero, and of the same bounds elsewhere."""
    torch.manual_seed(0)
    if name == "loha":
        config: Any = peft.LoHaConfig(r=4, target_modules=BOTH)
        spec = "loha(r=4)"
    else:
        config = peft.LoKrConfig(r=2, target_modules=BOTH, init_weights=True if init == "w1" else "lycoris")
        spec = f"lokr(r=2, init={init})"
    theirs: Any = peft.get_peft_model(ZOO["llama"](), config)
    compiled = peftc.compile(ZOO["llama"](), f"apply {spec} to attn.q, mlp.down")
    expected = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    for binding in compiled.plan.bindings:
        state = {key: get_attribute(compiled, f"{binding.path}.{key}") for key in binding.state}
        for key, tensor in binding.method.to_peft(binding.site, state)[1].items():
            other = expected[f"base_model.model.{binding.site.name}.{key}"]
            assert tensor.shape == other.shape
            assert tensor.any() == other.any()
            # both uniform: their largest values are near their bound, those of 8 numbers less so
            torch.testing.assert_close(tensor.abs().max(), other.abs().max(), rtol=0.5, atol=0)


def test_lokr_shapes_are_those_of_lycoris() -> None:
    """For every size and factor, the two sides of the Kronecker product are HF PEFT's, which are LyCORIS's."""
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (None, *range(1, 20)):
            site = Linear("layer", "layer", frozenset(), n_in=size, n_out=1)
            state = methods()["lokr"](r=1000, factor=factor).state(site)
            shape = state["w1"].shape[1], state["w2"].shape[1]
            assert shape == factorization(size, factor or -1), (size, factor)


@pytest.mark.parametrize("variant", ["loha", "lokr", "lokr, scaled"])
def test_rank_dropout_leaves_out_rows_of_the_change(variant: str) -> None:
    """As in HF PEFT's get_delta_weight: rows are zero or, where scaled, divided by the share that stays."""
    name = variant.partition(",")[0]
    settings = {"rank_dropout_scale": True} if variant == "lokr, scaled" else {}
    thinned = methods()[name](r=2, rank_dropout=0.5, **settings)
    site, state, x = example(methods()[name](r=2), n_in=12, n_out=40, has_bias=False)
    full, y = apply(methods()[name](r=2), site, x, state), torch.zeros(5, 40, dtype=torch.float64)
    torch.manual_seed(0)
    branch = apply(thinned, site, x, state, y)
    stays = branch.abs().sum(0) > 0
    assert 10 < stays.sum() < 30
    factor = 40 / stays.sum() if variant != "lokr" else 1
    close(branch, full * stays * factor, EXACT)


# ---- The papers' formulas, dense and slow ------------------------------------------------------------------------


def example(
    method: Method, n_in: int, n_out: int, *, has_bias: bool = True
) -> tuple[Linear, dict[str, Tensor | None], Tensor]:
    """A site, random state and frozen tensors, and five tokens, in double precision."""
    random = torch.Generator().manual_seed(5)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    site = Linear("layer", "layer", frozenset(), n_in=n_in, n_out=n_out, bias="layer.bias" if has_bias else None)
    specs = method.state(site)
    weight = number(n_out, n_in)
    state = {key: torch.zeros(spec.shape, dtype=spec.dtype or torch.float64) for key, spec in specs.items()}
    method.initialise(site, weight, state)
    state |= {key: number(*spec.shape).requires_grad_() for key, spec in specs.items() if spec.trainable}
    known: dict[str, Tensor | None] = {**state, "weight": weight, "bias": number(n_out) if has_bias else None}
    return site, known, number(5, n_in).requires_grad_()


def apply(method: Method, site: Linear, x: Tensor, known: dict[str, Tensor | None], y: Tensor | None = None) -> Tensor:
    """The method's rewrite; without `y`, of what it adds to zero."""
    start = torch.zeros(len(x), site.n_out, dtype=x.dtype) if y is None else y
    rewritten: Tensor = method.rewrite(site, x, start, *(known.get(name) for name in wanted(type(method).rewrite, 4)))
    return rewritten


def krona_by_entries(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """Section 3: (A (x) B)[i b1 + k, j b2 + l] = A[i, j] B[k, l]."""
    a, b = known["A"], known["B"]
    rows = []
    for i in range(a.shape[0]):
        for k in range(b.shape[0]):
            row = [a[i, j] * b[k, column] for j in range(a.shape[1]) for column in range(b.shape[1])]
            rows.append(torch.stack(row))
    product = torch.stack(rows)
    return F.linear(x, known["weight"] + method.scale * product, known["bias"])


def qalora_by_algorithm_1(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """result = x W^T + (QA(x) * (D_in // L)) A^T B^T s, where QA is AvgPool1d over D_in // L inputs."""
    pooled = F.avg_pool1d(x[:, None], method.group)[:, 0] * method.group
    branch: Tensor = (pooled @ known["A"].T) @ known["B"].T * method.scale
    return F.linear(x, known["weight"], known["bias"]) + branch


def far_in_two_layers(method: Any, x: Tensor, known: dict[str, Any]) -> Tensor:
    """A learning layer and a frozen one, their outputs put side by side and back in order."""
    learning = known["index"].tolist()
    frozen = [row for row in range(len(known["weight"])) if row not in learning]
    bias = known["bias"]
    parts = [
        F.linear(x, known["selected"], None if bias is None else bias[learning] + known["shift"]),
        F.linear(x, known["weight"][frozen], None if bias is None else bias[frozen]),
    ]
    outputs = torch.cat(parts, 1)
    return outputs[:, torch.tensor(learning + frozen).argsort()]


TRANSCRIPTIONS: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("krona", {"a": 2, "a2": 3, "scale": 1.5}, krona_by_entries),
    ("krona", {"a": 4, "a2": 2, "scale": 2.0}, krona_by_entries),
    ("krona", {"a": 2}, krona_by_entries),
    ("krona", {}, krona_by_entries),
    ("qalora", {"r": 3, "group": 3}, qalora_by_algorithm_1),
    ("qalora", {"r": 3, "alpha": 1.0, "group": 6}, qalora_by_algorithm_1),
    ("far", {"keep": 0.5}, far_in_two_layers),
    ("far", {"keep": 1.0}, far_in_two_layers),
    ("far", {"keep": 0.01, "select": "random"}, far_in_two_layers),
]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("name", "values", "slow"), TRANSCRIPTIONS, ids=lambda given: str(given))
def test_as_the_paper_says(name: str, values: dict[str, Any], slow: Callable[..., Tensor], has_bias: bool) -> None:
    """Outputs and gradients, in x too, of n_in = 12 and n_out = 8."""
    method = methods()[name](**values)
    site, known, x = example(method, n_in=12, n_out=8, has_bias=has_bias)
    learns = [x, *(tensor for tensor in known.values() if tensor is not None and tensor.requires_grad)]
    weight = known["weight"]
    assert weight is not None
    ours = apply(method, site, x, known, F.linear(x, weight, known["bias"]))
    theirs = slow(method, x, known)
    close(ours, theirs, EXACT)
    direction = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    for one, other in zip(
        torch.autograd.grad(ours, learns, direction), torch.autograd.grad(theirs, learns, direction), strict=True
    ):
        assert one.any()
        close(one, other, EXACT)


def test_far_takes_the_largest_rows() -> None:
    base = ZOO["bert"]()
    compiled = peftc.compile(base, "apply far(keep=0.1) to mlp.up")
    for binding in compiled.plan.bindings:
        assert isinstance(binding.site, Linear)
        weight = base.get_parameter(binding.site.owner).detach()
        index = get_attribute(compiled, f"{binding.path}.index")
        norms = [float(row.square().sum()) for row in weight]
        largest = sorted(range(len(norms)), key=norms.__getitem__)[-round(0.1 * len(norms)) :]
        assert index.dtype == torch.int64
        assert index.tolist() == sorted(largest)
        assert torch.equal(get_attribute(compiled, f"{binding.path}.selected"), weight[index])
