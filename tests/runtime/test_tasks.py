"""Several tasks over one base: each is what it is compiled alone, one after the other and row by row."""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import peftc
import zoo
from peftc.language import unparse

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 99, (5, 7), generator=torch.Generator().manual_seed(0))
LORA = "apply lora(r=4) to attn.q, attn.v"
ADALORA = "apply adalora(r=8, target=2, warmup=2, final=2, interval=1) to attn.v"

# What all have in common, and each task's own.
SPECS: dict[str, tuple[str, dict[str, str]]] = {
    "methods": (
        "apply ia3 to mlp.down",
        {"one": LORA, "two": LORA, "other": "apply dora(r=3) to mlp.up\napply adapter(size=4) to mlp\ntrain norm"},
    ),
    "in front": ("", {"a": "apply prefix(length=4) to attn", "b": "apply prompt(length=3)", "c": LORA}),
    "taken out": ("", dict.fromkeys("ab", "apply lora(r=4, init=pissa) to attn.q") | {"c": LORA}),
    "taken out for all": ("apply lora(r=4, init=pissa) to attn.q", {"a": "apply ia3 to attn.k", "b": "train norm"}),
    "packed": ("quantize linear except head with nf4", {"a": LORA, "b": "apply lora(r=2, init=pissa) to attn.o"}),
    "one packed": ("", {"a": f"quantize mlp.* with nf4\n{LORA}", "b": LORA}),
    "with a schedule": ("", {"a": ADALORA, "b": "apply vera(r=8) to attn.q, attn.v"}),
}


@cache
def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


def text_of(common: str, tasks: Mapping[str, str]) -> str:
    return "\n".join((common, *(f"task {name} {{\n{body}\n}}" for name, body in tasks.items())))


def compiled(common: str, tasks: Mapping[str, str], base: Any = None) -> Any:
    """With numbers at random in all that learns."""
    made = peftc.compile(llama() if base is None else base, text_of(common, tasks))
    with torch.no_grad():
        for parameter in made.trainable_parameters().values():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return made


def alone(several: Any, task: str | None, text: str) -> Any:
    """One task's own spec, compiled by itself, with the tensors that it has among the others."""
    made = peftc.compile(several.base, text)
    state = several.state_dict()
    made.load_state_dict({name: state.get(f"task.{task}.{name}", state.get(name)) for name in made.state_dict()})
    return made


def gradients(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def written(module: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    found: torch.Tensor = module.generate(
        ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), max_new_tokens=6, min_new_tokens=6,
        do_sample=False, **options,
    )  # fmt: skip
    return found


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


# Row by row

BY_ROW = {
    "a": "apply lora(r=4) to attn.*, mlp.* except expert",
    "b": "apply lora(r=2, alpha=8) to attn.q, mlp.down except expert\napply ia3 to attn.k",
    "c": "apply dora(r=3) to attn.v\napply adapter(size=4) to attn",
}
ROWS: Sequence[str | None] = ("b", None, "a", "c", "a")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("llama", "gpt2") else pytest.mark.slow) for n in (
        "llama", "gpt2", "gemma2", "phi3", "falcon_new", "bert", "modernbert", "t5", "bart", "vit",
    )],
)  # fmt: skip
def test_each_row_is_what_its_task_makes_of_it(name: str) -> None:
    """fp32: 1e-5 for sums in another order; T5's loss over all rows is the mean of as many tokens of each."""
    base = zoo.ZOO[name]()
    several = compiled("", BY_ROW, base).eval()
    given = zoo.inputs(base, batch=len(ROWS))
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
