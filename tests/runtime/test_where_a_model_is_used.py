"""A compiled model where a model is used: pipelines, TRL's trainers, a sequence-to-sequence trainer that generates.

Losses, norms of gradients and divergences are HF PEFT's from the same start, to 1e-5 (fp32, four steps).
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
from training import randomise

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


def supervised(model: Any, folder: Path, **settings: Any) -> Any:
    datasets, trl = libraries()
    args = trl.SFTConfig(output_dir=str(folder), max_length=64, bf16=False, **COMMON, **settings)
    data = datasets.Dataset.from_list([{"text": text * 3} for text in TEXTS])
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())


def preferring(model: Any, folder: Path, reference: Any = None) -> Any:
    datasets, trl = libraries()
    args = trl.DPOConfig(output_dir=str(folder), max_length=64, bf16=False, **COMMON)
    pairs = [{"prompt": "Say: ", "chosen": text[:20], "rejected": text[-12:]} for text in TEXTS]
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )


def rewarded(model: Any, folder: Path, beta: float) -> Any:
    """Two steps on each group of texts: in the second the texts are of an earlier model, and the loss is not near 0."""
    datasets, trl = libraries()
    args = trl.GRPOConfig(
        output_dir=str(folder), beta=beta, num_generations=4, max_completion_length=8, num_iterations=2, bf16=False,
        **(COMMON | {"per_device_train_batch_size": 4, "learning_rate": 1e-2}),
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [len(set(text)) / 10 for text in completions],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": text[:20]} for text in TEXTS]),
        processing_class=tokenizer(),
    )


# TRL's defaults, gradient_checkpointing=True among them; without bf16, which rounds to three digits.
TRAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "supervised": supervised,
    "packed": lambda model, folder: supervised(model, folder, packing=True),
    "not checkpointed": lambda model, folder: supervised(model, folder, gradient_checkpointing=False),
    "preferring": preferring,
    "rewarded": lambda model, folder: rewarded(model, folder, beta=0.0),
    "rewarded, with a reference": lambda model, folder: rewarded(model, folder, beta=0.5),
}
TOLD = ("loss", "grad_norm", "kl", "reward")
LLAMA_LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that came from a folder, where TRL looks for the reference of one that is not HF PEFT's."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def told(trainer: Any) -> list[float]:
    """What a training logs of each step, as far as it is the same in every run."""
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == COMMON["max_steps"]
    assert len({entry["loss"] for entry in entries}) == len(entries)
    return [entry[name] for entry in entries for name in TOLD if name in entry]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_as_with_hf_peft(kind: str, saved: Any, tmp_path: Path) -> None:
    theirs, ours = both(saved, tmp_path / "adapter", **LLAMA_LORA)
    expected = told(TRAINERS[kind](theirs, tmp_path / "theirs"))
    trainer = TRAINERS[kind](ours, tmp_path / "ours")
    assert told(trainer) == pytest.approx(expected, abs=1e-5)
    assert ours.is_activation_checkpointing is (kind != "not checkpointed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_reference_of_a_trained_adapter_is_a_copy_of_the_model(tmp_path: Path) -> None:
    """As HF PEFT's is, of whose adapter TRL makes a copy."""
    theirs, _ = both(llama(), tmp_path / "start", **LLAMA_LORA)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "trained"))
    ours = peftc.load_peft(copy.deepcopy(llama()), tmp_path / "trained")
    expected = told(preferring(theirs, tmp_path / "theirs"))
    assert told(preferring(ours, tmp_path / "ours", copy.deepcopy(ours))) == pytest.approx(expected, abs=1e-5)


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
    assert ours == pytest.approx(expected, abs=1e-5)
    assert mine.predictions.tolist() == theirs.predictions.tolist()  # type: ignore[union-attr]
    assert mine.metrics is not None
    assert theirs.metrics is not None
    assert mine.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-5)


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
