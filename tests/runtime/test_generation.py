"""A compiled model continues text as its merged model does, by transformers' own `generate`.

Tokens are compared: what cannot be merged is held to the module's own forward over the whole text, one token after the
other.
"""

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import peftc
from peftc.capture.cached import CACHES
from peftc.driver.compiled import WHOLE_TEXTS

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = hf.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=2)
WINDOWED = hf.Gemma2Config(**SIZES, **SPECIAL, num_key_value_heads=2, head_dim=16, sliding_window=6)
GPT2 = hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
BLOOM = hf.BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4, **SPECIAL)
OPT = hf.OPTConfig(
    vocab_size=99, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
    max_position_embeddings=64, **SPECIAL,
)  # fmt: skip
MIXTRAL = hf.MixtralConfig(**SIZES, **SPECIAL, num_key_value_heads=2, num_local_experts=4)
T5 = hf.T5Config(  # type: ignore[call-arg]
    vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
BART = hf.BartConfig(
    vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96,
    decoder_attention_heads=4, decoder_ffn_dim=96, max_position_embeddings=64, decoder_start_token_id=2,
    forced_eos_token_id=None, **SPECIAL,
)  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (hf.LlamaForCausalLM, LLAMA),
    "windowed": (hf.Gemma2ForCausalLM, WINDOWED),
    "gpt2": (hf.GPT2LMHeadModel, GPT2),
    "bloom": (hf.BloomForCausalLM, BLOOM),
    "opt": (hf.OPTForCausalLM, OPT),
    "mixtral": (hf.MixtralForCausalLM, MIXTRAL),
    "t5": (hf.T5ForConditionalGeneration, T5),
    "bart": (hf.BartForConditionalGeneration, BART),
}
LORA = "apply lora(r=4, alpha=64) to attn.*, mlp.*"
NEW = 12
CACHE = next(name for name in CACHES if name in signature(hf.LlamaForCausalLM.forward).parameters)


def base(name: str) -> Any:
    """Random weights, large enough for texts that do not repeat one token."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@cache
def compiled(name: str, spec: str = LORA) -> peftc.CompiledModule:
    """A model that learnt something, of whatever it was made of."""
    generator = torch.Generator().manual_seed(1)
    plain = base(name)
    tokens = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": tokens, "attention_mask": tokens, "decoder_input_ids": tokens[:, 3:]}
    with torch.random.fork_rng(devices=[]):
        model = peftc.compile(plain, spec, example=example if plain.config.is_encoder_decoder else None)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def merged(name: str, spec: str = LORA) -> Any:
    """The same as a plain model."""
    return compiled(name, spec).merge().eval()


def prompts() -> dict[str, Tensor]:
    """Two texts of unlike length, padded at their left."""
    tokens = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return {"input_ids": torch.where(mask > 0, tokens, 0), "attention_mask": mask}


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "several beams of each": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7, 9]]},
    "ends early": {"eos_token_id": list(range(40, 99))},
    "no earlier": {"min_new_tokens": 9, "eos_token_id": list(range(40, 99))},
    "most tokens": {"max_length": 13, "max_new_tokens": None},
    "a chunked prompt": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "forced": {"forced_eos_token_id": 4},
}


def written(model: Any, given: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(7)
    return torch.as_tensor(model.generate(**given, **{"max_new_tokens": NEW, **settings}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_text_is_the_merged_models(setting: str) -> None:
    settings = SETTINGS[setting]
    given = prompts()
    if setting == "prompt lookup":  # transformers looks one text up at a time
        given = {name: tensor[:1] for name, tensor in given.items()}
    expected = written(merged("llama"), given, **settings)
    assert len(expected.unique()) > 5
    assert torch.equal(written(compiled("llama"), given, **settings), expected)


@pytest.mark.parametrize("name", tuple(MODELS)[1:])
@pytest.mark.parametrize("setting", ["greedy", "beams", "sampled"])
@pytest.mark.slow
def test_text_is_the_merged_models_whatever_the_architecture(name: str, setting: str) -> None:
    settings = SETTINGS[setting]
    expected = written(merged(name), prompts(), **settings)
    assert torch.equal(written(compiled(name), prompts(), **settings), expected)
    assert WHOLE_TEXTS not in compiled(name).report()
    assert compiled(name).continuation().keeps


UNMERGED = {
    "a prefix": "apply prefix(length=3) to attn",
    "a prompt": "apply prompt(length=4)",
    "both": "apply prefix(length=3) to attn\napply prompt(length=4)\napply lora(r=4) to mlp.*",
    "a prompt of an encoder": "apply ptuning(length=4)",
    "prompts attended apart": "apply llama_adapter(length=3) to attn",
    "adapters": "apply adapter(size=8) to attn, mlp",
    "a ladder": "apply ladder to block",
    "gates": "apply gated(lora(r=4)) to attn.q, attn.v\napply gated(prefix(length=3)) to attn",
    "4 bits": "quantize linear except head with nf4(double=true)\napply dora(r=4) to attn.*, mlp.*",
    "8 bits": "quantize linear except head with int8\napply lora(r=4, dropout=0.5) to attn.*",
}


def one_after_the_other(model: Any, tokens: Tensor) -> Tensor:
    """What a model's own forward over the whole text says, token after token."""
    training = model.training
    model.eval()
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1)[:, None]], 1)
    model.train(training)
    return tokens


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow),
                                  pytest.param("bloom", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("kind", UNMERGED)
def test_text_is_that_of_the_forward_over_all_of_it(name: str, kind: str) -> None:
    """In a batch with padding, each text as if it were alone; nothing is dropped out, in training neither."""
    model, given = compiled(name, UNMERGED[kind]), prompts()
    assert model.training
    found = written(model, given)
    for row, kept in enumerate(given["attention_mask"].bool()):
        alone = one_after_the_other(model, given["input_ids"][row][kept][None])
        assert found[row, -NEW:].tolist() == alone[0, -NEW:].tolist()
    assert model.training
    assert model.continuation().keeps


@pytest.mark.parametrize("kind", ["a prefix", "a prompt", "both", "adapters", "4 bits"])
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.slow
def test_an_encoders_text_is_read_once(name: str, kind: str) -> None:
    model = compiled(name, UNMERGED[kind]).eval()
    given = {"input_ids": prompts()["input_ids"][:1], "attention_mask": prompts()["attention_mask"][:1]}
    found = written(model, given)
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    encoded = model.generate(**given, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(encoded.sequences, found[:, :3])
    tokens = start
    for _ in range(NEW):
        out = model(**given, decoder_input_ids=tokens)
        tokens = torch.cat([tokens, out.logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(tokens, found)


# ---- The forward with a cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a prompt", "a prefix"])
def test_a_call_goes_on_from_a_cache(kind: str) -> None:
    """One token, several, and a cache of the caller's own; logits to 1e-5 (fp32, sums of other lengths)."""
    model, tokens = compiled("llama", UNMERGED[kind]).eval(), prompts()["input_ids"]
    tokens = torch.cat([tokens, tokens + 1], 1) % 99
    whole = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    cache, found = DynamicCache(), []
    for part in tokens.split([5, 1, 1, 3, 8], 1):
        out = model(input_ids=part, **{CACHE: cache})
        assert out[CACHE] is cache
        found.append(out.logits)
    assert cache.get_seq_length() == tokens.shape[1]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)


def test_what_is_learnt_after_a_text_counts_in_the_next() -> None:
    torch.manual_seed(0)
    model = peftc.compile(base("llama"), LORA)
    first = written(model, prompts())
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    second = written(model, prompts())
    assert not torch.equal(first, second)
    assert torch.equal(second, written(model.merge().eval(), prompts()))


@pytest.mark.parametrize("spec", [LORA, "apply dora(r=4, alpha=64) to attn.*"])
def test_numbers_that_were_written_past_autograd_count_too(spec: str) -> None:
    torch.manual_seed(0)
    model = peftc.compile(base("llama"), spec)
    first = written(model, prompts())
    for parameter in model.trainable_parameters().values():
        parameter.data.mul_(2).add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    second = written(model, prompts())
    assert not torch.equal(first, second)
    assert torch.equal(second, written(model.merge().eval(), prompts()))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.7}, {"num_beams": 3}, {"max_new_tokens": 5}])
def test_what_the_base_models_generation_config_says_holds(setting: dict[str, Any]) -> None:
    model = base("llama")
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    ours = peftc.compile(model, LORA)
    given = prompts()
    assert torch.equal(ours.generate(**given), model.generate(**given))


class Said(hf.TextStreamer):
    """What was streamed."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        self.tokens.append(torch.tensor([-1]))


def test_a_text_is_streamed_and_comes_with_its_scores() -> None:
    streamer = Said()
    given = {name: tensor[:1] for name, tensor in prompts().items()}
    found = compiled("llama").generate(
        **given, max_new_tokens=4, streamer=streamer, return_dict_in_generate=True, output_scores=True
    )
    assert torch.cat(streamer.tokens).tolist() == [*found.sequences[0].tolist(), -1]
    expected = merged("llama").generate(**given, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)  # logits of tens, fp32


def test_another_model_drafts_what_the_compiled_one_writes() -> None:
    given = {name: tensor[:1] for name, tensor in prompts().items()}
    drafts = base("llama")
    drafts.generation_config.num_assistant_tokens = 3
    found = written(compiled("llama"), given, assistant_model=drafts)
    assert torch.equal(found, written(merged("llama"), given))


def test_the_text_is_the_models_own_under_autocast_and_in_inference_mode() -> None:
    expected = written(compiled("llama"), prompts())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(written(compiled("llama"), prompts()), expected)
    with torch.inference_mode():
        assert torch.equal(written(compiled("llama"), prompts()), expected)


def test_another_generation_config_is_the_compiled_models_alone() -> None:
    model = base("llama")
    ours = peftc.compile(model, LORA)
    ours.generation_config = hf.GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert ours.generate(**prompts()).shape[1] == prompts()["input_ids"].shape[1] + 3
    assert model.generation_config is not ours.generation_config


class Bare(hf.LlamaForCausalLM):
    """A model that knows tokens alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, labels=labels, use_cache=False)


def test_without_a_cache_the_whole_text_runs() -> None:
    torch.manual_seed(0)
    model: Any = Bare(LLAMA)
    model.eval()
    model.generation_config.eos_token_id = None
    ours = peftc.compile(model, LORA)
    tokens = prompts()["input_ids"]
    found = ours.generate(tokens, max_new_tokens=NEW)
    for _ in range(NEW):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)
    assert WHOLE_TEXTS in ours.report()
    assert not ours.continuation().keeps
    assert WHOLE_TEXTS in ours.report()
    with pytest.raises(peftc.PeftcError, match="is called with padding"):
        ours(**prompts(), use_cache=True)


# ---- What is refused ------------------------------------------------------------------------------------------------


REFUSED: dict[str, Callable[[Any], Any]] = {
    "other-cache": lambda model: model(
        input_ids=prompts()["input_ids"], **{CACHE: StaticCache(config=model.config, max_cache_len=20)}
    ),
    "other-sizes": lambda model: model(
        input_ids=prompts()["input_ids"], attention_mask=torch.ones(2, 7, dtype=torch.long), use_cache=True
    ),
    "not-captured": lambda model: model.generate(
        **prompts(), output_attentions=True, return_dict_in_generate=True, max_new_tokens=1
    ),
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_is_not_in_the_graph_is_refused(code: str) -> None:
    with pytest.raises(peftc.PeftcError) as caught:
        REFUSED[code](compiled("llama").eval())
    assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize("given", [{"inputs_embeds": torch.ones(2, 3, 64)}, {"pixel_values": torch.ones(2, 3)}, {}])
def test_inputs_that_it_does_not_take_are_named(given: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=next(iter(given), "input_ids")):
        compiled("llama")(**given, use_cache=True)


def test_a_model_that_continues_no_text_says_so() -> None:
    model = peftc.compile(hf.LlamaForSequenceClassification(LLAMA), "apply lora(r=4) to attn.q")
    assert not model.can_generate()
    with pytest.raises(peftc.PeftcError, match="does not continue text"):
        model.generate(prompts()["input_ids"])


def test_a_way_that_was_tried_in_vain_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Products of experts want another precision where tensors have no numbers, which torch tells at length."""
    made = peftc.compile(base("mixtral"), "apply prefix(length=3) to attn").eval()
    made.generate(torch.randint(3, 99, (2, 5)), max_new_tokens=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
