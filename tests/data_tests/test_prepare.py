"""A whole data set: files in, one Arrow file and its numbers out, or an error that names the rows."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from job.data import TokenizedData, choose_max_length, load_tokenizer, select_rows, split_rows, tokenize_files
from job.data import prepare as prepare_module
from job.data.shapes import LossOn
from job.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def write_rows(path: Path, rows: list[Any]) -> tuple[Path, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, path.name


def prepare(
    files: list[tuple[Path, str]], tokenizer: Any, folder: Path, *, loss_on: LossOn = "auto", reports: Any = None
) -> TokenizedData:
    report = (lambda rows: None) if reports is None else reports.append
    return tokenize_files(files, tokenizer, loss_on=loss_on, target=folder / "out" / "rows.arrow", report=report)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {number}", "completion": "word " * (number % 7 + 1)} for number in range(count)]


def test_files_of_different_shapes_become_one_arrow_file(tmp_path: Path, tokenizer: Any) -> None:
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    files = [
        write_rows(tmp_path / "a.jsonl", pairs(2_500)),
        write_rows(tmp_path / "b.jsonl", []),
        write_rows(tmp_path / "c.jsonl", [{"messages": conversation}, {"messages": conversation * 3}]),
        write_rows(tmp_path / "d.jsonl", [{"text": "plain"}]),
    ]
    reports: list[int] = []
    data = prepare(files, tokenizer, tmp_path, reports=reports)
    assert data.names == ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    assert data.rows_per_file == (2_500, 0, 2, 1)
    assert data.shapes == ("prompt/completion", None, "messages", "text")
    assert reports == sorted(reports)
    assert reports[-1] == 2_503
    assert len(reports) > 2
    assert sorted(path.name for path in data.path.parent.iterdir()) == ["rows.arrow"]

    with pa.memory_map(str(data.path)) as source:
        table = pa.ipc.open_file(source).read_all()
        assert pa.total_allocated_bytes() < 100_000  # mapped, not read
        rows = table.to_pylist()
    assert table.schema.types == [pa.list_(pa.int32()), pa.list_(pa.int32()), pa.int32(), pa.int64()]
    assert len(rows) == 2_503
    assert [(row["file"], row["line"]) for row in rows[-4:]] == [(0, 2_500), (2, 1), (2, 2), (3, 1)]
    for index, row in enumerate(rows):
        positions = [place for place, label in enumerate(row["labels"]) if label != -100 and place > 0]
        assert len(row["input_ids"]) == len(row["labels"]) == data.lengths_tokens[index]
        assert len(positions) == data.supervised_tokens[index]
        assert positions[0] == data.first_supervised[index]
        assert tokenizer.eos_token_id in row["labels"]
    assert data.eos_supervised_rows == 2_503
    assert data.end_token_rows == {tokenizer.eos_token_id: 2_503}
    answer = [label for label in rows[8]["labels"] if label != -100]
    assert tokenizer.decode(answer) == "word word <|im_end|>"


def test_where_eos_is_not_what_ends_a_turn_it_is_not_counted(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    data = prepare([write_rows(tmp_path / "a.jsonl", pairs(3))], tokenizer, tmp_path)
    assert data.eos_supervised_rows == 0
    assert data.end_token_rows == {tokenizer.convert_tokens_to_ids("<|im_end|>"): 3}


def test_compressed_csv_and_json_lines_give_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(20)
    csv = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv.encode()))
    files = [(tmp_path / "a.csv.gz", "a.csv.gz"), write_rows(tmp_path / "b.jsonl", rows)]
    data = prepare(files, tokenizer, tmp_path)
    with pa.memory_map(str(data.path)) as source:
        tokens = pa.ipc.open_file(source).read_all().to_pydict()
    assert tokens["input_ids"][:20] == tokens["input_ids"][20:]
    assert tokens["labels"][:20] == tokens["labels"][20:]
    assert tokens["line"] == [*range(2, 22), *range(1, 21)]


def test_batches_do_not_change_the_result(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_rows(tmp_path / "a.jsonl", pairs(150))]
    whole = prepare(files, tokenizer, tmp_path)
    with pa.memory_map(str(whole.path)) as source:
        expected = pa.ipc.open_file(source).read_all().to_pydict()
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 100)
    small = prepare(files, tokenizer, tmp_path)
    with pa.memory_map(str(small.path)) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches > 20
        assert reader.read_all().to_pydict() == expected
    assert np.array_equal(whole.first_supervised, small.first_supervised)


def test_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = pairs(100)
    for line in range(40, 70):
        rows[line - 1] = {"prompt": "only a question"}
    rows[4] = 7
    files = [write_rows(tmp_path / "good.jsonl", pairs(3)), write_rows(tmp_path / "bad.jsonl", rows)]
    with pytest.raises(DataError) as caught:
        prepare(files, tokenizer, tmp_path)
    lines = caught.value.message.split("\n")
    assert lines[0] == "31 of 103 rows can't be trained on:"
    assert lines[1] == "  bad.jsonl:5: a JSON number, not an object"
    assert lines[2] == "  bad.jsonl:40: column `completion` is missing"
    assert lines[20] == "  bad.jsonl:58: column `completion` is missing"
    assert lines[21:] == ["  and 11 more"]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_first_row_need_not_be_a_good_one(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"1 of 3 rows can't be trained on:\n  a\.jsonl:1: column `completion` is missing$"
    ):
        prepare([write_rows(tmp_path / "a.jsonl", [{"prompt": "q"}, *pairs(2)])], tokenizer, tmp_path)


def test_rows_that_cannot_be_tokenised_are_bad_rows(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0]['content'] == 'q' %}{{ raise_exception('no q') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [*pairs(2), {"prompt": "q", "completion": "a"}]
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses it: no q"):
        prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path)


def test_a_row_without_a_supervised_token_is_a_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    # The text is the end-of-sequence token alone: it stands at position 0, which is never predicted.
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n  a\.jsonl:2: no token is left to learn from"):
        prepare([write_rows(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": "<|im_end|>"}])], tokenizer, tmp_path)


def test_many_bad_rows_cost_no_memory(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"[%60d]\n" % 1 * 200_000)
    prepare([write_rows(tmp_path / "a.jsonl", pairs(3))], tokenizer, tmp_path)  # imports are not what is measured
    tracemalloc.start()
    with pytest.raises(DataError, match="200,000 of 200,000 rows"):
        prepare([(path, "bad.jsonl")], tokenizer, tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Their reasons alone would be 20 MB.
    assert peak_bytes < 6_000_000


def test_no_rows_at_all_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no rows in a\.jsonl"):
        prepare([write_rows(tmp_path / "a.jsonl", [])], tokenizer, tmp_path)
    with pytest.raises(DataError, match="no rows in no files"):
        prepare([], tokenizer, tmp_path)


def test_a_template_that_rewrites_earlier_turns_names_the_row(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if message['role'] != 'assistant' or loop.last %}{{ message['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    files = [write_rows(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns * 2}])]
    with pytest.raises(DataError, match=r"^a\.jsonl:2: messages\[1\]: the chat template rewrites") as caught:
        prepare(files, tokenizer, tmp_path)
    assert "SFT_DATA__LOSS_ON=completion" in caught.value.hint
    assert prepare(files, tokenizer, tmp_path, loss_on="completion").rows_per_file == (2,)


def test_conversations_without_a_template_name_the_row(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    with pytest.raises(DataError, match=r"^a\.jsonl:1: .*no chat template"):
        prepare([write_rows(tmp_path / "a.jsonl", [{"messages": turns}])], tokenizer, tmp_path)
    assert prepare([write_rows(tmp_path / "a.jsonl", pairs(3))], tokenizer, tmp_path).rows_per_file == (3,)


def test_loss_on_answers_does_not_fit_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"SFT_DATA__LOSS_ON=assistant.*a\.jsonl"):
        prepare([write_rows(tmp_path / "a.jsonl", [{"text": "x y"}])], tokenizer, tmp_path, loss_on="assistant")


# -- which rows, and how long ---------------------------------------------------------------------------------------


def make_data(lengths: list[int], first: list[int]) -> TokenizedData:
    count = np.array(lengths, dtype=np.int64)
    return TokenizedData(Path("x"), ("x",), (len(lengths),), ("text",), count, count, np.array(first), 0, {})


@pytest.mark.parametrize(
    ("lengths", "context", "expected"),
    [
        ([484] * 199 + [2_000], 8_192, 512),
        ([484] * 197 + [2_000] * 3, 8_192, 2_048),
        ([64], 8_192, 64),
        ([65], 8_192, 128),
        ([1], 8_192, 64),
        ([5_000], 2_048, 2_048),
        ([100], 100, 100),
    ],
)
def test_choose_max_length(lengths: list[int], context: int, expected: int) -> None:
    assert choose_max_length(np.array(lengths), context) == expected


def test_select_rows() -> None:
    data = make_data([10, 20, 21, 50, 60], [1, 19, 19, 20, 5])
    dropped = select_rows(data, max_length=20, truncation="drop")
    assert (dropped.indices.tolist(), *dropped[1:]) == ([0, 1], 3, 0, 0)
    kept = select_rows(data, max_length=20, truncation="keep_start")
    assert (kept.indices.tolist(), *kept[1:]) == ([0, 1, 2, 4], 0, 2, 1)


@pytest.mark.parametrize(
    ("count", "fraction", "eval_rows"),
    [
        (49, None, 0),
        (50, None, 5),
        (78, None, 7),
        (100_000, None, 500),
        (100, 0.0, 0),
        (100, 0.25, 25),
        (3, 0.01, 1),
        (1, 0.5, 0),
        (2, 0.99, 1),
        (0, None, 0),
    ],
)
def test_split_rows(count: int, fraction: float | None, eval_rows: int) -> None:
    indices = np.arange(count) * 3
    train, evaluation = split_rows(indices, fraction=fraction, seed=1)
    assert len(evaluation) == eval_rows
    assert sorted([*train, *evaluation]) == indices.tolist()
    assert train.tolist() == sorted(train)
    assert evaluation.tolist() == sorted(evaluation)


def test_split_rows_follows_the_seed() -> None:
    indices = np.arange(1_000)
    first = split_rows(indices, fraction=0.1, seed=1)[1].tolist()
    assert first == split_rows(indices, fraction=0.1, seed=1)[1].tolist()
    assert first != split_rows(indices, fraction=0.1, seed=2)[1].tolist()
    assert first != list(range(100))
