"""Inputs that no job can train on, each of its own kind, with the exit code and the words that they must end in.

    python tests/malformed_inputs.py FOLDER < environments.json

runs `sft-job check` in this one process for each environment of a JSON object {name: variables}, for a process of its
own costs two seconds each; all that a job says goes to FOLDER/name.log.
"""

import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

GOOD = b'{"prompt": "When do you open?", "completion": "At nine."}\n'
GOOD_CHAT = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
GOOD_SHAREGPT = b'{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}\n'
GOOD_TOOLS = (
    b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": []}\n'
)


@dataclass(frozen=True)
class Case:
    """Files to train on (the first names the data, unless the settings do), more settings, and how the job must end.

    In settings, {folder} is the folder of the files.
    """

    name: str
    files: dict[str, Callable[[], bytes]]
    words: tuple[str, ...]
    code: int = 65
    settings: dict[str, str] = field(default_factory=dict)


CASES: list[Case] = []
ACCEPTED: list[Case] = []  # what looks wrong, and is read as it is meant


def add(name: str, files: dict[str, bytes | Callable[[], bytes]], *words: str, code: int = 65, **settings: str) -> None:
    """Add a case; contents that are large are functions, so that they are made when they are written."""
    made = {path: data if callable(data) else partial(bytes, data) for path, data in files.items()}
    CASES.append(Case(name, made, words, code, settings))


def third_line(name: str, line: bytes, *words: str, good: bytes = GOOD, **settings: str) -> None:
    """Add a case of JSON lines whose third line is wrong."""
    add(name, {"rows.jsonl": good * 2 + line + b"\n" + good}, "1 of 4 rows", "rows.jsonl:3: ", *words, **settings)


def third_row(name: str, row: object, *words: str, good: bytes = GOOD, **settings: str) -> None:
    """Add a case of JSON lines whose third line is JSON, and not a usable row."""
    third_line(name, json.dumps(row).encode(), *words, good=good, **settings)


def third_chat(name: str, messages: object, *words: str) -> None:
    """Add a case of JSON lines whose third conversation is wrong."""
    third_row(name, {"messages": messages}, *words, good=GOOD_CHAT)


def ask(content: object = "Hi", **more: object) -> dict[str, object]:
    """Return a user's turn."""
    return {"role": "user", "content": content, **more}


def answer(content: object = "Hello.", **more: object) -> dict[str, object]:
    """Return an assistant's turn."""
    return {"role": "assistant", "content": content, **more}


# -- JSON lines --------------------------------------------------------------------------------------------------------

third_line("line-cut-off", b'{"prompt": "a", "completion": "b', "not valid JSON", "column 31")
third_line("line-without-brace", b'{"prompt": "a", "completion": "b"', "not valid JSON", "column 34")
third_line("bare-word", b"hello", "not valid JSON", "column 1")
third_line("number", b"42", "a JSON number, not an object")
third_line("string", b'"a"', "a JSON string, not an object")
third_line("null", b"null", "a JSON null, not an object")
third_line("list", b'["a", "b"]', "a JSON list, not an object")
third_line("trailing-comma", b'{"prompt": "a", "completion": "b",}', "not valid JSON", "column 3")
third_line("single-quotes", b"{'prompt': 'a', 'completion': 'b'}", "not valid JSON", "column 2")
third_line("comment", b'{"prompt": "a", "completion": "b"} // here', "not valid JSON: Extra data", "column 36")
third_line("nan", b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is not valid JSON")
third_line("infinity", b'{"prompt": "a", "completion": "b", "score": -Infinity}', "-Infinity is not valid JSON")
third_line("two-objects", GOOD.strip() + b" " + GOOD.strip(), "not valid JSON: Extra data", "column 59")
third_line("comma-after-object", GOOD.strip() + b",", "not valid JSON: Extra data", "column 58")
third_line("duplicate-key", b'{"prompt": "a", "completion": "b", "prompt": "c"}', "'prompt' is there twice")
third_line("deep-nesting", b'{"prompt": ' + b"[" * 200_000, "not valid JSON")
third_line("huge-integer", b'{"prompt": ' + b"9" * 5_000 + b', "completion": "b"}', "not valid JSON")
third_line("latin-1", '{"prompt": "Où", "completion": "Là"}'.encode("latin-1"), "not valid UTF-8", "byte 14")
third_line("nul-bytes", b"\0" * 20, "not valid JSON", "column 1")
third_line("control-character", b'{"prompt": "a\x07", "completion": "b"}', "Invalid control character", "column 14")
third_line("bad-escape", b'{"prompt": "C:\\Users", "completion": "b"}', "not valid JSON: Invalid", "column 15")
third_line("half-a-surrogate-pair", b'{"prompt": "a", "completion": "b \\ud83d"}', "half of a surrogate pair")
third_line("merge-conflict", b"<<<<<<< HEAD", "not valid JSON", "column 1")
add("bom-and-bad-first-line", {"rows.jsonl": b"\xef\xbb\xbf{]\n" + GOOD}, "1 of 2 rows", "rows.jsonl:1: not valid JSON")
add("utf-16", {"rows.jsonl": (GOOD * 3).decode().encode("utf-16")}, "rows.jsonl", "UTF-16")
add("utf-16-without-bom", {"rows.jsonl": (GOOD * 3).decode().encode("utf-16-le")}, "rows.jsonl", "UTF-16")
add("empty-file", {"rows.jsonl": b""}, "no rows in", "rows.jsonl", "SFT_DATA__URI")
add("only-empty-lines", {"rows.jsonl": b"\n\r\n\n"}, "no rows in", "rows.jsonl")
add("only-blanks", {"rows.jsonl": b"   \t  \n    "}, "no rows in", "rows.jsonl")
add("csv-named-jsonl", {"rows.jsonl": b"prompt,completion\na,b\n"}, "rows.jsonl:1: not valid JSON")
add("parquet-named-jsonl", {"rows.jsonl": lambda: parquet({"text": ["a"] * 5})}, "rows.jsonl:1: not valid")
add(
    "line-of-17-mib",
    {"rows.jsonl": lambda: GOOD * 2 + b'{"prompt": "a", "completion": "' + b"b" * (17 << 20) + b'"}\n' + GOOD},
    "1 of 4 rows",
    "rows.jsonl:3: ",
    "16 MiB",
)

# -- columns -----------------------------------------------------------------------------------------------------------

third_row("missing-column", {"prompt": "a"}, "column `completion` is missing")
third_row("empty-object", {}, "column `prompt` is missing")
third_row("null-answer", {"prompt": "a", "completion": None}, "`completion` is null")
third_row("null-question", {"prompt": None, "completion": "b"}, "`prompt` is null")
third_row("boolean-answer", {"prompt": "a", "completion": True}, "`completion` is a boolean")
third_row("object-answer", {"prompt": "a", "completion": {"text": "b"}}, "`completion` is an object")
third_row("empty-answer", {"prompt": "a", "completion": ""}, "completion is empty")
third_row("blank-answer", {"prompt": "a", "completion": " \n\t"}, "completion is empty")
third_row("list-as-text", {"text": ["a", "b"]}, "`text` is a list", good=b'{"text": "A short review."}\n')
third_row("blank-text", {"text": "\u3000 "}, "text is empty", good=b'{"text": "A short review."}\n')
add("unknown-columns", {"rows.jsonl": b'{"title": "a", "body": "b"}\n'}, "rows.jsonl", "`body`, `title`", "SFT_DATA__")
add(
    "misspelt-column",
    {"rows.jsonl": b'{"promt": "a", "completion": "b"}\n'},
    "rows.jsonl",
    "`promt`",
    'SFT_DATA__COLUMNS=\'{"promt": "prompt"',
)
add(
    "two-shapes",
    {"rows.jsonl": b'{"text": "a", "question": "b", "answer": "c"}\n'},
    "rows.jsonl",
    "more than one shape",
    "text",
    "question/answer",
    "SFT_DATA__COLUMNS='{",
)
add(
    "renamed-column-is-missing",
    {"rows.jsonl": b'{"review": "a"}\n'},
    "rows.jsonl",
    "SFT_DATA__COLUMNS renames `reviews`",
    "`review`",
    DATA__COLUMNS='{"reviews": "text"}',
)
add(
    "two-columns-renamed-to-one",
    {"rows.jsonl": b'{"a": "x", "b": "y"}\n'},
    "SFT_DATA__COLUMNS",
    "`a`",
    "`b`",
    code=78,
    DATA__COLUMNS='{"a": "text", "b": "text"}',
)
add("columns-is-no-object", {"rows.jsonl": GOOD}, "SFT_DATA__COLUMNS", code=78, DATA__COLUMNS="review=text")
add(
    "answers-asked-of-text",
    {"rows.jsonl": b'{"text": "a"}\n'},
    "SFT_DATA__LOSS_ON=completion",
    "rows.jsonl",
    code=78,
    DATA__LOSS_ON="completion",
)

# -- conversations -----------------------------------------------------------------------------------------------------

third_chat("messages-is-text", "Hi", "`messages` is a string, not a list of messages")
third_chat("messages-is-an-object", ask(), "`messages` is an object, not a list of messages")
third_chat("messages-is-null", None, "`messages` is null")
third_chat("no-messages", [], "no assistant turn")
third_chat("no-assistant", [ask(), ask("Anybody?")], "no assistant turn")
third_chat("unknown-role", [ask(), {"role": "bot", "content": "Hello."}], "messages[1]", "'bot'", "assistant")
third_chat("role-is-missing", [{"content": "Hi"}, answer()], "messages[0]", "role null")
third_chat("role-is-a-number", [{"role": 1, "content": "Hi"}, answer()], "messages[0]", "role number")
third_chat("turn-is-text", ["Hi", "Hello."], "messages[0] is a string")
third_chat("turn-is-a-list", [["user", "Hi"], ["assistant", "Hello."]], "messages[0] is a list")
third_chat("turn-is-null", [ask(), None, answer()], "messages[1] is null")
third_chat("content-is-null", [ask(None), answer()], "messages[0].content is null")
third_chat("content-is-missing", [{"role": "user"}, answer()], "messages[0].content is null")
third_chat("content-is-an-object", [ask({"text": "Hi"}), answer()], "messages[0].content is an object")
third_chat(
    "image", [ask([{"type": "image_url", "image_url": {"url": "data:"}}]), answer()], "messages[0].content", "than text"
)
third_chat("empty-assistant-turn", [ask(), answer("")], "messages[1]", "is empty")
third_chat("blank-first-answer", [ask(), answer(" "), ask(), answer()], "messages[1]", "is empty")
third_chat("tool-calls-are-text", [ask(), answer(tool_calls="f()")], "messages[1].tool_calls")
third_row(
    "system-twice",
    {"system": "Be kind.", "messages": [{"role": "system", "content": "Be brief."}, ask(), answer()]},
    "both a `system` column and a system message",
    good=GOOD_CHAT.replace(b"{", b'{"system": "Be kind.", ', 1),
)
third_row(
    "sharegpt-unknown-from",
    {"conversations": [{"from": "narrator", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "conversations[0]",
    "'narrator'",
    "human",
    good=GOOD_SHAREGPT,
)
third_row(
    "sharegpt-missing-value",
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"}]},
    "conversations[1].value is null",
    good=GOOD_SHAREGPT,
)
third_row(
    "sharegpt-without-answer",
    {"conversations": [{"from": "human", "value": "Hi"}]},
    "no assistant turn",
    good=GOOD_SHAREGPT,
)
third_row("tools-broken-json", {"messages": [ask(), answer()], "tools": "[{"}, "`tools` is not", good=GOOD_TOOLS)
third_row("tools-not-a-list", {"messages": [ask(), answer()], "tools": {"f": 1}}, "`tools` is not", good=GOOD_TOOLS)
third_row("tools-of-text", {"messages": [ask(), answer()], "tools": ["f", "g"]}, "`tools` is not", good=GOOD_TOOLS)
# -- JSON documents ----------------------------------------------------------------------------------------------------

add("document-of-text", {"rows.json": b'"hello"'}, "rows.json", "a JSON string, not a list")
add("document-of-numbers", {"rows.json": b"[1, 2, 3]"}, "none of the 3 rows", "rows.json:1: a JSON number")
add("document-empty-list", {"rows.json": b"[]"}, "no rows in", "rows.json")
add("document-cut-off", {"rows.json": b"[\n" + GOOD.strip() + b',\n{"prompt": "a"'}, "rows.json:3: not valid JSON")
add("document-trailing-garbage", {"rows.json": b"[\n" + GOOD + b"]\n]"}, "rows.json:4: not valid JSON: Extra data")
add("document-missing-comma", {"rows.json": b"[\n" + GOOD * 2 + b"]"}, "rows.json:3: not valid JSON", "','")
add("document-latin-1", {"rows.json": b'[\n{"text": "\xe9t\xe9"}\n]'}, "rows.json:2: not valid UTF-8")
add("document-deep", {"rows.json": b"[" * 200_000}, "rows.json:1: not valid JSON")

# -- CSV and TSV -------------------------------------------------------------------------------------------------------

HEADER = b"prompt,completion\n"
add("csv-unclosed-quote", {"rows.csv": HEADER + b'a,b\n"c,d\ne,f\n'}, "1 of 2 rows", "rows.csv:3: not valid CSV")
add("csv-text-after-quote", {"rows.csv": HEADER + b'a,b\n"c" x,d\n'}, "1 of 2 rows", "rows.csv:3: not valid CSV")
add("csv-too-many-fields", {"rows.csv": HEADER + b"a,b\nc,d,e\n"}, "1 of 2", "rows.csv:3: 3 fields", "header names 2")
add("csv-too-few-fields", {"rows.csv": HEADER + b"a,b\nc\n"}, "1 of 2", "rows.csv:3: 1 field", "header names 2")
add("csv-duplicate-header", {"rows.csv": b"prompt,completion,prompt\na,b,c\n"}, "rows.csv:1: ", "names prompt twice")
add("csv-empty-header-cell", {"rows.csv": b"prompt,,completion\na,b,c\n"}, "rows.csv:1: ", "column 2 without a name")
add("csv-header-only", {"rows.csv": HEADER}, "no rows in", "rows.csv")
add("csv-without-header", {"rows.csv": b"When?,At nine.\nWhere?,Here.\n"}, "rows.csv", "`At nine.`, `When?`")
add("csv-latin-1", {"rows.csv": HEADER + b"a,b\nO\xf9,L\xe0\n"}, "1 of 2 rows", "rows.csv:3: not valid UTF-8")
add("csv-empty-answer", {"rows.csv": HEADER + b"a,b\nc,\n"}, "1 of 2 rows", "rows.csv:3: completion is empty")
add("csv-semicolons", {"rows.csv": b"prompt;completion\na;b\n"}, "rows.csv", "`prompt;completion`")
add("csv-unclosed-header", {"rows.csv": b'"prompt,completion\na,b\n'}, "rows.csv:1: the header can't be read")
add("tsv-too-few-fields", {"rows.tsv": b"prompt\tcompletion\na b\n"}, "rows.tsv:2: 1 field", "header names 2")

# -- Parquet and Arrow -------------------------------------------------------------------------------------------------


def parquet(columns: dict[str, list[object]]) -> bytes:
    """Return a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def parquet_with_column_twice() -> bytes:
    """Return a Parquet file with two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), sink)
    return sink.getvalue()


def arrow(columns: dict[str, list[object]], *, as_stream: bool = False) -> bytes:
    """Return an Arrow IPC file or stream."""
    import pyarrow as pa

    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if as_stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


PAIRS = {"prompt": ["When?", "Where?", "Who?"], "completion": ["At nine.", "Here.", "Me."]}
WITH_NULL = {"prompt": ["When?", "Where?", "Who?"], "completion": ["At nine.", None, "Me."]}
add("parquet-cut-off", {"rows.parquet": lambda: parquet(PAIRS)[:-20]}, "rows.parquet: the Parquet file is damaged")
add("parquet-is-text", {"rows.parquet": GOOD}, "rows.parquet: the Parquet file is damaged")
add("parquet-empty", {"rows.parquet": b""}, "rows.parquet: the Parquet file is damaged")
add("parquet-zero-rows", {"rows.parquet": lambda: parquet({"text": []})}, "no rows in", "rows.parquet")
add("parquet-column-twice", {"rows.parquet": parquet_with_column_twice}, "rows.parquet", "column text is there twice")
add("parquet-null", {"rows.parquet": lambda: parquet(WITH_NULL)}, "1 of 3 rows", "rows.parquet:2: ", "is null")
add(
    "parquet-latin-1",
    {
        "rows.parquet": lambda: parquet(PAIRS | {"completion": ["At nine.", "Here.", "XbadX"]}).replace(
            b"XbadX", b"X\xe9adX"
        )
    },
    "rows.parquet:3: not valid UTF-8",
)
add(
    "parquet-bytes",
    {"rows.parquet": lambda: parquet({"text": [b"a", b"b"]})},
    "none of the 2 rows",
    "rows.parquet:1: column `text` is a byte string",
)
add("arrow-cut-off", {"rows.arrow": lambda: arrow(PAIRS)[:-20]}, "rows.arrow: the Arrow file is damaged")
add("arrow-wrong-magic", {"rows.arrow": lambda: b"ARROW2" + arrow(PAIRS)[6:]}, "rows.arrow: the Arrow file is damaged")
add(
    "arrow-stream-cut-off",
    {"rows.arrow": lambda: arrow(PAIRS, as_stream=True)[:-60]},
    "rows.arrow: the Arrow file is damaged",
)
add("arrow-null", {"rows.feather": lambda: arrow(WITH_NULL)}, "1 of 3 rows", "rows.feather:2: ", "is null")

# -- compressed --------------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    """Return data compressed by zstd."""
    import pyarrow as pa

    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


add("gzip-cut-off", {"rows.jsonl.gz": gzip.compress(GOOD * 500)[:-12]}, "rows.jsonl.gz: the gzip file is damaged")
add("gzip-is-plain-text", {"rows.jsonl.gz": GOOD}, "rows.jsonl.gz: the gzip file is damaged")
add("gzip-empty", {"rows.jsonl.gz": b""}, "rows.jsonl.gz: an empty file is not a gzip file")
add("gzip-of-nothing", {"rows.csv.gz": gzip.compress(b"")}, "no rows in", "rows.csv.gz")
add("gzip-trailing-garbage", {"rows.jsonl.gz": gzip.compress(GOOD) + b"garbage"}, "rows.jsonl.gz: the gzip file is")
add("gzip-bad-line", {"rows.jsonl.gz": gzip.compress(GOOD * 2 + b"{\n")}, "1 of 3 rows", "rows.jsonl.gz:3: not valid")
add("zstd-cut-off", {"rows.jsonl.zst": lambda: zstd(GOOD * 500)[:-12]}, "rows.jsonl.zst: the zstd file is damaged")
add("zstd-is-gzip", {"rows.jsonl.zst": gzip.compress(GOOD)}, "rows.jsonl.zst: the zstd file is damaged")

# -- places ------------------------------------------------------------------------------------------------------------

add("wrong-ending", {"rows.xlsx": b"PK\x03\x04"}, "SFT_DATA__URI=", "data file", ".xlsx", ".jsonl")
add(
    "folder-without-data",
    {"data/notes.txt": b"a", "data/photo.png": b"b"},
    "SFT_DATA__URI=",
    "none of the 2 files",
    ".png, .txt",
    DATA__URI="{folder}/data",
)
add(
    "missing-file",
    {"rows.jsonl": GOOD},
    "SFT_DATA__URI=",
    "none.jsonl",
    "nothing is there",
    code=66,
    DATA__URI="{folder}/none.jsonl",
)
add(
    "empty-glob",
    {"rows.jsonl": GOOD},
    "SFT_DATA__URI=",
    "the glob matches none of 1 files",
    code=66,
    DATA__URI="{folder}/*.parquet",
)
add(
    "broken-list-of-uris",
    {"rows.jsonl": GOOD},
    "SFT_DATA__URI=",
    "JSON list of URIs",
    code=78,
    DATA__URI='["{folder}/rows.jsonl"',
)
add(
    "bad-row-in-second-file",
    {"data/a.jsonl": GOOD * 3, "data/b.jsonl": GOOD + b"{"},
    "1 of 5 rows",
    "b.jsonl:2: ",
    DATA__URI="{folder}/data",
)
add(
    "bad-eval-file",
    {"rows.jsonl": GOOD * 4, "eval.jsonl": GOOD + b"{"},
    "SFT_DATA__EVAL_URI",
    "eval.jsonl:2: ",
    DATA__EVAL_URI="{folder}/eval.jsonl",
)
add(
    "empty-eval-file",
    {"rows.jsonl": GOOD * 4, "eval.jsonl": b""},
    "no rows in",
    "eval.jsonl",
    "SFT_DATA__EVAL_URI",
    DATA__EVAL_URI="{folder}/eval.jsonl",
)

# -- row templates -----------------------------------------------------------------------------------------------------

MARKED = "Q: {{ prompt }} A: {% generation %}{{ completion }}{% endgeneration %}"


def add_template(name: str, template: str, *words: str, code: int = 78) -> None:
    """Add a case of good rows under a wrong SFT_DATA__TEMPLATE."""
    add(name, {"rows.jsonl": GOOD * 3}, "SFT_DATA__TEMPLATE", *words, code=code, DATA__TEMPLATE=template)


add_template("template-syntax-error", "Q: {{ prompt\nA: {{ completion }}", "line 2")
add_template("template-unclosed-mark", "{{ prompt }} {% generation %}{{ completion }}", "line 1", "endgeneration")
add_template("template-without-marks", "Q: {{ prompt }} A: {{ completion }}", "{% generation %}")
add_template("template-text-after-marks", MARKED + " END", "line 1", "learn to stop")
add_template("template-unknown-field", MARKED.replace("prompt", "promt"), "`promt`", "`prompt`", "rows.jsonl", code=65)
add_template("template-escape-by-attribute", "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", "line 1")
add_template("template-escape-by-filter", "{% generation %}{{ prompt|attr('__class__') }}{% endgeneration %}", "`attr`")
add_template("template-include", "{% include '/etc/passwd' %}" + MARKED, "line 1", "include")
add_template("template-endless-loop", "{% for i in range(10**9) %}a{% endfor %}" + MARKED, "line 1")
add(
    "template-null-field",
    {"rows.jsonl": GOOD * 2 + b'{"prompt": "a", "completion": null}\n'},
    "1 of 3 rows",
    "rows.jsonl:3: ",
    "`completion` is null",
    DATA__TEMPLATE=MARKED,
)

# -- chat templates ----------------------------------------------------------------------------------------------------


def add_chat_template(name: str, template: bytes, *words: str, code: int = 78) -> None:
    """Add a case of good conversations under a wrong chat template."""
    files: dict[str, bytes | Callable[[], bytes]] = {"rows.jsonl": GOOD_CHAT * 3, "chat.jinja": template}
    add(name, files, *words, code=code, MODEL__CHAT_TEMPLATE="{folder}/chat.jinja")


CHAT_SETTING = "SFT_MODEL__CHAT_TEMPLATE="
add_chat_template("chat-template-syntax", b"{% for message in messages %}\n{{ message.content }", CHAT_SETTING, "line ")
add(
    "chat-template-without-tools",
    {
        "rows.jsonl": GOOD_TOOLS.replace(b"[]", b'[{"type": "function", "function": {"name": "search"}}]'),
        "chat.jinja": b"{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}",
    },
    "none of the 1 rows",
    "rows.jsonl:1: the chat template does not render tools",
    MODEL__CHAT_TEMPLATE="{folder}/chat.jinja",
)
add_chat_template("chat-template-latin-1", b"{{ messages }} \xe9", CHAT_SETTING, "UTF-8")
add_chat_template("chat-template-without-messages", b"Hello", CHAT_SETTING, "does not write the messages")
add_chat_template("chat-template-refuses", b"{{ raise_exception('never') }}", CHAT_SETTING, "never")
add(
    "chat-template-misspelt",
    {"rows.jsonl": GOOD_CHAT},
    "SFT_MODEL__CHAT_TEMPLATE=chatlm",
    "did you mean chatml",
    code=78,
    MODEL__CHAT_TEMPLATE="chatlm",
)
add(
    "chat-template-missing",
    {"rows.jsonl": GOOD_CHAT},
    CHAT_SETTING,
    "nothing is there",
    code=66,
    MODEL__CHAT_TEMPLATE="{folder}/none.jinja",
)
add(
    "assistant-first-in-a-template-that-alternates",
    {"rows.jsonl": GOOD_CHAT * 2 + json.dumps({"messages": [answer(), ask(), answer()]}).encode()},
    "1 of 3 rows",
    "rows.jsonl:3: ",
    "the chat template refuses it",
    MODEL__CHAT_TEMPLATE="gemma",
)

# -- too many ----------------------------------------------------------------------------------------------------------

add(
    "too-many-bad-rows-to-skip",
    {"rows.jsonl": GOOD * 7 + b"{\n[]\n{}\n"},
    "3 of 10 rows",
    "30.0%",
    "SFT_DATA__MAX_BAD_FRACTION=0.1",
    "rows.jsonl:8: ",
    DATA__BAD_ROWS="skip",
)
add(
    "all-rows-bad-and-skipped",
    {"rows.jsonl": b"{\n[]\n"},
    "none of the 2 rows",
    "rows.jsonl:1: ",
    DATA__BAD_ROWS="skip",
    DATA__MAX_BAD_FRACTION="1",
)
add(
    "all-rows-too-long",
    {"rows.jsonl": GOOD * 5},
    "none of the 5 rows",
    "longer than 8 tokens",
    "SFT_DATA__MAX_LENGTH",
    DATA__MAX_LENGTH="8",
)
add(
    "most-rows-too-long",
    {"rows.jsonl": b'{"text": "Short."}\n' + b'{"text": "' + b"A long review. " * 20 + b'"}\n' * 1},
    "1 of 2 rows",
    "SFT_DATA__MAX_DROPPED_FRACTION=0.1",
    DATA__MAX_LENGTH="16",
)


# -- what is read after all ------------------------------------------------------------------------------------------


def accept(name: str, files: dict[str, bytes], *words: str, **settings: str) -> None:
    """Add a case that is ready to train, with words that the log must have."""
    ACCEPTED.append(Case(name, {path: partial(bytes, data) for path, data in files.items()}, words, 0, settings))


accept("bom", {"rows.jsonl": b"\xef\xbb\xbf" + GOOD}, "1 read, 1 can be used")
accept("carriage-returns", {"rows.jsonl": (GOOD * 2).replace(b"\n", b"\r\n")}, "2 read, 2 can be used")
accept("no-last-line-feed", {"rows.jsonl": (GOOD * 2).rstrip()}, "2 read, 2 can be used")
accept("empty-lines", {"rows.jsonl": b"\n" + GOOD + b"\n\n" + GOOD}, "2 read, 2 can be used")
accept("lines-named-json", {"rows.json": GOOD * 2}, "2 read, 2 can be used")
accept("object-around-the-list", {"rows.json": b'{"rows": [' + GOOD.strip() + b"]}"}, "1 read, 1 can be used")
accept(
    "other-files-in-the-folder",
    {"data/rows.jsonl": GOOD, "data/README.md": b"# Rows"},
    "1 of 2 files",
    DATA__URI="{folder}/data",
)
accept("number-as-text", {"rows.jsonl": b'{"prompt": "6 x 7?", "completion": 42}\n'}, "1 of 1 rows hold a number read")
accept("other-columns", {"rows.jsonl": GOOD.replace(b"{", b'{"id": [1, {}], ')}, "1 read, 1 can be used")
accept("csv-line-feed-in-quotes", {"rows.csv": HEADER + b'a,"b\nc"\n'}, "1 read, 1 can be used")
accept(
    "system-in-the-middle",
    {"rows.jsonl": json.dumps({"messages": [ask(), {"role": "system", "content": "Be kind."}, answer()]}).encode()},
    "1 read, 1 can be used",
)
accept(
    "a-few-bad-rows-to-skip",
    {"rows.jsonl": GOOD * 19 + b"{\n"},
    "1 of 20 rows can't be trained on",
    "quarantine.jsonl",
    DATA__BAD_ROWS="skip",
)


def check_many(folder: Path, environments: dict[str, dict[str, str]]) -> None:
    """Run `sft-job check` once for each environment, with all that it says in a file of its own."""
    from job.__main__ import main

    for name, environment in environments.items():
        os.environ.clear()
        os.environ.update(environment)
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = main(["check"])
        print(f"ended with {code}", flush=True)


if __name__ == "__main__":
    check_many(Path(sys.argv[1]), json.load(sys.stdin))
