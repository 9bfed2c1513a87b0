"""Of a conversation the answers are learnt, and nothing else; whatever the chat template."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import models, pre_tokenizers, processors

from bytewise import PLAIN, tokenizer
from peftc.diagnostics.diagnostic import PeftcError
from peftc.training.columns import SHAPES, Data
from peftc.training.records import Record
from peftc.training.tokens import IGNORED, Encoder

# As of models that think: only the last answer's thought is written, and asking opens one.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
OPENING = PLAIN.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")


def learnt(reads: Any, example: dict[str, Any]) -> str:
    return str(reads.decode([label for label in example["labels"] if label != IGNORED]))


def data(shape: str, *fields: dict[str, Any]) -> Data:
    (kind,) = (one for one in SHAPES if str(one) == shape)
    return Data("d", kind, tuple(Record("d", i, each) for i, each in enumerate(fields, 1)))


TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "wie geht's?"},
    {"role": "assistant", "content": "güt"},
    {"role": "user", "content": "und?"},
    {"role": "assistant", "content": "so"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, ["güt</s>so</s>"]),
        (THINKING, ["<think></think>güt</s>", "<think></think>so</s>"]),
        (OPENING, ["[assistant]güt</s>[assistant]so</s>"]),
    ],
    ids=["plain", "thinking", "opening"],
)  # fmt: skip
def test_answers_alone_are_learnt(template: str, expected: list[str]) -> None:
    reads = tokenizer(template)
    made = Encoder(reads, 1000).encode(data("messages", {"messages": TURNS}))
    assert [learnt(reads, one) for one in made] == expected
    assert all(
        one["input_ids"][place] == label
        for one in made
        for place, label in enumerate(one["labels"])
        if label != IGNORED
    )


def test_a_completion_is_learnt_with_its_end() -> None:
    reads = tokenizer()
    (made,) = Encoder(reads, 1000).encode(data("prompt + completion", {"prompt": "ab ", "completion": "cd"}))
    assert (reads.decode(made["input_ids"]), learnt(reads, made)) == ("ab cd</s>", "cd</s>")
    (asked,) = Encoder(reads, 1000).encode(
        data("instruction + output", {"instruction": "add", "input": "1 2", "output": "3"})
    )
    assert learnt(reads, asked) == "3</s>"
    assert "add\n\n### Input:\n1 2" in reads.decode(asked["input_ids"])


def test_of_prompts_that_are_turns_the_completion_is_learnt() -> None:
    reads = tokenizer(PLAIN)
    (made,) = Encoder(reads, 1000).encode(
        data("prompt + completion", {"prompt": TURNS[:4], "completion": [{"role": "assistant", "content": "ja"}]})
    )
    assert learnt(reads, made) == "ja</s>"


def test_a_text_is_learnt_whole_in_pieces() -> None:
    reads = tokenizer()
    made = Encoder(reads, 4).encode(data("text", {"text": "abcdefghi"}))
    assert [reads.decode(one["labels"]) for one in made] == ["abcd", "efgh", "i</s>"]
    assert all(one["labels"] == one["input_ids"] for one in made)


def test_what_is_cut_is_counted_and_what_teaches_nothing_dropped() -> None:
    reads = tokenizer()
    encoder = Encoder(reads, 6)
    made = encoder.encode(
        data("prompt + completion", {"prompt": "a", "completion": "bcdefgh"}, {"prompt": "abcdefgh", "completion": "i"})
    )
    assert ([learnt(reads, one) for one in made], encoder.cut, encoder.dropped) == (["bcdef"], 2, 1)
    with pytest.raises(PeftcError, match="nothing to learn from"):
        Encoder(reads, 6).encode(data("prompt + completion", {"prompt": "abcdefgh", "completion": "i"}))


def test_an_answer_whose_first_token_begins_in_the_prompt_is_learnt() -> None:
    """As with tokenizers that give a word the space before it."""
    reads = tokenizer()
    fast = reads.backend_tokenizer
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    fast.model = models.WordLevel({"<pad>": 0, "</s>": 1, "▁4": 2, "2": 3}, unk_token="2")
    (made,) = Encoder(reads, 10).encode(data("prompt + completion", {"prompt": "2 ", "completion": "4"}))
    assert (made["input_ids"], made["labels"]) == ([3, 2, 1], [IGNORED, 2, 1])


def test_what_no_token_comes_before_teaches_nothing() -> None:
    """A batch of such examples alone would have a loss of no tokens, which is no number."""
    encoder = Encoder(tokenizer(), 4)
    made = encoder.encode(data("text", {"text": ""}, {"text": "abcd"}))
    assert (len(made), encoder.dropped) == (1, 2)


def test_of_a_long_text_the_special_tokens_stay() -> None:
    reads = tokenizer()
    reads.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    encoder = Encoder(reads, 3)
    (made,) = encoder.encode(
        Data("d", data("text + label").shape, (Record("d", 1, {"text": "abcd", "label": 0}),), ("0",))
    )
    assert (reads.decode(made["input_ids"]), encoder.cut) == ("ab</s>", 1)


def test_tools_are_told() -> None:
    reads = tokenizer("{{ tools[0].name }}" + PLAIN)
    (made,) = Encoder(reads, 100).encode(data("messages", {"messages": TURNS, "tools": '[{"name": "add"}]'}))
    assert reads.decode(made["input_ids"]).startswith("add[system]")


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(PeftcError, match="no chat template"):
        Encoder(tokenizer(), 100).encode(data("messages", {"messages": TURNS}))
    with pytest.raises(PeftcError, match=r"d:1.*no system"):
        Encoder(tokenizer("{{ raise_exception('no system') }}"), 100).encode(data("messages", {"messages": TURNS}))


def test_the_tag_of_a_word_is_its_first_tokens() -> None:
    reads = tokenizer()
    given = Data(
        "d", data("tokens + tags").shape, (Record("d", 1, {"tokens": ["ab", "c"], "tags": ["O", "PER"]}),), ("O", "PER")
    )
    (made,) = Encoder(reads, 100).encode(given)
    assert made["labels"] == [0, IGNORED, 1]


def test_a_column_of_its_own_says_what_comes_first() -> None:
    reads = tokenizer(PLAIN)
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]
    (made,) = Encoder(reads, 1000).encode(data("conversations", {"conversations": turns, "system": "be kind"}))
    assert reads.decode(made["input_ids"]) == "[system]be kind</s>[user]a</s>[assistant]f()</s>"
    assert learnt(reads, made) == "f()</s>"
