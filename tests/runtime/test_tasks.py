"""Several tasks over one base: each is what it is compiled alone; they are saved, added, removed and trained."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import peftc
from manytasks import BY_ROW, IDS, LORA, SPECS, alone, compiled, gradients, llama, text_of, written
from peftc.language import unparse


@pytest.mark.parametrize("name", SPECS)
def test_a_task_in_use_is_what_it_is_alone(name: str) -> None:
    common, tasks = SPECS[name]
    several = compiled(common, tasks)
    for task, body in tasks.items():
        single = alone(several, task, f"{common}\n{body}")
        assert several.use(task).in_use == task
        for module in (several, single):
            module.train().zero_grad()
            module(input_ids=IDS, labels=IDS).loss.backward()
        own = {name.removeprefix(f"task.{task}."): grad for name, grad in gradients(several).items()}
        assert own.keys() == gradients(single).keys()
        for full, grad in gradients(single).items():
            assert torch.equal(own[full], grad), full
        assert torch.equal(several.eval()(input_ids=IDS).logits, single.eval()(input_ids=IDS).logits)
    assert torch.equal(written(several), written(single))


@pytest.mark.parametrize("name", SPECS)
def test_disabled_it_is_the_base_model(name: str) -> None:
    """But for its weights' storage; whatever was trained, and whichever task is in use."""
    common, tasks = SPECS[name]
    several = compiled(common, tasks).eval()
    base = peftc.compile(llama(), f"quantize linear except head with nf4\n{LORA}") if "nf4" in common else llama()
    for context in (several.disabled, several.disable_adapter):
        with context():
            torch.testing.assert_close(
                several(input_ids=IDS).logits, base.eval()(input_ids=IDS).logits, atol=1e-5, rtol=0
            )
        assert several.in_use == next(iter(tasks))


def test_a_model_without_tasks_can_be_disabled() -> None:
    made = compiled(f"train norm\n{LORA}", {}).eval()
    with made.disabled():
        torch.testing.assert_close(made(input_ids=IDS).logits, llama()(input_ids=IDS).logits, atol=1e-6, rtol=0)
        assert torch.equal(written(made), written(llama()))
    assert not torch.allclose(made(input_ids=IDS).logits, llama()(input_ids=IDS).logits, atol=1e-3)


def test_none_in_use_is_what_all_have_in_common() -> None:
    common, tasks = SPECS["methods"]
    several = compiled(common, tasks)
    single = alone(several, None, common)
    assert torch.equal(several.use(None).eval()(input_ids=IDS).logits, single.eval()(input_ids=IDS).logits)


def test_a_task_that_starts_from_data() -> None:
    common, body = "apply ia3 to mlp.down", "apply lora(r=4, init=eva) to attn.q"
    batches = [{"input_ids": IDS, "labels": IDS}]
    with pytest.raises(peftc.PeftcError, match="needs-calibration"):
        compiled(common, {"a": LORA, "b": body})
    several = peftc.compile(llama(), text_of(common, {"a": LORA, "b": body}), calibration=batches)
    single = peftc.compile(llama(), f"{common}\n{body}", calibration=batches)
    name = "model.layers.0.self_attn.q_proj.lora.A"
    torch.testing.assert_close(several.get_parameter(f"task.b.{name}"), single.get_parameter(name))
    with pytest.raises(peftc.PeftcError, match="cannot-calibrate"):
        several.add_task("c", body)


# Saved, added, removed


def logits(module: Any, task: str | None) -> torch.Tensor:
    found: torch.Tensor = module.use(task).eval()(input_ids=IDS).logits
    return found


def test_all_are_saved_and_each(tmp_path: Path) -> None:
    common, tasks = SPECS["methods"]
    several = compiled(common, tasks)
    several.save(tmp_path / "all")
    again = peftc.load(tmp_path / "all", llama())
    assert again.tasks == several.tasks
    for task in (None, *tasks):
        assert torch.equal(logits(again, task), logits(several, task))
    for task in tasks:
        several.save(tmp_path / task, task=task)
        single = peftc.load(tmp_path / task, llama())
        assert single.tasks == ()
        assert torch.equal(single.eval()(input_ids=IDS).logits, logits(several, task))


def test_tasks_come_and_go(tmp_path: Path) -> None:
    common, tasks = SPECS["methods"]
    several = compiled(common, tasks)
    wanted = {task: logits(several, task) for task in tasks}
    several.save(tmp_path / "other", task="other")
    several.save(tmp_path / "two", task="two")
    several.use("one")
    several.add_task("third", tmp_path / "two").remove_task("two")
    assert several.in_use == "one"
    assert len(several.faces) == 2
    several.rename_task("one", "first").replace_task("third", tmp_path / "other")
    assert several.in_use == "first"
    assert several.tasks == ("first", "other", "third")
    assert torch.equal(logits(several, "first"), wanted["one"])
    assert torch.equal(logits(several, "third"), wanted["other"])
    assert not any(name.startswith(("task.one.", "task.two.")) for name in several.state_dict())
    several.save(tmp_path / "now")
    assert torch.equal(logits(peftc.load(tmp_path / "now", llama()), "third"), wanted["other"])
    several.use("third").remove_task("third")
    assert several.in_use is None
    several.add_task("fresh", LORA)
    assert torch.equal(logits(several, "fresh"), logits(several, None))


def test_a_task_that_writes_its_frozen_weight_is_replaced_by_one_like_it(tmp_path: Path) -> None:
    """What PiSSA leaves of the weight depends on what it took out, which differs from one folder to the other."""
    pissa = "apply lora(r=4, init=pissa) to attn.q"
    one, two = (compiled("", {"a": pissa, "b": LORA}) for _ in range(2))
    state = two.state_dict()
    two.load_state_dict({name: -tensor if name.endswith("B0") else tensor for name, tensor in state.items()})
    two.save(tmp_path / "a", task="a")
    before = logits(one, "a")
    one.replace_task("a", tmp_path / "a")
    assert torch.equal(logits(one, "a"), logits(two, "a"))
    assert not torch.allclose(logits(one, "a"), before, atol=1e-3)


def test_a_task_from_hf_pefts_folder(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(llama()), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(str(tmp_path))
    several = compiled("", {"a": LORA}).add_task("theirs", tmp_path)
    torch.testing.assert_close(logits(several, "theirs"), theirs.eval()(input_ids=IDS).logits, atol=1e-5, rtol=0)


def test_what_cannot_be_added_changes_nothing(tmp_path: Path) -> None:
    several = compiled("apply ia3 to mlp.down\nrequire trainable <= 4000", {"a": LORA})
    several.save(tmp_path / "a", task="a")
    several.save(tmp_path / "all")
    before = {name: tensor.clone() for name, tensor in several.state_dict().items()}
    with torch.no_grad():
        several.get_parameter("model.layers.0.mlp.down_proj.ia3.l").add_(1)
    for name, given, code in (
        ("b", "apply lora to attn.zz " + "#" * 5000, "unknown-role"),
        ("a", LORA, "name-taken"), ("no name", LORA, "syntax"), ("b", "apply lora to nothing", "unknown-role"),
        ("b", "apply lora(r=99) to linear", "over-budget"), ("b", tmp_path / "a", "bad-task"),
        ("b", tmp_path / "all", "bad-artifact"), ("b", "task c {\n}", "nested-task"),
    ):  # fmt: skip
        with pytest.raises(peftc.PeftcError, match=code):
            several.add_task(name, given)
    assert several.tasks == ("a",)
    assert several.state_dict().keys() == before.keys()
    assert "task b" not in unparse(several.plan.spec)


def test_what_is_in_use_is_merged() -> None:
    common, tasks = SPECS["methods"]
    several = compiled(common, {"one": tasks["one"], "two": LORA})
    for task in several.tasks:
        merged = several.use(task).merge().eval()
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits(several, task), atol=1e-5, rtol=0)


def test_a_copy_has_tasks_of_its_own() -> None:
    several = compiled("", BY_ROW)
    copied = copy.deepcopy(several)
    with torch.no_grad():
        for parameter in several.trainable_parameters().values():
            parameter.zero_()
    assert not torch.equal(logits(copied, "b"), logits(several, "b"))


# Training


def test_a_backward_pass_has_its_own_tasks_tensors() -> None:
    """Two tasks share a graph, and blocks compute again what they did not keep: both forward passes come first."""
    several = compiled("checkpoint block", {"a": LORA, "b": LORA, "c": "apply dora(r=2) to mlp.*"})

    def forward(task: str) -> Any:
        return several.use(task)(input_ids=IDS, labels=IDS).loss

    for task in several.tasks:
        forward(task).backward()
    apart = {name: grad.clone() for name, grad in gradients(several).items()}
    several.zero_grad()
    sum(forward(task) for task in several.tasks).backward()
    together = gradients(several)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], grad) for name, grad in apart.items())


def test_a_trainer_trains_what_is_in_use(tmp_path: Path) -> None:
    """And its methods' schedules: AdaLoRA's ranks shrink; the other task stays."""
    several = compiled("", SPECS["with a schedule"][1]).use("a")
    before = {name: tensor.clone() for name, tensor in several.state_dict().items()}
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    hf.Trainer(several, arguments, train_dataset=data, callbacks=[several.callback()]).train()
    now = several.state_dict()
    changed = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in changed if name.startswith("task.a.")}
    assert changed
    values = [tensor for name, tensor in now.items() if name.endswith("adalora.E")]
    assert sum(int((tensor != 0).sum()) for tensor in values) == 2 * len(values)


def test_under_torch_compile() -> None:
    several = compiled("", {"a": LORA, "b": "apply lora(r=2) to mlp.*"}).eval()
    wanted = {task: logits(several, task) for task in several.tasks}
    for task in several.tasks:
        torch._dynamo.reset()
        compile: Any = torch.compile
        faster = compile(several.use(task), backend="aot_eager")
        torch.testing.assert_close(faster(input_ids=IDS).logits, wanted[task], atol=1e-5, rtol=0)
