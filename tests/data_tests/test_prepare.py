"""A whole data set: files in, one Arrow file and its numbers out, or an error that names the rows."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data import Encoders, RowOptions, SourceFile, TokenizedData, load_tokenizer, tokenize_files
from job.data.encode_chunk import digest_ids
from job.data.shaping.shapes import LossOn, PlainExample
from job.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def write_rows(path: Path, rows: list[Any]) -> SourceFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceFile(path, path.name, path.name)


def prepare(
    files: list[SourceFile],
    tokenizer: Any,
    folder: Path,
    *,
    loss_on: LossOn = "auto",
    processes: int = 1,
    reports: list[tuple[int, int]] | None = None,
) -> TokenizedData:
    def report(rows: int, size_bytes: int) -> None:
        if reports is not None:
            reports.append((rows, size_bytes))

    with Encoders(processes) as encoders:
        return tokenize_files(
            files, tokenizer, RowOptions(loss_on), folder=folder / "out", encoders=encoders, report=report
        )


def read_table(data: TokenizedData) -> Any:
    with pa.memory_map(str(data.path)) as source:
        return pa.ipc.open_file(source).read_all()


def read_bad_rows(data: TokenizedData) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.bad_rows_path.read_text("utf-8").splitlines()]


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
    reports: list[tuple[int, int]] = []
    data = prepare(files, tokenizer, tmp_path, reports=reports)
    assert data.names == ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    assert data.rows_per_file == (2_500, 0, 2, 1)
    assert [found and found.shape for found in data.formats] == ["prompt/completion", None, "messages", "text"]
    assert reports == sorted(reports)
    assert reports[-1] == (2_503, sum(file.path.stat().st_size for file in files))
    assert (data.rows_read, data.bad_rows) == (2_503, 0)
    assert data.bad_rows_path.read_bytes() == b""

    rows = read_table(data).to_pylist()
    assert read_table(data).schema.types == [pa.list_(pa.int32()), pa.list_(pa.int32()), pa.int32(), pa.int64()]
    assert len(rows) == 2_503
    assert [(row["file"], row["line"]) for row in rows[-4:]] == [(0, 2_500), (2, 1), (2, 2), (3, 1)]
    for index, row in enumerate(rows):
        positions = [place for place, label in enumerate(row["labels"]) if label != -100 and place > 0]
        assert len(row["input_ids"]) == len(row["labels"]) == data.lengths_tokens[index]
        assert len(positions) == data.supervised_tokens[index]
        assert positions[0] == data.first_supervised[index]
        assert digest_ids(np.array(row["input_ids"], dtype=np.int32)) == data.digests[index]
        assert tokenizer.eos_token_id in row["labels"]
    assert data.eos_supervised_rows == 2_503
    assert data.end_token_rows == {tokenizer.eos_token_id: 2_503}
    answer = [label for label in rows[8]["labels"] if label != -100]
    assert tokenizer.decode(answer) == "word word <|im_end|>"


def test_tokens_are_mapped_and_not_read(tmp_path: Path, tokenizer: Any) -> None:
    data = prepare([write_rows(tmp_path / "a.jsonl", pairs(2_500))], tokenizer, tmp_path)
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(data.path)) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table.num_rows == 2_500
        assert pa.total_allocated_bytes() < before + 100_000


def test_digests_tell_rows_of_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a b"}, {"text": "a  b"}, {"text": "a b", "source": "elsewhere"}]
    digests = prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path).digests
    assert digests.dtype == np.uint64
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]


def test_where_eos_is_not_what_ends_a_turn_it_is_not_counted(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    data = prepare([write_rows(tmp_path / "a.jsonl", pairs(3))], tokenizer, tmp_path)
    assert data.eos_supervised_rows == 0
    assert data.end_token_rows == {tokenizer.convert_tokens_to_ids("<|im_end|>"): 3}


def test_formats_give_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(20)
    csv = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_rows(tmp_path / "b.jsonl", rows)
    names = ("a.csv.gz", "b.jsonl", "c.json", "d.parquet")
    files = [SourceFile(tmp_path / name, name, name) for name in names]
    for processes in (1, 2):
        table = read_table(prepare(files, tokenizer, tmp_path, processes=processes)).to_pydict()
        for column in ("input_ids", "labels"):
            assert all(table[column][start : start + 20] == table[column][:20] for start in (20, 40, 60))
        assert table["line"] == [*range(2, 22), *range(1, 21), *range(1, 21), *range(1, 21)]


# -- rows that can't be used ------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_shown_and_written_down(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = pairs(100)
    for line in range(40, 70):
        rows[line - 1] = {"prompt": f"only question {line}", "tags": ["é", None]}
    rows[4] = 7
    files = [write_rows(tmp_path / "good.jsonl", pairs(3)), write_rows(tmp_path / "bad.jsonl", rows)]
    with files[1].path.open("ab") as file:
        file.write(b'{"prompt": "caf\xe9", "completion": "x"}\n{"prompt": "cut')
    data = prepare(files, tokenizer, tmp_path)
    assert (data.rows_read, data.bad_rows, data.rows_per_file) == (105, 33, (3, 69))
    assert data.shown_bad_rows[:2] == (
        "bad.jsonl:5: a JSON number, not an object",
        "bad.jsonl:40: column `completion` is missing",
    )
    assert len(data.shown_bad_rows) == 20
    assert data.bad_reasons == {
        "a JSON number, not an object": 1,
        "column `completion` is missing": 30,
        "not valid UTF-N: invalid continuation byte at byte N of the line": 1,
        "not valid JSON: Unterminated string starting at, column N": 1,
    }
    bad = read_bad_rows(data)
    assert [row["line"] for row in bad] == [5, *range(40, 70), 101, 102]
    assert {row["file"] for row in bad} == {"bad.jsonl"}
    assert bad[0] == {"file": "bad.jsonl", "line": 5, "reason": "a JSON number, not an object", "row": 7}
    assert bad[1]["row"] == {"prompt": "only question 40", "tags": ["é", None]}
    assert bad[-2]["row"] == '{"prompt": "caf\\xe9", "completion": "x"}'
    assert bad[-1]["row"] == '{"prompt": "cut'


def test_bad_rows_of_every_format_are_written_down(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\ngood,1\n"a"b,1\nthree,fields,here\n\xff,2\n,3\n')
    (tmp_path / "b.json").write_text('[{"text": "good"}, [3], {"text": " ", "n": 1}]')
    strings = pa.array([b"good", b"\xff\xfe", b""]).view(pa.string())
    pq.write_table(pa.table({"text": strings, "n": [1.0, 2.0, float("nan")]}), tmp_path / "c.parquet")
    data = prepare(
        [SourceFile(tmp_path / name, name, "") for name in ("a.csv", "b.json", "c.parquet")], tokenizer, tmp_path
    )
    bad = read_bad_rows(data)
    assert [(row["file"], row["line"], row["row"]) for row in bad] == [
        ("a.csv", 3, '"a"b,1'),
        ("a.csv", 4, "three,fields,here"),
        ("a.csv", 5, "\\xff,2"),
        ("a.csv", 6, {"text": "", "n": "3"}),
        ("b.json", 2, [3]),
        ("b.json", 3, {"text": " ", "n": 1}),
        ("c.parquet", 2, "\\xff\\xfe"),
        ("c.parquet", 3, "{'text': '', 'n': nan}"),
    ]
    assert data.rows_per_file == (1, 1, 1)


def test_half_a_surrogate_pair_is_written_down(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "good"}, {"text": "\ud83d"}]
    data = prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path)
    assert [row["row"] for row in read_bad_rows(data)] == [{"text": "\ud83d"}]


def test_reasons_beyond_the_fiftieth_are_counted_together(tmp_path: Path, tokenizer: Any) -> None:
    roles = ["x" + "y" * number for number in range(35)] + ["z" + "y" * number for number in range(35)]
    turns = [[{"role": role, "content": "a"}] for role in roles]
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages} for messages in (good, *turns)]
    data = prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path)
    assert data.bad_rows == 70
    assert len(data.bad_reasons) == 50
    assert data.bad_reasons["other reasons"] == 21


def test_the_first_row_need_not_be_a_good_one(tmp_path: Path, tokenizer: Any) -> None:
    data = prepare([write_rows(tmp_path / "a.jsonl", [{"prompt": "q"}, *pairs(2)])], tokenizer, tmp_path)
    assert data.shown_bad_rows == ("a.jsonl:1: column `completion` is missing",)


def test_a_file_may_begin_with_many_unreadable_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[%1000d]\n" % 1 * 10_000 + b'{"text": "good"}\n')
    data = prepare([SourceFile(path, "a.jsonl", "")], tokenizer, tmp_path)
    assert (data.rows_read, data.bad_rows, data.rows_per_file) == (10_001, 10_000, (1,))
    assert data.formats[0] is not None


def test_rows_that_cannot_be_tokenised_are_bad_rows(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0]['content'] == 'q' %}{{ raise_exception('no q') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [*pairs(2), {"prompt": "q", "completion": "a"}]
    data = prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path)
    assert data.shown_bad_rows == ("a.jsonl:3: the chat template refuses it: no q",)


def test_a_row_without_a_supervised_token_is_a_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    # The text is the end-of-sequence token alone: it stands at position 0, which is never predicted.
    data = prepare([write_rows(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": "<|im_end|>"}])], tokenizer, tmp_path)
    assert data.shown_bad_rows == ("a.jsonl:2: no token is left to learn from",)


def test_many_bad_rows_cost_no_memory(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"[%60d]\n" % 1 * 100_000)
    files = [write_rows(tmp_path / "a.jsonl", pairs(3)), SourceFile(path, "bad.jsonl", "")]
    prepare(files[:1], tokenizer, tmp_path)  # imports are not what is measured
    tracemalloc.start()
    data = prepare(files, tokenizer, tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.bad_rows == 100_000
    # All of their reasons and contents would be some 30 MB; a chunk and what is made of it stay, whatever their number.
    assert peak_bytes < 20_000_000


def test_when_all_rows_are_bad_all_of_them_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    files = [write_rows(tmp_path / "a.jsonl", [{"text": ""}] * 25)]
    for _ in ("tokenised", "kept"):
        data = prepare(files, tokenizer, tmp_path)
        assert (data.rows_read, data.bad_rows, len(data.lengths_tokens)) == (25, 25, 0)
        assert data.shown_bad_rows[0] == "a.jsonl:1: text is empty"
        assert len(data.shown_bad_rows) == 20
        assert len(data.bad_rows_path.read_text().splitlines()) == 25


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


def test_what_is_odd_in_rows_is_counted(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "job.data.encode_chunk.find_oddities", lambda example, _: ("odd",) if "odd" in example.text else ()
    )
    monkeypatch.setattr(
        "job.data.encode_chunk.to_example",
        lambda values, *_, **__: PlainExample(values["text"], ((0, len(values["text"])),), ("noted",)),
    )
    rows = [{"text": "odd"}, {"text": "even"}, {"text": "odd too"}, {"text": ""}]
    data = prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path)
    assert data.bad_rows == 1
    assert data.rows_with == {"noted": 3, "odd": 2}
