"""What data files may hold, and what is said of those that hold something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftc.diagnostics.diagnostic import PeftcError
from peftc.training.columns import Data, gathered
from peftc.training.records import read
from peftc.training.tokens import numbered


def data(*files: Path, **columns: str) -> Data:
    return gathered([(str(file), read(str(file))) for file in files], columns)


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in records))
    return path


SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "shape", "task"),
    [
        ({"messages": TURNS, "id": 1}, "messages", "text-generation"),
        ({"conversations": SHARED}, "conversations", "text-generation"),
        ({"prompt": "a", "completion": "b"}, "prompt + completion", "text-generation"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction + output", "text-generation"),
        ({"text": "a"}, "text", "text-generation"),
        ({"text": "a", "label": "good"}, "text + label", "text-classification"),
        ({"tokens": ["a", "b"], "ner_tags": ["O", "PER"]}, "tokens + ner_tags", "token-classification"),
    ],
)  # fmt: skip
def test_columns_say_what_a_record_is(record: dict[str, Any], shape: str, task: str, tmp_path: Path) -> None:
    found = data(lines(tmp_path / "d.jsonl", record, record))
    assert (str(found.shape), found.shape.task, len(found.records)) == (shape, task, 2)


def test_a_file_of_each_kind_says_the_same(tmp_path: Path) -> None:
    records = [{"prompt": f'q, "{i}"', "completion": f"ä\n{i}"} for i in range(3)]
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "d.csv").write_text("prompt,completion\n" + "".join(f'"q, ""{i}""","ä\n{i}"\n' for i in range(3)))
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(records).to_parquet(tmp_path / "d.parquet")
    lines(tmp_path / "d.jsonl", *records)
    for ending in ("jsonl", "json", "csv", "parquet"):
        assert [one.fields for one in data(tmp_path / f"d.{ending}").records] == records


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"question": "a", "answer": "b", "id": 3}, "--columns prompt=question completion=answer, or of classes"),
        ({"the review": "a", "stars": 3}, "of classes: --columns 'text=the review' label=stars"),
        ({"review": "a"}, "--columns prompt=question completion=reply"),
    ],
)
def test_columns_that_say_nothing_are_answered_with_their_own_names(
    record: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(PeftcError) as raised:
        data(tmp_path / "data.jsonl")
    assert hint in raised.value.diagnostics[0].notes[-1]


@pytest.mark.parametrize(("named", "told"), [((), 1), ((0, 1, 2), 0), ((2,), 2), ((0,), 2)])
def test_a_column_that_no_record_has_is_one_mistake(named: tuple[int, ...], told: int, tmp_path: Path) -> None:
    """Where some have it, each other one is told."""
    file = tmp_path / "data.jsonl"
    records = [{"ask" if place in named else "asks": "a", "reply": "b"} for place in range(3)]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    if not told:
        assert len(data(file, prompt="ask", completion="reply").records) == 3
        return
    with pytest.raises(PeftcError) as raised:
        data(file, prompt="ask", completion="reply")
    assert str(raised.value).count("there is no column 'ask', which --columns names") == told


def test_columns_of_other_names_are_told(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", {"question": "a", "reply": "b"})
    with pytest.raises(PeftcError, match="--columns prompt=question"):
        data(file)
    (record,) = data(file, prompt="question", completion="reply").records
    assert record.fields == {"prompt": "a", "completion": "b"}


WRONG = [
    ('{"messages": [}', "3: .*this is no JSON: Expecting value", 15),
    ({"messages": []}, "'messages' is empty, and has to be a list of turns", 2),
    ({"messages": [{"role": "robot", "content": "a"}]}, "turn 1 has the role 'robot'", 24),
    ({"messages": [*TURNS, {"role": "user"}]}, "the content of turn 3 is not there", 2),
    ({"messages": TURNS[:1]}, "no turn is the assistant's", 2),
    ({"text": "a"}, "there is no 'messages', which the first record has", 1),
    ("[1, 2]", "a record is an object", 1),
]


def test_all_bad_records_are_said_at_once_each_with_its_place(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", {"messages": TURNS}, "", *(record for record, _, _ in WRONG))
    with pytest.raises(PeftcError) as caught:
        data(file)
    assert len(caught.value.diagnostics) == len(WRONG)
    for number, (problem, (_, said, column)) in enumerate(zip(caught.value.diagnostics, WRONG, strict=True), 3):
        assert problem.span is not None
        assert (problem.code, problem.span.line) == ("bad-data", number)
        assert problem.span.column == column, problem.title
        assert said.rpartition(": .*")[2] in problem.title


def test_of_a_long_line_a_part_is_shown(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", {"prompt": "a" * 9000, "completion": None})
    with pytest.raises(PeftcError, match="'completion' is not there") as caught:
        data(file)
    shown = str(caught.value)
    assert '"completion"' in shown
    assert len(shown) < 500


def test_labels_are_classes(tmp_path: Path) -> None:
    one = data(lines(tmp_path / "a.jsonl", {"text": "a", "label": "good"}, {"text": "b", "label": "bad"}))
    assert (one.classes, one.several) == (("bad", "good"), False)
    numbers = data(lines(tmp_path / "b.jsonl", {"text": "a", "label": 2}, {"text": "b", "label": 0}))
    assert (numbers.classes, numbers.several) == (("0", "1", "2"), False)
    many = data(
        lines(
            tmp_path / "c.jsonl",
            {"text": "a", "label": ["x", "y"]},
            {"text": "b", "label": []},
            {"text": "b", "label": "y"},
        )
    )
    assert (many.classes, many.several) == (("x", "y"), True)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([True, False], ("False", "True")),
        ([-1, 1], ("-1", "1")),
        (["01", "1"], ("01", "1")),
        ([10**9], ("1000000000",)),
    ],
)
def test_what_does_not_count_classes_is_a_name(labels: list[Any], classes: tuple[str, ...], tmp_path: Path) -> None:
    found = data(lines(tmp_path / "d.jsonl", *({"text": "a", "label": label} for label in labels)))
    assert found.classes == classes
    assert [numbered(found, record.fields["label"]) for record in found.records] == [
        classes.index(str(label)) for label in labels
    ]


REFUSED = [
    ({"text": "a", "label": [0, 1, 0]}, "has a class twice"),
    ({"text": "a", "label": []}, "no record has a label"),
    ({"tokens": [], "tags": []}, "no record has a tag"),
    ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, r"turn 1 has the role \['user'\]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "parts that are no text"),
    ({"messages": TURNS, "tools": "[3]"}, "'tools' has to be a list of objects"),
    ({"prompt": TURNS[:1], "completion": TURNS[:1]}, "no turn is the assistant's"),
    ('{"text": "a\\ud83d"}', "ud83d stands without its other half"),
    ('{"text": ' + "[" * 100_000, "this is no JSON"),
]


@pytest.mark.parametrize(("record", "said"), REFUSED)
def test_a_record_that_cannot_be_learnt_is_refused(record: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=said):
        data(lines(tmp_path / "d.jsonl", record))


@pytest.mark.parametrize("text", ["5", "null", '"abc"'])
def test_json_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(PeftcError, match="a record is an object"):
        data(tmp_path / "d.json")


def test_csv_as_pandas_writes_it_and_long_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.CSV").write_text(",text\n0," + "a" * 200_000 + "\n")
    (record,) = data(tmp_path / "d.CSV").records
    assert len(record.fields["text"]) == 200_000
    (tmp_path / "e.csv").write_text("text,label\na\n")
    with pytest.raises(PeftcError, match=r"e.csv:2: this row has fewer values"):
        data(tmp_path / "e.csv")


def test_a_column_that_is_not_there_is_said(tmp_path: Path) -> None:
    """And is not that of the usual name."""
    file = lines(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b", "reply": "c"})
    with pytest.raises(PeftcError, match="there is no column 'rply'"):
        data(file, completion="rply")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="there is no such file"):
        data(tmp_path / "none.jsonl")
    (tmp_path / "d.doc").write_text("a")
    with pytest.raises(PeftcError, match="known are"):
        data(tmp_path / "d.doc")
    with pytest.raises(PeftcError, match="there is no record in it"):
        data(lines(tmp_path / "empty.jsonl"))


CARD = """\
---
configs:
- config_name: main
  data_files: [{split: train, path: main.jsonl}, {split: test, path: test.jsonl}]
- config_name: socratic
  data_files: [{split: train, path: socratic.jsonl}]
---
"""


def test_a_data_set_of_several_configurations_is_told_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And by its split; nothing of the library's own is told on the way."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gsm"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name in ("main", "test", "socratic"):
        lines(folder / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(3)))

    def texts(after: str) -> list[str]:
        return [record.fields["text"] for record in data(Path(f"{folder}{after}")).records]

    assert texts(":main") == ["main0", "main1", "main2"]
    assert texts(":socratic") == ["socratic0", "socratic1", "socratic2"]
    assert texts(":main:test[1:]") == ["test1", "test2"]
    with pytest.raises(PeftcError, match=f"it has main, socratic; name one, such as {folder}:main$"):
        texts("")
    with pytest.raises(PeftcError, match=f"such as {folder}:main:test$"):
        texts(":test")
    with pytest.raises(PeftcError, match="BuilderConfig 'other' not found"):
        texts(":other:train")
    assert capfd.readouterr().err == ""
    (folder / "README.md").write_text(CARD.replace("name: main\n", "name: main\n  default: true\n"))
    assert texts(":test") == ["test0", "test1", "test2"]


def test_a_task_says_whether_labels_are_learnt(tmp_path: Path) -> None:
    file = str(lines(tmp_path / "d.jsonl", {"text": "a", "label": "good"}))
    assert gathered([(file, read(file))], {}, "text-generation").shape.fields == ("text",)
    assert gathered([(file, read(file))], {}, "").shape.fields == ("text", "label")
