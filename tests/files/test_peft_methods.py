"""Every method that HF PEFT has, too, beside HF PEFT's own: equal outputs, gradients and folders, model by model.

A row of the table is a type of tuner as HF PEFT is told of it, and what peftc takes its folder for. Where a model is
not in a row's list, HF PEFT refuses it, or passes by: its tuner stands on nn.Linear alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftc
from hfpeft import NEAR, quietly, shaken, tensors_in
from marks import first_is_quick
from peftc.files.hf_peft.norms import NORMS
from peftc.files.hf_peft.sequences.prefix import KINDS
from peftc.graph.ir import get_attribute
from peftc.protocol.method import methods
from variants import built
from zoo import ZOO, inputs

# A narrow and a wide layer of each, with no square weight among them but BERT's query.
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "intermediate.dense"],
    "t5": ["q", "wo"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}
LAST = {
    "llama": ["model.layers.1.mlp.down_proj"],
    "bert": ["bert.encoder.layer.1.intermediate.dense"],
    "t5": ["decoder.block.1.layer.2.DenseReluDense.wo"],
}
ALL = (*TARGETS,)
LINEAR = tuple(name for name in TARGETS if name != "gpt2")


@dataclass(frozen=True)
class Row:
    """`config` as HF PEFT takes it, `spec` the call of peftc that its folder means, on `models`."""

    config: str
    spec: str
    given: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ALL
    last: bool = False  # only the last layer that the model has
    drawn: bool = False  # whether theirs leaves out what is frozen, to be drawn again; ours never does

    def theirs(self, name: str) -> Any:
        targets = LAST.get(name, TARGETS[name]) if self.last else TARGETS[name]
        return getattr(peft, self.config)(target_modules=targets, **self.given)


ROWS = [
    Row("HRAConfig", "hra(r=4)", {"r": 4}, LINEAR),
    Row("HRAConfig", "hra(r=3, orthogonal=true)", {"r": 3, "apply_GS": True}, LINEAR),
    Row("OFTConfig", "oft(block_size=8, nearest=true)", {"oft_block_size": 8}, LINEAR),
    Row("OFTConfig", "oft(blocks=4, nearest=true, share=true, neumann=false)",
        {"r": 4, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False,
         "num_cayley_neumann_terms": 3, "eps": 0.5}, LINEAR),
    Row("OFTConfig", "oft(block_size=32, nearest=true, terms=8, constrained=true, eps=0.5)",
        {"num_cayley_neumann_terms": 8, "coft": True, "eps": 0.5}, LINEAR),
    Row("BOFTConfig", "boft(block_size=8)", {"boft_block_size": 8}, LINEAR),
    # One layer: behind it HF PEFT's gradient is wrong. What enters is given C' g by a correlation, not a convolution.
    Row("C3AConfig", "c3a(block_size=16)", {"block_size": 16}, LINEAR, last=True),
    Row("FourierFTConfig", "fourierft(n_frequency=40, scaling=90, seed=5)",
        {"n_frequency": 40, "scaling": 90.0, "random_loc_seed": 5}),
    Row("MissConfig", "miss(r=12)", {"r": 12}, LINEAR),
    Row("MissConfig", "miss(r=8, kind=mini, mini_r=4)", {"r": 8, "init_weights": "mini", "mini_r": 4}, LINEAR),
    Row("MissConfig", "miss(r=8, kind=bat)", {"r": 8, "init_weights": "bat", "mini_r": 4}, LINEAR),
    Row("RandLoraConfig", "randlora(r=6, alpha=30, seed=3)", {"r": 6, "randlora_alpha": 30, "projection_prng_key": 3}),
    Row("RoadConfig", "road(group_size=8)", {"group_size": 8}, LINEAR),
    Row("RoadConfig", "road(variant=road_2, group_size=16)", {"variant": "road_2", "group_size": 16}, LINEAR),
    Row("RoadConfig", "road(variant=road_4, group_size=4)", {"variant": "road_4", "group_size": 4}, LINEAR),
    Row("GraloraConfig", "gralora(r=8, alpha=6, k=4)", {"r": 8, "alpha": 6, "gralora_k": 4}),
    Row("GraloraConfig", "gralora(r=4, alpha=6, k=2, hybrid_r=3)", {"r": 4, "alpha": 6, "hybrid_r": 3}),
    Row("DeloraConfig", "delora(r=4, strength=5)", {"r": 4, "delora_lambda": 5}, LINEAR),
    Row("HiraConfig", "hira(r=4)", {"r": 4}),
    Row("WaveFTConfig", "waveft(n_frequency=50, scaling=9, seed=5)",
        {"n_frequency": 50, "scaling": 9.0, "random_loc_seed": 5}),
    Row("WaveFTConfig", "waveft(n_frequency=50, wavelet=db3)", {"n_frequency": 50, "wavelet_family": "db3"}),
    Row("WaveFTConfig", "waveft(n_frequency=50, scaling=5, transform=false)",
        {"n_frequency": 50, "scaling": 5.0, "use_idwt": False}),
    Row("ShiraConfig", "shira(r=2, seed=3)", {"r": 2, "random_seed": 3}, LINEAR),
    Row("SupertuningConfig", "supertuning(sparsity=0.9, largest=false)",
        {"sparsity": 0.9, "select_top": False}, LINEAR),
    Row("BeftConfig", "beft", {}, LINEAR),
    Row("DeftConfig", "deft(r=3, alpha=6)", {"r": 3, "alpha": 6}),
    Row("DeftConfig", "deft(r=3, decomposition=qr)", {"r": 3, "decomposition_method": "qr"}),
    Row("DeftConfig", "deft(r=3, para=true)", {"r": 3, "para": True}),
    Row("PeanutConfig", "peanut(r=4)", {"r": 4}, LINEAR),
    Row("PeanutConfig", "peanut(r=4, depth=2, activation=silu, scale=0.5)",
        {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5}, LINEAR),
    Row("PsoftConfig", "psoft(r=4, alpha=6)", {"r": 4, "psoft_alpha": 6}, LINEAR),
    Row("PsoftConfig", "psoft(r=4, orthogonal=false, before=false, values_in=root)",
        {"r": 4, "psoft_alpha": 32, "psoft_orth": False, "psoft_mag_a": False, "ab_svd_init": "pissa_init",
         "use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, LINEAR),
    Row("PsoftConfig", "psoft(r=4, behind=false, neumann=true)",
        {"r": 4, "psoft_alpha": 32, "psoft_mag_b": False, "use_cayley_neumann": True}, LINEAR),
    Row("OSFConfig", "osf", {}, LINEAR),
    Row("OSFConfig", "osf(kept=20)", {"effective_rank": 20}, LINEAR),
    Row("PveraConfig", "pvera(r=6, seed=3)", {"r": 6, "projection_prng_key": 3}),
    Row("GloraConfig", "glora(r=3)", {"r": 3}, LINEAR),
    Row("GloraConfig", "glora(weight_by=vector, across_by=vector, bias_by=vector)",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, LINEAR),
    Row("GloraConfig", "glora(weight_by=constant, across_by=none)",
        {"config_A_B": "constant", "config_C": "none"}, LINEAR),
    Row("LoraConfig", "lora(r=3, alpha=6, bias=true)", {"r": 3, "lora_alpha": 6, "lora_bias": True}),
    Row("LoraConfig", "lora(r=3, alpha=6)", {"r": 3, "lora_alpha": 6, "bias": "all"}, ("bert", "gpt2")),
    Row("VeraConfig", "vera(r=6, seed=3)", {"r": 6, "projection_prng_key": 3, "bias": "vera_only"}, ("gpt2", "bert")),
    Row("LilyConfig", "lily(r=4, stride=2, experts=3, scale=2)",
        {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 2.0}, LINEAR),
    Row("LoraConfig", "kasa(r=3, alpha=6, beta=0.5)",
        {"r": 3, "lora_alpha": 6, "kasa_config": peft.KasaConfig(beta=0.5)}, LINEAR),
    Row("TinyLoraConfig", "tinylora(r=3, u=5)", {"r": 3, "u": 5}),
    Row("UniLoraConfig", "unilora(r=8, length=4000)", {"r": 8, "theta_d_length": 4000}, drawn=True),
    Row("UniLoraConfig", "unilora(r=8, length=3000, seed=5)",
        {"r": 8, "theta_d_length": 3000, "proj_seed": 5, "save_indices": True}),
    Row("VBLoRAConfig", "vblora(r=3, vectors=9, length=8, topk=3)",
        {"r": 3, "num_vectors": 9, "vector_length": 8, "topk": 3}),
]  # fmt: skip
ABSENT = [(row, name) for row in ROWS for name in ALL if name not in row.models and "bias" not in row.given]

CASES = [(row, name) for row in ROWS for name in row.models]


def gradients_there(theirs: Any) -> dict[str, Tensor]:
    """By the names that they have in a folder."""
    known = theirs.state_dict(keep_vars=True)
    found = {name: tensor.grad for name, tensor in known.items() if tensor.grad is not None}
    renamed: dict[str, Tensor] = quietly(peft.get_peft_model_state_dict, theirs, known | found)
    left = {id(tensor) for tensor in found.values()}
    return {name: tensor for name, tensor in renamed.items() if id(tensor) in left}


def gradients_here(ours: peftc.CompiledModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    adapted = {binding.site.name for binding in ours.plan.bindings}
    order = [name for name, _ in ours.base.named_modules() if name in adapted]
    for binding in ours.plan.bindings:
        state = {name: get_attribute(ours, full) for name, full in binding.names.items()}
        known = {name: tensor if tensor.grad is None else tensor.grad for name, tensor in state.items()}
        _, tensors = binding.method.to_peft(binding.site, known)
        number = order.index(binding.site.name)
        found |= {f"base_model.{name}.{number}": tensors.pop(name) for name in binding.method.peft_numbered}
        found |= {f"base_model.model.{binding.site.name}.{name}": tensor for name, tensor in tensors.items()}
        found |= {f"base_model.{name}": known[own] for name, own in binding.method.peft_shared.items()}
    for name in ours.plan.trained:
        inner = name.replace(".bias", ".base_layer.bias") if name.removesuffix(".bias") in adapted else name
        found[f"base_model.model.{inner}"] = get_attribute(ours, name).grad
    return found


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # HF PEFT's SHiRA makes sparse tensors
@pytest.mark.parametrize(("row", "name"), first_is_quick(CASES), ids=lambda it: it if isinstance(it, str) else it.spec)
def test_it_is_hf_pefts(row: Row, name: str, tmp_path: Path) -> None:
    base = shaken(ZOO[name]())
    batch = inputs(base)
    torch.manual_seed(0)
    theirs: Any = shaken(quietly(peft.get_peft_model, copy.deepcopy(base), row.theirs(name)))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert {repr(binding.method) for binding in ours.plan.bindings} == {repr(built(row.spec))}

    first, second = theirs(**batch), ours(**batch)
    torch.testing.assert_close(second.logits, first.logits, rtol=NEAR, atol=NEAR)
    assert not torch.allclose(first.logits, base(**batch).logits, rtol=0, atol=1e-3)
    first.loss.backward()
    second.loss.backward()
    expected, found = gradients_there(theirs), gradients_here(ours)
    assert expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=2 * NEAR * max(float(gradient.abs().max()), 1e-2))

    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**batch).logits, first.logits, rtol=NEAR, atol=NEAR)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    head = "base_model.model.classifier."  # a classifier's is always in a folder that says its task, as ours does
    after = {key: tensor for key, tensor in after.items() if key in before or not key.startswith(head)}
    common = built(row.spec).peft_shared  # of which theirs may hold a copy for every module
    before = {key: tensor for key, tensor in before.items() if key in after or key.rpartition(".")[2] not in common}
    assert after.keys() == before.keys() or (row.drawn and after.keys() > before.keys())
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("row", "name"), ABSENT, ids=str)
def test_what_is_absent_is_absent_there(row: Row, name: str) -> None:
    try:
        theirs = quietly(peft.get_peft_model, ZOO[name](), row.theirs(name))
    except (TypeError, NotImplementedError, ValueError, AttributeError):
        return
    assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_what_a_folder_leaves_out_is_hf_pefts_default() -> None:
    configs = {str(row.theirs("llama").peft_type.value): row.theirs("llama") for row in ROWS}
    for cls in methods().values():
        if config := configs.get(str(cls.peft_type)):
            defaults = type(config)(target_modules=["x"])
            for theirs, ours in cls.peft_values.items():
                assert getattr(defaults, theirs) == cls.parameters[ours].default, (cls.name, theirs)


def test_every_type_is_here_or_the_page_says_why_not() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pages" / "migration.md").read_text()
    absent = {
        line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and line.split("`")[1].isupper()
    }
    here = {cls.peft_type for cls in methods().values()} | {NORMS, *KINDS}
    assert absent == {one.value for one in peft.PeftType} - here
