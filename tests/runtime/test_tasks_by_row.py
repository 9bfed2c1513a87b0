"""A batch whose rows are of several tasks: each row is what its task makes of it alone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from manytasks import BY_ROW, IDS, LORA, ROWS, compiled, gradients, llama, written
from peftc.optimise.decoding.by_row import groups, products, stacked_a, stacked_b
from zoo import ZOO, inputs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("llama", "gpt2") else pytest.mark.slow) for n in (
        "llama", "gpt2", "gemma2", "phi3", "falcon_new", "bert", "modernbert", "t5", "bart", "vit",
    )],
)  # fmt: skip
def test_each_row_is_what_its_task_makes_of_it(name: str) -> None:
    """fp32: 1e-5 for sums in another order; T5's loss over all rows is the mean of as many tokens of each."""
    base = ZOO[name]()
    several = compiled("", BY_ROW, base).eval()
    given = inputs(base, batch=len(ROWS))
    mixed = several(**given, tasks=ROWS)
    rows = [{key: value[at : at + 1] for key, value in given.items()} for at in range(len(ROWS))]
    each = [several.use(task)(**row) for task, row in zip(ROWS, rows, strict=True)]
    torch.testing.assert_close(mixed.logits, torch.cat([one.logits for one in each]), atol=1e-5, rtol=0)
    several.zero_grad()
    mixed.loss.backward()
    together = gradients(several)
    several.zero_grad()
    sum(one.loss for one in each).div(len(ROWS)).backward()
    apart = gradients(several)
    assert together.keys() == apart.keys()
    for full, grad in apart.items():
        torch.testing.assert_close(together[full], grad, atol=1e-5, rtol=1e-4)


def test_a_task_has_no_gradient_from_other_rows() -> None:
    several = compiled("", BY_ROW)
    several(input_ids=IDS[:2], labels=IDS[:2], tasks=["a", "b"]).loss.backward()
    assert all(not grad.any() for name, grad in gradients(several).items() if name.startswith("task.c."))


def test_another_graph_knows_the_rows() -> None:
    """One that is captured for inputs that the first has not."""
    several = compiled("", BY_ROW).eval()
    positions = (torch.arange(7) + 3).expand(5, -1)
    mixed = several(input_ids=IDS, position_ids=positions, tasks=ROWS).logits
    for at, task in enumerate(ROWS):
        one = several.use(task)(input_ids=IDS[at : at + 1], position_ids=positions[at : at + 1]).logits
        torch.testing.assert_close(mixed[at : at + 1], one, atol=1e-5, rtol=0)


def test_rows_of_one_task_run_that_task() -> None:
    several = compiled("", BY_ROW).eval()
    mixed = several(input_ids=IDS, tasks=["b"] * 5).logits
    assert torch.equal(mixed, several.use("b")(input_ids=IDS).logits)


def test_text_is_written_row_by_row() -> None:
    """Left padding, and beams that lie beside each other."""
    several = compiled("apply ia3 to attn.v", BY_ROW)
    mask = torch.ones_like(IDS)
    mask[1, :3] = mask[3, :1] = 0
    settings: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    for options in settings:
        mixed = written(several, attention_mask=mask, tasks=ROWS, **options)
        for at, task in enumerate(ROWS):
            several.use(task)
            one = written(several, IDS[at : at + 1], attention_mask=mask[at : at + 1], **options)
            assert torch.equal(mixed[at : at + 1], one), task


def test_rows_are_hf_pefts(tmp_path: Path) -> None:
    """`adapter_names`, forward and text."""
    several = compiled("", {"a": "apply lora(r=4) to attn.*", "b": "apply lora(r=2, rslora=true) to mlp.*"})
    several.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(llama()), str(tmp_path / "a"), adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    names = ["b", "__base__", "a", "a", "b"]
    own = [None if name == "__base__" else name for name in names]
    ours = several.eval()(input_ids=IDS, tasks=own).logits
    torch.testing.assert_close(ours, theirs.eval()(input_ids=IDS, adapter_names=names).logits, atol=1e-5, rtol=0)
    assert torch.equal(written(several, tasks=own), written(theirs, adapter_names=names))


def test_tasks_alike_share_a_graph() -> None:
    """One for tasks that differ in numbers alone; by row one for 2, for 3 and 4, for 5 to 8 of a kind."""
    names = [f"t{i}" for i in range(5)]
    several = compiled("", dict.fromkeys(names, LORA)).eval()
    assert len(several.faces) == 1
    for asked in (names[:2], names[3:], names[:3], names[1:]):
        mixed = several(input_ids=IDS[: len(asked)], tasks=asked).logits
        for at, task in enumerate(asked):
            one = several(input_ids=IDS[at : at + 1], tasks=[task]).logits
            torch.testing.assert_close(mixed[at : at + 1], one, atol=1e-5, rtol=0)
    assert len(several.faces) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("apply prefix(length=4) to attn", "in front of every row"),
        ("apply prompt(length=4)", "in front of every row"),
        ("apply lora(r=4, init=pissa) to attn.q", "takes a part out of the frozen weight"),
        ("train norm", "with one weight"),
        (f"quantize mlp.* with nf4\n{LORA}", "with one weight"),
        ("apply ladder to block", "a chain of blocks"),
    ],
)
def test_what_no_row_can_have_for_itself_is_refused(body: str, reason: str) -> None:
    several = compiled("", {"a": LORA, "b": body})
    with pytest.raises(peftc.PeftcError, match="not-by-row") as caught:
        several(input_ids=IDS[:2], tasks=["a", "b"])
    assert reason in str(caught.value)


def test_tasks_that_there_are_not() -> None:
    several = compiled("", BY_ROW)
    with pytest.raises(peftc.PeftcError, match="unknown-task"):
        several.use("A")
    with pytest.raises(peftc.PeftcError, match="unknown-task"):
        several(input_ids=IDS, tasks=["q"] * 5)
    with pytest.raises(peftc.PeftcError, match="other-rows"):
        several(input_ids=IDS, tasks=["a", "b"])
    with pytest.raises(TypeError, match="tasks"):
        compiled(LORA, {})(input_ids=IDS, tasks=["a"] * 5)


KIND = dict.fromkeys("abc", "apply lora(r=4) to attn.q, attn.v, mlp.down")
IN_ROWS = {
    "one behind another": "aabbcc", "in turn": "abcabc", "anyhow": "acbbca", "some more often": "aaabbc",
    "not all": "abab", "every other": "acac", "some of none": "ab-c", "of a kind by themselves": "adbdcd",
}  # fmt: skip


@pytest.mark.parametrize("scales", ["alike", "each its own"])
@pytest.mark.parametrize("rows", IN_ROWS.values(), ids=IN_ROWS)
def test_rows_lie_in_any_order(rows: str, scales: str) -> None:
    """Text and logits of each step, of a prompt and of one token, where tensors lie together and where they do not."""
    alpha = {"alike": dict.fromkeys("abc", 8), "each its own": {"a": 8, "b": 3, "c": 5}}[scales]
    tasks = {name: f"apply lora(r=4, alpha={alpha[name]}) to attn.q, attn.v, mlp.down" for name in "abc"}
    several = compiled("", tasks | {"d": "apply lora(r=2) to attn.o"}).eval()
    asked = [None if name == "-" else name for name in rows]
    ids = torch.cat([IDS, IDS.flip(1)])[: len(rows)]
    apart = written(several, ids, tasks=asked)
    for at, task in enumerate(asked):
        assert torch.equal(apart[at : at + 1], written(several.use(task), ids[at : at + 1])), (at, task)


def test_tensors_of_a_kind_lie_together() -> None:
    """In one piece of memory for as long as text is written, as the parameters that they were, with their gradients."""
    several = compiled("", KIND)
    several(input_ids=IDS[:3], labels=IDS[:3], tasks=[*"abc"]).loss.backward()
    before = {name: (parameter, parameter.clone(), parameter.grad) for name, parameter in several.named_parameters()}

    def pieces() -> int:
        return len({parameter.untyped_storage().data_ptr() for parameter in several.trainable_parameters().values()})

    every = pieces()
    with several.lying_together([*"abc"]):
        assert pieces() == every / 3
    assert pieces() == every
    several.generate(IDS[:3], tasks=[*"abc"], max_new_tokens=2)
    assert pieces() == every
    for name, parameter in several.named_parameters():
        same, numbers, grad = before[name]
        assert parameter is same
        assert torch.equal(parameter, numbers)
        assert parameter.grad is grad


def test_a_kind_of_three_is_read_where_it_lies() -> None:
    """A graph has places for four of them; the last is there twice."""
    first, second, third = torch.randn(3, 4, 6)
    apart = [first.clone(), second.clone(), third.clone()]
    there = stacked_a([first, second, third, third.detach()])
    assert there.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert torch.equal(there, stacked_a([*apart, apart[-1]])[:3])
    assert stacked_b([first, second]).shape == (2, 6, 4)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 0, 0, 1, -1, 1]])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["whole", "half of a wider one", "every other token"])
def test_products_by_row_of_inputs_that_are_views(rows: list[int], tokens: int, kind: str) -> None:
    torch.manual_seed(0)
    x = {
        "whole": torch.randn(6, tokens, 8),
        "half of a wider one": torch.randn(6, tokens, 16)[..., :8],
        "every other token": torch.randn(6, 2 * tokens, 8)[:, ::2],
    }[kind]
    weight, a, b = torch.randn(5, 8), torch.randn(3, 2, 8), torch.randn(3, 5, 2)
    by_task = groups(torch.tensor(rows), range(3), torch.float32)
    for scales in (2.0, (2.0, 1.0, 0.5)):
        found = products(x, weight, None, stacked_a([*a]), stacked_b([*b]), scales, by_task)
        each = [scales] * 3 if isinstance(scales, float) else scales
        for at, task in enumerate(rows):
            own = each[task] * x[at] @ a[task].t() @ b[task].t() if task >= 0 else 0
            torch.testing.assert_close(found[at], x[at] @ weight.t() + own, atol=1e-5, rtol=1e-5)


def test_text_in_inference_mode_leaves_what_can_be_trained() -> None:
    several = compiled("", KIND)
    with torch.inference_mode():
        several.generate(IDS[:3], tasks=[*"abc"], max_new_tokens=2)
    several(input_ids=IDS[:3], labels=IDS[:3], tasks=[*"abc"]).loss.backward()
    assert len(gradients(several)) == len(several.trainable_parameters())


def test_what_lies_together_is_trained_saved_and_copied(tmp_path: Path) -> None:
    several = compiled("", KIND)
    several.generate(IDS[:3], tasks=[*"abc"], max_new_tokens=2)
    several.save(tmp_path / "all")
    again = peftc.load(tmp_path / "all", llama())
    for one in (again, copy.deepcopy(several)):
        assert torch.equal(written(one, IDS[:3], tasks=[*"abc"]), written(several, IDS[:3], tasks=[*"abc"]))
    several.remove_task("b").add_task("e", KIND["a"])
    optimizer = torch.optim.AdamW(several.param_groups(lr=0.1))
    several(input_ids=IDS[:3], labels=IDS[:3], tasks=["a", "e", "c"]).loss.backward()
    optimizer.step()
    mixed = written(several, IDS[:3], tasks=["a", "e", "c"])
    for at, task in enumerate(["a", "e", "c"]):
        assert torch.equal(mixed[at : at + 1], written(several.use(task), IDS[at : at + 1]))
