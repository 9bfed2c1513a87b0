"""HF PEFT's folders of LoRA on embeddings, both ways: tied tables, scaled ones, positions, segments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from hfpeft import NEAR, quietly, shaken, tensors_in
from marks import first_is_quick
from peftc.graph.ir import get_attribute
from zoo import ZOO, inputs

TARGETS: dict[str, list[str]] = {
    "llama": ["embed_tokens", "q_proj"],
    "gpt2": ["wte", "wpe", "c_attn"],
    "bert": ["word_embeddings", "token_type_embeddings", "query"],
    "t5": ["encoder.embed_tokens", "decoder.embed_tokens", "v"],
    "gemma3": ["embed_tokens"],  # scaled, and tied to the head
}
ROWS = [
    ("llama", {"lora_dropout": 0.1}),  # which it does not apply there
    ("gpt2", {"use_dora": True}),
    ("llama", {"use_dora": True, "use_rslora": True}),
    ("gpt2", {"rank_pattern": {"wte": 6}, "alpha_pattern": {"wpe": 3}}),
    ("gpt2", {"init_lora_weights": "mica"}),  # B stays as it is
    ("bert", {}),
    ("bert", {"use_dora": True}),
    ("t5", {}),
    ("t5", {"use_dora": True}),
    ("gemma3", {}),
    ("gemma3", {"use_dora": True}),
]


def gradients(compiled: peftc.CompiledModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for binding in compiled.plan.bindings:
        own = {name: get_attribute(compiled, full).grad for name, full in binding.names.items()}
        tensors = binding.method.to_peft(binding.site, own)[1]
        found |= {f"base_model.model.{binding.site.name}.{name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.parametrize(("name", "settings"), first_is_quick(ROWS), ids=str)
def test_both_ways(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base: Any = ZOO[name]().eval()
    batch = inputs(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], **copy.deepcopy(settings))
    theirs: Any = shaken(quietly(peft.get_peft_model, copy.deepcopy(base), config))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours: Any = peftc.load_peft(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert ours.plan.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    first, second = theirs(**batch), ours(**batch)
    torch.testing.assert_close(second.logits, first.logits, rtol=NEAR, atol=NEAR)
    assert not torch.allclose(first.logits, base(**batch).logits, rtol=0, atol=1e-4)
    first.loss.backward()
    second.loss.backward()
    named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for key, gradient in gradients(ours).items():
        expected = named.get(key, named.get(f"{key}.weight"))
        if gradient is None and settings.get("init_lora_weights") == "mica":
            assert expected is None
            continue
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2 * NEAR * float(expected.abs().max()))

    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**batch).logits, first.logits, rtol=NEAR, atol=NEAR)
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    # theirs holds the frozen table, too, and ours a classifier's head
    first_own, own = ({key: tensor for key, tensor in held.items() if ".lora_" in key} for held in (before, after))
    assert own.keys() == first_own.keys()
    assert all(torch.equal(tensor, first_own[key]) for key, tensor in own.items())


@pytest.mark.parametrize("name", first_is_quick(["gpt2", "llama", "gemma3"]))
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_table_that_was_tied_is_the_embedding_s_own(name: str, method: str, tmp_path: Path) -> None:
    base: Any = ZOO[name]().eval()
    compiled: Any = shaken(peftc.compile(base, f"apply {method}(r=3) to embed, head"))
    merged, batch = compiled.merge(), inputs(base)
    expected = compiled(**batch).logits
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=NEAR, atol=NEAR)
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=NEAR, atol=NEAR)


def test_a_table_that_two_look_into_is_not_merged() -> None:
    compiled = peftc.compile(ZOO["t5"](), 'apply lora to "encoder.embed_tokens"')
    with pytest.raises(peftc.PeftcError, match=r"decoder\.embed_tokens looks into the same table"):
        compiled.merge()


def test_a_larger_vocabulary_is_asked_for(tmp_path: Path) -> None:
    """As public adapters have it that were trained with tokens of their own: the folder holds the larger table."""
    base: Any = ZOO["llama"]()
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(101)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    theirs = shaken(quietly(peft.get_peft_model, copy.deepcopy(larger), config))
    quietly(theirs.save_pretrained, tmp_path)
    with pytest.raises(peftc.PeftcError, match=r"resize_token_embeddings\(101\)"):
        peftc.load_peft(base, tmp_path)
    found: Any = peftc.load_peft(larger, tmp_path).eval()
    batch = inputs(larger)
    torch.testing.assert_close(found(**batch).logits, theirs(**batch).logits, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("apply lora(dropout=0.1) to embed", "refused", "rows of a table"),
        ("apply dora(dropout=0.1) to embed", "refused", "rows of a table"),
        ("apply lora(init=pissa) to embed", "refused", "rows of a table"),
        ("apply lora(bias=true) to embed", "refused", "bias=true"),
        ("apply vera to embed", "wrong-site", "linear layers"),
        ("quantize embed with nf4", "cannot-store", "linear layers"),
    ],
)
def test_what_does_not_go_there_says_why(spec: str, code: str, words: str) -> None:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(ZOO["llama"](), spec)
    assert raised.value.diagnostics[0].code == code
    assert words in str(raised.value)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.attn(x, x, x, need_weights=False)[0])


def test_torch_s_attention_is_refused_since_what_it_learned_counts_twice_there(tmp_path: Path) -> None:
    base, x = Attending().eval(), torch.randn(2, 5, 8)
    theirs: Any = shaken(quietly(peft.get_peft_model, copy.deepcopy(base), peft.LoraConfig(target_modules=["attn"])))
    quietly(theirs.save_pretrained, tmp_path)
    held, place = tensors_in(tmp_path), "base_model.model.attn."
    with torch.no_grad():
        for weight, inner, times in (
            (base.attn.in_proj_weight, "", 1),
            (base.attn.out_proj.weight, "base_layer.out_proj.", 2),
        ):
            a, b = (held[f"{place}{inner}lora_{side}.weight"] for side in "AB")
            weight += times * b @ a  # alpha is r
        torch.testing.assert_close(base(x), theirs(x), rtol=NEAR, atol=NEAR)
    with pytest.raises(peftc.PeftcError, match="out_proj learned twice"):
        peftc.load_peft(Attending(), tmp_path, example=(x,))


class Louder(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_embedding_of_its_own_code_is_refused_both_ways(tmp_path: Path) -> None:
    base = nn.Sequential(Louder(7, 4), nn.Linear(4, 3))
    x = torch.tensor([[1, 5]])
    ours = peftc.compile(base, 'apply lora to "0"', example=(x,))
    with pytest.raises(peftc.PeftcError, match="runs its own code"):
        ours.save_pretrained(tmp_path / "ours")
    quietly(peft.get_peft_model, copy.deepcopy(base), peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(peftc.PeftcError, match="runs its own code"):
        peftc.load_peft(base, tmp_path, example=(x,))
