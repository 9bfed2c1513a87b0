"""Records as a model reads them: token ids and labels, where -100 marks what is not learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peftc.diagnostics.diagnostic import PeftcError
from peftc.training.columns import SYSTEM, Data, messages, tools
from peftc.training.errors import BadTemplate, NoTemplate, NothingToLearn
from peftc.training.records import Record

IGNORED = -100  # of no label, by the convention of torch's cross entropy
Encoded = dict[str, Any]


@dataclass
class Encoder:
    """Makes examples of records.

    Args:
        tokenizer: transformers', a fast one, as the places of answers are told by characters.
        longest: tokens of an example; a longer text is several, a longer answer is cut.
        template: a chat template in place of the tokenizer's.
        pairs: the model has an encoder, which reads the prompt, and a decoder, which learns the answer.
    """

    tokenizer: Any
    longest: int
    template: str | None = None
    pairs: bool = False
    cut: int = 0
    dropped: int = field(default=0)

    def encode(self, data: Data) -> list[Encoded]:
        """All examples of a data set.

        Raises:
            PeftcError: `no-chat-template`, `bad-chat-template`, `nothing-to-learn`.
        """
        kinds: dict[str, Callable[[Data, Record], Iterator[Encoded]]] = {
            "text": self._text, "answers": self._answers, "labels": self._labels, "tags": self._tags,
        }  # fmt: skip
        made = [example for record in data.records for example in kinds[data.shape.learns](data, record)]
        # A causal model foretells a token from those before it, so nothing comes of the first label.
        first = int(data.shape.learns in ("text", "answers") and not self.pairs)
        kept = [one for one in made if data.shape.learns == "labels" or {*one["labels"][first:]} - {IGNORED}]
        self.dropped += len(made) - len(kept)
        if not kept:
            reason = f"in the first {self.longest} tokens no example of {data.source} has anything that is learnt"
            raise PeftcError(NothingToLearn(reason=reason))
        return kept

    def _text(self, data: Data, record: Record) -> Iterator[Encoded]:
        """A text and its end, in pieces."""
        ids = self.tokenizer(record.fields["text"], verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        ids += [end] if end is not None and ids[-1:] != [end] else []
        for start in range(0, len(ids), self.longest):
            piece = ids[start : start + self.longest]
            yield {"input_ids": piece, "labels": [*piece]}

    def _answers(self, data: Data, record: Record) -> Iterator[Encoded]:
        name = data.shape.fields[0]
        if name in ("messages", "conversations"):
            turns = messages(record.fields[name])
            if (told := record.fields.get(SYSTEM)) and turns[0]["role"] != SYSTEM:
                turns = [{"role": SYSTEM, "content": told}, *turns]
            yield from self._conversation(record, turns)
        elif name == "instruction" and self._has_template:
            question = "\n\n".join(filter(None, (record.fields["instruction"], record.fields.get("input"))))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record.fields["output"]}]
            yield from self._conversation(record, turns)
        elif name == "instruction":
            given = record.fields.get("input")
            parts = ("### Instruction:\n" + record.fields["instruction"], "### Input:\n" + given if given else "")
            yield self._completed("\n\n".join((*filter(None, parts), "### Response:\n")), record.fields["output"])
        elif isinstance(record.fields["prompt"], list):
            asked = messages(record.fields["prompt"])
            yield from self._conversation(record, asked + messages(record.fields["completion"]), first=len(asked))
        else:
            yield self._completed(record.fields["prompt"], record.fields["completion"])

    def _completed(self, prompt: str, answer: str) -> Encoded:
        end = self.tokenizer.eos_token or ""
        if self.pairs:
            asked = self._ended(prompt)["input_ids"]
            return {"input_ids": asked, "labels": self._short(self.tokenizer(text_target=answer)["input_ids"])}
        return self._marked(prompt + answer + end, [(len(prompt), len(prompt + answer + end))], special=True)

    @property
    def _has_template(self) -> bool:
        return bool(self.template or self.tokenizer.chat_template) and not self.pairs

    def _conversation(self, record: Record, turns: list[dict[str, Any]], first: int = 0) -> Iterator[Encoded]:
        """One example of all answers from turn `first` on; one for each, where a template rewrites earlier ones."""
        if not self._has_template:
            raise PeftcError(NoTemplate(source=str(self.tokenizer.name_or_path)))
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and place >= first]
        whole = self._written(record, turns)
        spans = [self._answer(record, turns[: place + 1]) for place in answers]
        if all(whole.startswith(text) for text, _ in spans):
            yield self._marked(whole, [span for _, span in spans], special=False)
        else:
            for text, span in spans:
                yield self._marked(text, [span], special=False)

    def _answer(self, record: Record, turns: list[dict[str, Any]]) -> tuple[str, tuple[int, int]]:
        """The text up to the end of an answer, and where in it the answer stands."""
        text, before = self._written(record, turns), self._written(record, turns[:-1], asking=True)
        if not text.startswith(before):  # templates that open a thought, which an answer without one has not
            before = self._written(record, turns[:-1])
        if not text.startswith(before):
            reason = f"with turn {len(turns)} what stands before it is written otherwise"
            raise PeftcError(BadTemplate(where=record.where, reason=reason))
        return text, (len(before), len(text))

    def _written(self, record: Record, turns: list[dict[str, Any]], *, asking: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tools(record.fields), tokenize=False, chat_template=self.template, add_generation_prompt=asking
            )
        except Exception as error:  # templates raise what they like
            raise PeftcError(BadTemplate(where=record.where, reason=f"{type(error).__name__}: {error}")) from error
        return str(text)

    def _marked(self, text: str, spans: list[tuple[int, int]], *, special: bool) -> Encoded:
        """The tokens of a text; those that have something of a span are learnt.

        A tokenizer may give an answer's first token the space that the prompt ends with.
        """
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
        labels = [
            token if any(at < end and until > start for start, end in spans) and until > at else IGNORED
            for token, (at, until) in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]
        self.cut += len(labels) > self.longest
        return {"input_ids": found["input_ids"][: self.longest], "labels": labels[: self.longest]}

    def _short(self, ids: list[int]) -> list[int]:
        self.cut += len(ids) > self.longest
        return ids[: self.longest]

    def _labels(self, data: Data, record: Record) -> Iterator[Encoded]:
        """A text, of a class (a number) or of several (a number of 0 or 1 for each)."""
        found = self._ended(record.fields["text"])
        yield {"input_ids": found["input_ids"], "labels": numbered(data, record.fields["label"])}

    def _ended(self, text: str | list[str], **how: Any) -> Any:
        """The tokens of a text; of a long one so many that its special ones at the end stay."""
        found = self.tokenizer(text, verbose=False, **how)
        if len(found["input_ids"]) <= self.longest:
            return found
        self.cut += 1
        return self.tokenizer(text, truncation=True, max_length=self.longest, **how)

    def _tags(self, data: Data, record: Record) -> Iterator[Encoded]:
        """The tag of a word is its first token's."""
        words, tags = (record.fields[name] for name in data.shape.fields)
        found = self._ended([*map(str, words)], is_split_into_words=True)
        labels, before = [], None
        for word in found.word_ids():
            labels.append(IGNORED if word is None or word == before else data.classes.index(str(tags[word])))
            before = word
        yield {"input_ids": found["input_ids"], "labels": labels}


def numbered(data: Data, label: Any) -> Any:
    """The number of a class; of several, 0.0 or 1.0 for each class that there is."""
    if not data.several:
        return data.classes.index(str(label))
    has = {*map(str, label if isinstance(label, list) else [label])}
    return [float(one in has) for one in data.classes]
