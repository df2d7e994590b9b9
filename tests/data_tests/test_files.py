"""Every format, plain and compressed, and every way in which a file or a row can be wrong."""

# ruff: noqa: RUF001 (Chinese text has Chinese punctuation)

import gzip
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.reading import lines as lines_module
from job.data.reading.files import BadRow, Row, is_readable, read_rows
from job.errors import DataError

ROWS = [
    {"prompt": "How late are you open?", "completion": "Until nine."},
    {"prompt": "你們幾點關門？", "completion": '九點 🙂, "sharp"\nreally'},
    {"prompt": "", "completion": "x\ty"},
]


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def read(folder: Path, name: str, data: bytes) -> list[Row | BadRow]:
    return list(read_rows(write(folder, "file", data), name))


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if ending == ".zst" else data


def to_csv(delimiter: str) -> bytes:
    def quote(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(("prompt", "completion"))]
    lines += [delimiter.join(quote(value) for value in row.values()) for row in ROWS]
    return "\r\n".join(lines).encode()


TEXT_FORMATS = {
    ".jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    ".ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\r\n",
    ".json": json.dumps(ROWS, indent=2).encode(),
    ".csv": to_csv(","),
    ".tsv": to_csv("\t"),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", TEXT_FORMATS)
def test_text_formats_give_the_same_rows(tmp_path: Path, ending: str, bom: bytes, compression: str) -> None:
    rows = read(tmp_path, f"rows{ending.upper()}{compression}", compress(bom + TEXT_FORMATS[ending], compression))
    assert [row.values for row in rows] == ROWS  # type: ignore[union-attr]


def test_parquet_and_arrow_give_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS * 1_500)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_000)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(
        str(tmp_path / "d.feather"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow", "d.feather"):
        rows = list(read_rows(tmp_path / name, name))
        assert [row.values for row in rows] == ROWS * 1_500, name  # type: ignore[union-attr]
        assert [row.number for row in rows] == list(range(1, 4_501))


def test_parquet_messages_are_lists_of_dicts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "m.parquet")
    assert list(read_rows(tmp_path / "m.parquet", "m.parquet")) == [Row("m.parquet", 1, {"messages": messages})]


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("a.jsonl", True),
        ("deep/er/A.JSONL.GZ", True),
        ("a.tsv.zst", True),
        ("a.parquet", True),
        ("a.feather", True),
        ("a.parquet.gz", False),
        ("a.txt", False),
        ("README", False),
        ("a.gz", False),
        ("jsonl", False),
        (".jsonl", False),
    ],
)
def test_is_readable(name: str, readable: bool) -> None:
    assert is_readable(name) is readable


def test_an_unknown_ending_lists_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "rows.xlsx", b"PK")
    assert "rows.xlsx" in caught.value.message
    assert ".jsonl" in caught.value.hint
    assert ".parquet" in caught.value.hint


# -- JSON lines --------------------------------------------------------------------------------------------------------


def test_a_bad_line_of_json_names_its_line_and_column(tmp_path: Path) -> None:
    lines = [b'{"text": "good"}'] * 20
    lines[16] = b'{"text": "no comma" "a": 1}'
    lines[3] = b""
    rows = read(tmp_path, "a.jsonl", b"\n".join(lines))
    assert [row for row in rows if isinstance(row, BadRow)] == [
        BadRow("a.jsonl", 17, "not valid JSON: Expecting ',' delimiter, column 21")
    ]
    assert [row.number for row in rows] == [1, 2, 3, *range(5, 21)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not valid UTF-8: invalid start byte at byte 11 of the line"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"null", "a JSON null, not an object"),
        (b'"text"', "a JSON string, not an object"),
        (b'{"text": NaN}', "not valid JSON: NaN is not valid JSON"),
        (b'{"text": "cut', "not valid JSON: Unterminated string starting at, column 10"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[" * 200_000, "not valid JSON: "),
        (b'{"a": ' * 200_000, "not valid JSON: "),
        (b'{"text": "a"}{"text": "b"}', "not valid JSON: Extra data, column 14"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is there twice in one object"),
        (b'{"messages": [{"role": "user", "role": "x"}]}', "the key 'role' is there twice in one object"),
        (b'{"text": "a\x00b"}', "not valid JSON: Invalid control character at, column 12"),
        (b"\x00\x00\x00", "not valid JSON: Expecting value, column 1"),
    ],
)
def test_a_bad_line_costs_one_row(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"text": "good"}\n'
    rows = read(tmp_path, "a.jsonl", good + line + b"\n" + good)
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert rows[1].number == 2
    assert rows[1].reason.startswith(reason)  # type: ignore[union-attr]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    rows = read(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    assert rows == [Row("a.jsonl", 1, {"text": text})]


def test_lines_longer_than_a_chunk_are_whole(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y", "z" * 1_048_576]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    assert [row.values["text"] for row in read(tmp_path, "a.jsonl", data)] == texts  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_utf16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path, name, '{"text": "x"}'.encode(encoding))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_that_is_too_long_costs_one_row_and_no_memory(tmp_path: Path, ending: str) -> None:
    good, long = b'{"text": "good"}\n', b'{"text": "%s"}' % (b"x" * (150 << 20))
    path = write(tmp_path, "big", compress(good + long + b"\n" + good * 2 + long, ending))
    del long
    tracemalloc.start()
    rows = list(read_rows(path, f"a.jsonl{ending}"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(type(row), row.number) for row in rows] == [(Row, 1), (BadRow, 2), (Row, 3), (Row, 4), (BadRow, 5)]
    assert rows[1].reason == "longer than 16 MiB, so it is not read"  # type: ignore[union-attr]
    assert json.loads(rows[1].content).startswith('{"text": "xxx')  # type: ignore[union-attr]
    assert peak_bytes < 80 << 20


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 10, 16, 17, 20])
def test_where_chunks_end_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(lines_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 20)
    fits, too_long = b'{"a": 123456789012}', b'{"a": 1234567890123}'  # with its line feed, 20 bytes and 21
    lines = [b'{"a": 1}', b"", fits, too_long, b'{"a": 2}\r', b"1" * 50, b"{}"]
    rows = read(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + b"\n".join(lines))
    expected = [(Row, 1), (Row, 3), (BadRow, 4), (Row, 5), (BadRow, 6), (Row, 7)]
    assert [(type(row), row.number) for row in rows] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("data", [b"", b"\n\r\n\n", b"\xef\xbb\xbf"])
def test_an_empty_text_file_has_no_rows(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(tmp_path, name, data) == []


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compression_names_the_file(tmp_path: Path, ending: str) -> None:
    whole = compress(b"".join(b'{"text": "%d"}\n' % number for number in range(200_000)), ending)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    for data in (whole[:-9], whole[:2_000], b"not compressed", bytes(damaged), b""):
        with pytest.raises(DataError, match=r"rows\.jsonl\."):
            read(tmp_path, f"rows.jsonl{ending}", data)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    data = gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n')
    assert [row.values for row in read(tmp_path, "a.jsonl.gz", data)] == [{"text": "a"}, {"text": "b"}]  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_large_file_is_streamed(tmp_path: Path, ending: str) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    size_bytes = 30_000_000
    path = write(tmp_path, "big", compress(line * (size_bytes // len(line)), ending))
    next(iter(read_rows(path, f"big.jsonl{ending}")))  # imports are not what is measured
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, f"big.jsonl{ending}"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size_bytes // len(line)
    assert peak_bytes < 6_000_000


# -- .json -------------------------------------------------------------------------------------------------------------

TWO = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("document", "numbers"),
    [
        (json.dumps(TWO), [1, 2]),
        (json.dumps({"version": "1", "tags": ["x"], "data": TWO}), [1, 2]),
        (json.dumps({"version": "1", "data": TWO}, indent=1), [1, 2]),
        ('\n{"text": "a"}\n\n{"text": "b"}\n', [2, 4]),
        ("\n [\n\n" + ",".join(json.dumps(row) for row in TWO) + "]\n ", [1, 2]),
    ],
)
def test_json_files_of_every_layout(tmp_path: Path, document: str, numbers: list[int]) -> None:
    rows = read(tmp_path, "a.json", document.encode())
    assert rows == [Row("a.json", number, values) for number, values in zip(numbers, TWO, strict=True)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_conversation_in_a_json_file_is_a_row(tmp_path: Path, indent: int | None) -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    assert read(tmp_path, "a.json", json.dumps(row, indent=indent).encode()) == [Row("a.json", 1, row)]


def test_an_empty_json_list_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path, "a.json", b" [ ] ") == []


def test_a_syntax_error_in_a_json_list_names_its_line(tmp_path: Path) -> None:
    lines = ["[", *(f'  {{"text": "{number}"}},' for number in range(2, 30)), '  {"text": "last"}', "]"]
    lines[16] = '  {"text": "no comma" "a": 1},'
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.json", "\n".join(lines).encode())
    assert caught.value.message == "a.json:17: not valid JSON: Expecting ',' delimiter, column 23"


@pytest.mark.parametrize(
    "document",
    [
        b'[{"text": "a"} {"text": "b"}]',
        b'[{"text": "a"}',
        b'[{"text": "a"},]',
        b'[{"text": "a"}] x',
        b'[{"text": NaN}]',
        b'{"data": [\n{"text": "a"},\n',
        b'{"data": [\n1 2]}',
        b"3",
        b'[{"text": "\xff"}]',
    ],
)
def test_a_broken_json_document_is_an_error(tmp_path: Path, document: bytes) -> None:
    with pytest.raises(DataError, match=r"^a\.json:"):
        read(tmp_path, "a.json", document)


def test_a_json_list_may_hold_bad_rows(tmp_path: Path) -> None:
    assert read(tmp_path, "a.json", b'[{"text": "a"}, 3]')[1] == BadRow("a.json", 2, "a JSON number, not an object")


def test_broken_json_lines_in_a_json_file_are_judged_line_by_line(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.json", b'{"text": a}\n{"text": "b"}\n{"text" "c"}\n')
    assert [(type(row), row.number) for row in rows] == [(BadRow, 1), (Row, 2), (BadRow, 3)]


def test_a_json_document_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.reading.json_rows.MAX_DOCUMENT_BYTES", 1 << 20)
    row = b'{"text": "%s"}' % (b"x" * 1_000)
    for data in (b"[" + b",".join([row] * 1_100) + b"]", b'{"data": [' + b",".join([row] * 1_100) + b"]}"):
        with pytest.raises(DataError, match=r"a\.json: a JSON document of more than 1 MiB") as caught:
            read(tmp_path, "a.json", data)
        assert "JSON lines" in caught.value.hint
    assert len(read(tmp_path, "a.json", b"\n".join([row] * 1_100))) == 1_100


def test_a_key_twice_in_a_json_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON: the key 'text' is there twice"):
        read(tmp_path, "a.json", b'[{"text": "a"},\n{"text": "b", "text": "c"}]')


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_a_csv_record_has_the_line_that_it_begins_on(tmp_path: Path) -> None:
    data = b'prompt,completion\n"one\ntwo",x\n\ny,z\na,b,c\nd\n"e\n",f\n'
    assert read(tmp_path, "a.csv", data) == [
        Row("a.csv", 2, {"prompt": "one\ntwo", "completion": "x"}),
        Row("a.csv", 5, {"prompt": "y", "completion": "z"}),
        BadRow("a.csv", 6, "3 fields, but the header names 2"),
        BadRow("a.csv", 7, "1 field, but the header names 2"),
        Row("a.csv", 8, {"prompt": "e\n", "completion": "f"}),
    ]


def test_bad_csv_records_cost_one_row(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", b'text,n\n"a"b,1\n\xff,2\nc,3\n"never closed,4\nd,5\n')
    assert [(type(row), row.number) for row in rows] == [(BadRow, 2), (BadRow, 3), (Row, 4), (BadRow, 5)]
    assert "not valid CSV" in rows[0].reason  # type: ignore[union-attr]
    assert rows[1] == BadRow("a.csv", 3, "not valid UTF-8")
    assert "unexpected end of data" in rows[3].reason  # type: ignore[union-attr]


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    text = "long " * 100_000
    assert read(tmp_path, "a.csv", f"text\n{text}\n".encode()) == [Row("a.csv", 2, {"text": text})]


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.reading.separated.MAX_LINE_BYTES", 100)
    rows = read(tmp_path, "a.csv", b'text,n\n"never closed,1\n' + b"a,2\n" * 200)
    assert rows[0].number == 2
    assert "field larger than field limit (100)" in rows[0].reason  # type: ignore[union-attr]
    assert len(rows) > 150


def test_a_csv_line_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "CHUNK_BYTES", 10)
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 20)
    with pytest.raises(DataError, match=r"a\.csv:3: a line of more than"):
        read(tmp_path, "a.csv", b"text,n\na,1\n" + b"x" * 30 + b",2\n")


@pytest.mark.parametrize(
    ("header", "reason"),
    [("text,text", "names text twice"), ("text,,x", "column 2 without a name"), ('"a"b,c', "header can't be read")],
)
def test_a_bad_csv_header_is_an_error(tmp_path: Path, header: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(tmp_path, "a.csv", f"{header}\n1,2\n".encode())


# -- Parquet and Arrow -------------------------------------------------------------------------------------------------


def test_damaged_columnar_files_are_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": f"row {number}"} for number in range(5_000)])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        whole = (tmp_path / name).read_bytes()
        for data in (whole[:-200], whole[:3_000], b"junk" * 100, b""):
            with pytest.raises(DataError, match=name):
                read(tmp_path, name, data)
    scrambled = bytearray((tmp_path / "a.parquet").read_bytes())
    scrambled[100:900] = b"\xff" * 800
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path, "a.parquet", bytes(scrambled))


def test_arrow_offsets_that_point_outside_are_not_followed(tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 77, "b" * 55]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrow").read_bytes()
    good, bad = struct.pack("<iii", 0, 77, 132), struct.pack("<iii", 0, 77, 1_000)
    assert whole.count(good) == 1
    with pytest.raises(DataError, match=r"a\.arrow"):
        read(tmp_path, "a.arrow", whole.replace(good, bad))


def test_a_column_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="text is there twice"):
        list(read_rows(tmp_path / "a.parquet", "a.parquet"))


def test_a_parquet_string_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    strings = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet", "a.parquet"))
    assert [type(row) for row in rows] == [Row, BadRow, Row]


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.arrow", "a.csv.gz"):
        with pytest.raises(FileNotFoundError):
            list(read_rows(tmp_path / name, name))
