"""Several adapters made one by their numbers, held to HF PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import model as lora_model

import peftc
from foldercases import MODELS, logits, theirs_in
from hfpeft import quietly, shaken
from marks import first_is_quick
from peftc.cli.artifacts import combine as command
from peftc.files.adapters import sums

NEAR = 1e-5  # fp32, two implementations of one sum
Run = Callable[..., tuple[int, str, str]]
TWO = ["q_proj", "v_proj"]


def two(folder: Path, ranks: tuple[int, int] = (4, 4), **second: Any) -> list[Path]:
    """Two folders of HF PEFT over one base."""
    given: list[dict[str, Any]] = [{"target_modules": TWO}, {"target_modules": TWO, **second}]
    made = [folder / "one", folder / "other"]
    for place, r, alpha, settings in zip(made, ranks, (6, 3), given, strict=True):
        model = theirs_in(place, MODELS["llama"](), peft.LoraConfig(r=r, lora_alpha=alpha, **settings))
        if place == made[1]:  # not the numbers of the first again
            generator = torch.Generator().manual_seed(7)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            quietly(model.save_pretrained, place)
    return made


def theirs(folders: list[Path], weights: list[float], how: str, **given: Any) -> Any:
    """HF PEFT's combination of two folders."""
    model = quietly(peft.PeftModel.from_pretrained, MODELS["llama"](), str(folders[0]), adapter_name="one")
    quietly(model.load_adapter, str(folders[1]), adapter_name="other")
    named = {"dare": "dare_linear"}.get(how, how)
    quietly(model.add_weighted_adapter, ["one", "other"], weights, "new", combination_type=named, **given)
    model.set_adapter("new")
    return model.eval()


@pytest.mark.parametrize(
    ("how", "weights", "ranks", "given"),
    first_is_quick(
        [
            ("linear", [0.7, -0.4], (4, 4), {}),
            ("cat", [0.7, -0.4], (4, 2), {}),
            ("svd", [1.0, 0.5], (4, 2), {}),
            ("ties", [1.0, -0.5], (4, 4), {"density": 0.5}),
            ("dare", [0.7, -0.4], (4, 4), {"density": 0.6}),
            ("magnitude_prune", [0.7, 0.4], (4, 4), {"density": 0.3}),
        ]
    ),
)
@pytest.mark.whole
def test_it_is_hf_pefts(
    how: str, weights: list[float], ranks: tuple[int, int], given: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folders = two(tmp_path, ranks)
    begun: list[bool] = []

    def seeded(*arguments: Any) -> Any:  # they draw from the global state, which making the new adapter moved on
        if not begun:
            torch.manual_seed(5)
        begun.append(True)
        return dare_linear(*arguments)

    dare_linear = getattr(lora_model, "dare_linear")  # noqa: B009 -- theirs, by no public name
    monkeypatch.setattr(lora_model, "dare_linear", seeded)
    made = peftc.combine(folders, tmp_path / "new", weights=weights, how=how, seed=5, **given)
    assert (made.kind, made.modules) == ("peft", 4)
    base = MODELS["llama"]()
    ours = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "new")).eval()
    expected = logits(theirs(folders, weights, how, **given))
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=NEAR)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    torch.testing.assert_close(logits(peftc.load_peft(base, tmp_path / "new").eval()), expected, rtol=0, atol=NEAR)


def test_dare_keeps_the_sum_on_average(tmp_path: Path) -> None:
    """Its definition: each number stays with chance `density`, over that; the mean over many draws is the number."""
    a, b = torch.ones(4, 50), torch.ones(50, 4)
    generator = torch.Generator().manual_seed(0)
    made = [sums.How("dare", 0.25, generator=generator).combined([sums.Pair(a, b, 1.0)], [1.0]).a for _ in range(200)]
    assert {float(value) for value in torch.stack(made).unique()} == {0.0, 4.0}
    assert abs(float(torch.stack(made).mean()) - 1) < 0.05  # 40 000 draws of deviation sqrt(3): 5.8 of its errors


@pytest.mark.slow
def test_artifacts_and_folders_go_together(tmp_path: Path) -> None:
    """`cat` is the sum itself: what two adapters add is what each of them does; over a fused weight, too."""
    base = MODELS["gpt2"]()
    specs = ("apply lora(r=4, alpha=3) to attn.q, mlp.up", "apply lora(r=2) to attn.q, attn.v\ntrain head, embed")
    models = [shaken(peftc.compile(copy.deepcopy(base), spec)) for spec in specs]
    for number, model in enumerate(models):
        model.save(tmp_path / str(number))
    made = peftc.combine([tmp_path / "0", tmp_path / "1"], tmp_path / "new", weights=[1, -0.5], how="cat", model=base)
    assert (made.kind, made.ranks) == ("artifact", [2, 4, 6])
    both = peftc.load(tmp_path / "new", base).eval()
    by_site = {binding.site.name: binding for binding in both.plan.bindings}
    for model, weight in zip(models, (1, -0.5), strict=True):
        for binding in model.plan.bindings:
            site = binding.site.name
            change = binding.method.delta(binding.site, **state_of(model, binding))
            others = [b for m in models if m is not model for b in m.plan.bindings if b.site.name == site]
            if not others:
                whole = by_site[site].method.delta(by_site[site].site, **state_of(both, by_site[site]))
                torch.testing.assert_close(whole, weight * change, rtol=0, atol=NEAR)
    assert torch.equal(both.get_parameter("lm_head.weight"), models[1].get_parameter("lm_head.weight"))


def state_of(model: Any, binding: Any) -> dict[str, Any]:
    """A method's tensors at one place."""
    return {name: model.get_parameter(full).detach() for name, full in binding.names.items()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": [1.0]}, "there are 1 weights for 2 adapters"),
        ({"how": "ties"}, "ties needs a density"),
        ({"how": "linear", "density": 0.5}, "linear has no density"),
        ({"how": "average"}, "no way called average"),
        ({"rank": 3}, "a rank, of at least 1, is for svd"),
        ({}, "linear adds matrices of one rank"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(peftc.PeftcError, match=words):
        peftc.combine(two(tmp_path, (4, 2)), tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("second", "words"),
    first_is_quick(
        [
            ({"use_dora": True}, "no sum is made of LoRA with use_dora=True"),
            ({"init_lora_weights": "pissa"}, "no sum is made of LoRA with init_lora_weights=pissa"),
        ]
    ),
    ids=str,
)
def test_an_adapter_that_is_no_sum_is_refused(second: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(peftc.PeftcError, match=words):
        peftc.combine(two(tmp_path, **second), tmp_path / "new")


def test_what_one_of_them_trained_whole_is_kept(tmp_path: Path) -> None:
    folders = two(tmp_path, modules_to_save=["lm_head"])
    peftc.combine(folders, tmp_path / "new", weights=[0, 1], how="cat")
    one, other = (peftc.load_peft(MODELS["llama"](), place).eval() for place in (folders[1], tmp_path / "new"))
    torch.testing.assert_close(logits(other), logits(one), rtol=0, atol=NEAR)
    config = peft.LoraConfig(r=4, target_modules=TWO, modules_to_save=["lm_head"])
    third = quietly(peft.get_peft_model, MODELS["llama"](), config)  # whose lm_head is still the base's
    quietly(third.save_pretrained, tmp_path / "third")
    with pytest.raises(peftc.PeftcError, match="no sum is made of what was trained whole"):
        peftc.combine([folders[1], tmp_path / "third"], tmp_path / "again")


def test_biases_that_learned_stay_what_they_are(tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = theirs_in(tmp_path / "a", MODELS["gpt2"](), peft.LoraConfig(**config, bias="all"))
    peftc.combine([tmp_path / "a"], tmp_path / "new", how="cat")
    again = quietly(peft.PeftModel.from_pretrained, MODELS["gpt2"](), str(tmp_path / "new")).eval()
    for one in (again, peftc.load_peft(MODELS["gpt2"](), tmp_path / "new").eval()):
        torch.testing.assert_close(logits(one), logits(theirs), rtol=0, atol=NEAR)
    theirs_in(tmp_path / "b", MODELS["gpt2"](), peft.LoraConfig(**config))
    with pytest.raises(peftc.PeftcError, match="their settings of bias are all, none"):
        peftc.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "never", how="cat")
    assert not (tmp_path / "never").exists()


def test_the_command(tmp_path: Path, run: Run) -> None:
    assert command.HOWS == sums.HOWS  # which the command says before torch is imported
    folders = two(tmp_path)
    status, out, _ = run(
        "combine", *folders, "--weights", 1, -0.5, "--how", "svd", "--rank", 3, "-o", tmp_path / "a", "--json"
    )
    assert status == 0
    assert json.loads(out)["ranks"] == [3]
    assert json.loads(out)["weights"] == [1.0, -0.5]
    status, out, _ = run("combine", *folders, "-o", tmp_path / "b")
    assert (status, out.partition(", in ")[0]) == (0, "2 adapters made one, linear, rank 4 at 4 modules")
    status, _, err = run("combine", *folders, "--how", "dare", "-o", tmp_path / "c")
    assert status == 1
    assert "cannot-combine" in err
