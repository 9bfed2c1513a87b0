"""A compiled model where a model is used: pipelines, TRL's trainers, a sequence-to-sequence trainer that generates.

Losses are HF PEFT's from the same start, to 1e-4 (fp32, four steps).
"""

import copy
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer

import models
import peftc

COMMON: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0,
}  # fmt: skip
TEXTS = ["The capital of France is Paris. ", "Water boils at a hundred degrees. ", "A list is a sequence. "] * 4


@cache
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(models.smollm2_dir())
    found.pad_token = found.eos_token
    return found


@cache
def llama() -> Any:
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer(), f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **special,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


@cache
def t5() -> Any:
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)  # type: ignore[call-arg]
    )


def both(base: Any, folder: Path, **config: Any) -> tuple[Any, Any]:
    """HF PEFT's and ours, from the same start."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, **config))
    theirs.save_pretrained(str(folder))
    return theirs, peftc.load_peft(copy.deepcopy(base), folder)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_pipeline_writes_what_the_base_model_does() -> None:
    base = models.smollm2()
    pipeline: Any = hf.pipeline
    ours = pipeline("text-generation", model=peftc.compile(base, "apply lora(r=4) to attn.q"), tokenizer=tokenizer())
    theirs = pipeline("text-generation", model=base, tokenizer=tokenizer())
    texts = ["The capital of France is", "In Python, a list is"]
    for text in texts:
        assert ours(text, max_new_tokens=8, do_sample=False) == theirs(text, max_new_tokens=8, do_sample=False)


def libraries() -> tuple[Any, Any]:
    """datasets and TRL, whose import takes seconds."""
    return importlib.import_module("datasets"), importlib.import_module("trl")


def supervised(model: Any, folder: Path, *, packing: bool) -> Any:
    datasets, trl = libraries()

    args = trl.SFTConfig(
        output_dir=str(folder), packing=packing, max_length=64, gradient_checkpointing=False, loss_type="nll",
        bf16=False, **COMMON,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"text": text * 3} for text in TEXTS])
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())


def preferring(model: Any, folder: Path) -> Any:
    datasets, trl = libraries()

    args = trl.DPOConfig(output_dir=str(folder), max_length=64, gradient_checkpointing=False, bf16=False, **COMMON)
    pairs = [{"prompt": "Say: ", "chosen": text[:20], "rejected": text[-12:]} for text in TEXTS]
    # HF PEFT's model is its own reference, with the adapter switched off
    reference = None if isinstance(model, peft.PeftModel) else copy.deepcopy(llama())
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )


TRAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "supervised": lambda model, folder: supervised(model, folder, packing=False),
    "packed": lambda model, folder: supervised(model, folder, packing=True),
    "preferring": preferring,
}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_as_with_hf_peft(kind: str, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    theirs, ours = both(llama(), tmp_path / "adapter", **config)
    expected = losses(TRAINERS[kind](theirs, tmp_path / "theirs"))
    assert len(set(expected)) == COMMON["max_steps"]
    assert losses(TRAINERS[kind](ours, tmp_path / "ours")) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_predicts_by_generating(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(7, dtype=torch.long)
    data = [
        {"input_ids": drawn[:7], "attention_mask": mask, "labels": drawn[7:]}
        for drawn in torch.randint(3, 99, (8, 12), generator=generator)
    ]
    found = []
    for model in both(t5(), tmp_path / "adapter", target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"):
        args = hf.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "run"), predict_with_generate=True, generation_max_length=6, **COMMON
        )
        trainer = hf.Seq2SeqTrainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4])  # type: ignore[arg-type]
        found.append((losses(trainer), trainer.predict(data[:4])))  # type: ignore[arg-type]
    (expected, theirs), (ours, mine) = found
    assert ours == pytest.approx(expected, abs=1e-4)
    assert mine.predictions.tolist() == theirs.predictions.tolist()  # type: ignore[union-attr]
    assert mine.metrics is not None
    assert theirs.metrics is not None
    assert mine.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-4)


# ---- What would be lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "code"),
    [("apply lora(r=4) to head", "without-head"), ("apply diff_pruning to attn.q", "own-loss")],
)
def test_hidden_states_alone_are_refused_where_something_would_be_lost(spec: str, code: str) -> None:
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = peftc.compile(hf.LlamaForCausalLM(config), spec)
    with pytest.raises(peftc.PeftcError) as caught:
        model.base_model(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert caught.value.diagnostics[0].code == code


def test_the_head_makes_the_logits_of_the_hidden_states() -> None:
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = peftc.compile(hf.LlamaForCausalLM(config), "apply prompt(length=3)\napply lora(r=4) to attn.q").eval()
    tokens = torch.randint(99, (2, 5))
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(hidden @ head.weight.t(), expected, rtol=0, atol=1e-5)  # type: ignore[operator]
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in model.trainable_parameters().values())
