"""A tokenizer as a GGUF file says it: its tokens and their kinds, merges or scores, and who splits text before it.

Two kinds of byte-pair encoding have a place there: that of bytes spelt as letters, whose merges are listed and whose
way of splitting has one of llama.cpp's names; and that of sentencepiece, whose merges follow from a score of each
token. What is written is read back by transformers, and has to cut texts into the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.export.errors import NotInGguf, NoTokenizerToExport

INSTEAD = "pass another tokenizer, or write a folder by merge() for llama.cpp's own script that converts one"
# llama.cpp's names (llama_vocab::impl::load) of ways to split that transformers' table of them leaves out.
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
OWN = {
    "gpt-2": [LETTERS],
    "smollm": [{"type": "Digits", "individual_digits": True}, LETTERS],
}
LETTERS_ALONE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
PROBES = (
    "The capital of France is Paris.", "  two spaces,\ttabs\n\nand lines\n", "We'll say it's 1234567890 or 3.14e-5!",
    "Grüße, naïve café — “quoted” …", "日本語と한국어 и русский", "def f(x):\n    return {x: [1, 2]}  # ok", "👩‍🚀🎉",
    "CamelCase snake_case <tag/> https://a.b/c?d=e&f", " ", "",
)  # fmt: skip


def tokenizer_for(source: Any) -> Any:
    """A tokenizer, where it is not one already: that of a folder or hub id.

    Raises:
        PeftcError: `no-tokenizer`.
    """
    if source is not None and not isinstance(source, str | Path):
        return source
    if not source:
        reason = "the base model does not say where it came from"
        raise PeftcError(NoTokenizerToExport(reason=reason))
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # libraries that read what others wrote raise anything
        reason = f"{source}: {type(error).__name__}: {error}".splitlines()[0]
        raise PeftcError(NoTokenizerToExport(reason=reason)) from error


class Vocabulary:
    """What a tokenizer is as a GGUF file says it, for a model with `size` rows of embeddings.

    Raises:
        PeftcError: `not-in-gguf` where it is of a kind that has no place there.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refused("the tokenizer is none of the tokenizers library, and does not say its merges")
        self._parts: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = self._parts["model"]
        if self._model["type"] != "BPE":
            raise _refused(f"the tokenizer is a {self._model['type']}, and not of byte pairs")
        if (last := max(tokenizer.get_vocab().values())) >= size:
            raise _refused(f"the tokenizer has a token {last}, and the model {size} rows of embeddings")
        self._by_letters = not self._model.get("byte_fallback") and "ByteLevel" in _types(self._parts["decoder"])
        self.splitting = self._split() if self._by_letters else "default"

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Adds all of it to a file."""
        kind = gguf.BpeVocab if self._by_letters else gguf.LlamaHfVocab
        writer.add_tokenizer_model(kind.tokenizer_model)
        writer.add_tokenizer_pre(self.splitting)
        tokens = self._tokens()
        writer.add_token_list([token for token, _ in tokens])
        writer.add_token_types([kind for _, kind in tokens])
        if self._by_letters:
            writer.add_token_merges([" ".join(pair) for pair in self._merges()])
        else:
            writer.add_token_scores(self._scores([token for token, _ in tokens]))
            writer.add_add_space_prefix(self._adds_space())
        for name in ("bos", "eos", "unk", "pad"):
            if (number := getattr(self._tokenizer, f"{name}_token_id")) is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        plain, whole = (self._tokenizer("a", add_special_tokens=given).input_ids for given in (False, True))
        writer.add_add_bos_token(whole != plain and whole[0] == self._tokenizer.bos_token_id)
        writer.add_add_eos_token(whole != plain and whole[-1] == self._tokenizer.eos_token_id)
        if isinstance(self._tokenizer.chat_template, str):
            writer.add_chat_template(self._tokenizer.chat_template)

    def check(self, file: Path) -> None:
        """Raises PeftcError `not-in-gguf` unless transformers reads the same tokenizer of a file."""
        read = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        if self.splitting in OWN:
            read.backend_tokenizer.pre_tokenizer = self._tokenizer.backend_tokenizer.pre_tokenizer
        special = " ".join(token for token, kind in self._tokens() if kind == gguf.TokenType.CONTROL)
        for text in (*PROBES, special):
            before, after = (one(text, add_special_tokens=False).input_ids for one in (self._tokenizer, read))
            if before != after:
                raise _refused(f"the tokenizer cuts {text[:40]!r} into {before[:8]}, and the one read back {after[:8]}")
        for name in ("bos", "eos", "unk", "pad"):
            before, after = (getattr(one, f"{name}_token_id") for one in (self._tokenizer, read))
            if before != after:
                raise _refused(f"the tokenizer's {name} is token {before}, and is read back as {after}")

    def _tokens(self) -> list[tuple[str, int]]:
        """Every row's token and kind."""
        added = {token["id"]: token for token in self._parts["added_tokens"]}
        by_number = {number: token for token, number in self._tokenizer.get_vocab().items()}
        return [self._token(number, by_number.get(number), added.get(number)) for number in range(self._size)]

    def _token(self, number: int, token: str | None, added: dict[str, Any] | None) -> tuple[str, int]:
        if token is None:
            return f"[PAD{number}]", gguf.TokenType.UNUSED
        if number == self._tokenizer.unk_token_id and not self._by_letters:
            return token, gguf.TokenType.UNKNOWN
        if added is not None:
            return token, gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        if not self._by_letters and len(token) == 6 and token.startswith("<0x"):
            return token, gguf.TokenType.BYTE
        return token, gguf.TokenType.NORMAL

    def _merges(self) -> Iterator[tuple[str, str]]:
        for merge in self._model["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            yield first, second

    def _scores(self, tokens: list[str]) -> list[float]:
        """The sooner a token is merged, the higher: the negative place of the first of its merges."""
        places: dict[str, float] = {}
        for place, pair in enumerate(self._merges()):
            places.setdefault("".join(pair), -float(place))
        last = -float(len(places) + 1)
        return [places.get(token, last) for token in tokens]

    def _adds_space(self) -> bool:
        pieces = self._tokenizer.tokenize("a")
        return bool(pieces) and pieces[0].startswith("▁")

    def _split(self) -> str:
        """llama.cpp's name for how text is split before merging."""
        stages = self._parts["pre_tokenizer"] or {}
        stages = stages.get("pretokenizers", [stages])
        for name, own in OWN.items():
            if len(own) == len(stages) and all(map(_is, stages, own)):
                return name
        if len(stages) == 2 and stages[0].get("type") == "Split" and _is(stages[1], LETTERS_ALONE):
            pattern = stages[0]["pattern"].get("Regex")
            for name, split in _splits().items():
                if split == pattern:
                    return name
        raise _refused("llama.cpp has no name, that is known here, for how the tokenizer splits text before merging")


def _is(stage: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a stage of a tokenizer has all the settings of a known one."""
    return known.items() <= stage.items()


def _splits() -> dict[str, str]:
    """llama.cpp's name of each way of splitting that transformers knows -> its pattern."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # before transformers 5.24
        return {}
    return dict(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)


def _types(stage: dict[str, Any] | None) -> set[str]:
    """The kinds of a stage of a tokenizer, and of those in it."""
    inner = (stage or {}).get("decoders", [])
    return {(stage or {}).get("type", ""), *(kind for each in inner for kind in _types(each))}


def _refused(reason: str) -> PeftcError:
    return PeftcError(NotInGguf(reason=reason, instead=INSTEAD))
