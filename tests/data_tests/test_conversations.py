"""Lists of messages in both spellings, tool calls and tools, and the messages that are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.reading.files import Row, read_rows
from job.data.shaping.conversations import SHAREGPT_ROLES
from job.data.shaping.shapes import ChatExample, Message, RowError, RowOptions, find_format, to_example

HELLO = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}
CALL = {"type": "function", "function": {"name": "open", "arguments": {"path": "a", "mode": 0}}}
TOOL = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "required": []}}}


def chat(values: dict[str, Any]) -> ChatExample:
    example = to_example(values, find_format(values, "a.jsonl", RowOptions()), has_template=True)
    assert isinstance(example, ChatExample)
    return example


def turns(values: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.supervised) for message in chat(values).messages]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_both_spellings_are_read_in_both_columns(column: str) -> None:
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    wanted = [("user", "hello", False), ("assistant", "hi", True)]
    assert turns({column: sharegpt}) == wanted
    assert turns({column: [HELLO, HI]}) == wanted
    # Arrow gives every message all keys that any of them has.
    nulls: dict[str, Any] = {"role": None, "content": None, "from": None, "value": None}
    assert turns({column: [nulls | sharegpt[0], nulls | HI]}) == wanted


def test_a_role_goes_before_a_speaker() -> None:
    messages = [{"role": "user", "content": "hello", "from": "gpt", "value": "x"}, HI]
    example = chat({"messages": messages})
    assert example.messages[0] == Message("user", "hello", False, {"value": "x"})


def test_a_system_prompt_may_be_a_turn_or_a_column() -> None:
    asked = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    wanted = [("system", "be kind", False), ("user", "a", False), ("assistant", "b", True)]
    assert turns({"conversations": [{"from": "system", "value": "be kind"}, *asked]}) == wanted
    assert turns({"conversations": asked, "system": "be kind"}) == wanted
    with pytest.raises(RowError, match="both a `system` column and a system message"):
        turns({"conversations": [{"from": "system", "value": "be kind"}, *asked], "system": "be brief"})


@pytest.mark.parametrize(("speaker", "role"), SHAREGPT_ROLES.items())
def test_roles_of_sharegpt(speaker: str, role: str) -> None:
    items = [{"from": "human", "value": "a"}, {"from": speaker, "value": "b"}, {"from": "gpt", "value": "c"}]
    assert turns({"conversations": items})[1] == (role, "b", role == "assistant")


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "hel", "image_url": None}, {"type": "text", "text": "lo"}]
    assert turns({"messages": [{"role": "user", "content": parts}, HI]})[0] == ("user", "hello", False)


def test_other_keys_of_a_message_are_kept_and_nulls_are_not() -> None:
    messages = [
        HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "done", "name": "open"},
        {**HI, "reasoning_content": "hm", "tool_calls": None},
    ]
    assert chat({"messages": messages}).messages[1:] == (
        Message("assistant", "", True, {"tool_calls": [CALL]}),
        Message("tool", "done", False, {"name": "open"}),
        Message("assistant", "hi", True, {"reasoning_content": "hm"}),
    )


def calls_of(call: dict[str, Any]) -> Any:
    messages = [HELLO, {"role": "assistant", "content": "wait", "tool_calls": [call]}]
    return chat({"messages": messages}).messages[1].extra["tool_calls"][0]


def test_arguments_become_objects() -> None:
    function = CALL["function"]
    assert isinstance(function, dict)
    as_text = json.dumps(function["arguments"])
    assert calls_of({**CALL, "function": {**function, "arguments": as_text}}) == CALL
    assert calls_of({**function, "arguments": as_text}) == function
    # What isn't the JSON of an object is what the model must have written.
    for arguments in ("a", "[1]", '"a"', '{"a": 1', ""):
        kept = {**CALL, "function": {**function, "arguments": arguments}}
        assert calls_of(kept) == kept


def test_nulls_that_arrow_fills_in_are_dropped_at_any_depth() -> None:
    filled = {
        "id": None,
        "type": "function",
        "function": {"name": "open", "arguments": {"path": "a", "mode": 0, "url": None, "list": [{"x": None}, None]}},
    }
    arguments = {"path": "a", "mode": 0, "list": [{}, None]}
    assert calls_of(filled) == {"type": "function", "function": {"name": "open", "arguments": arguments}}
    # In a JSON string, nulls were written on purpose.
    assert calls_of({"name": "open", "arguments": '{"path": null}'}) == {"name": "open", "arguments": {"path": None}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL | {"strict": None}]])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tools(tools: Any, column: str) -> None:
    assert chat({column: [HELLO, HI], "tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_no_tools(nothing: Any) -> None:
    assert chat({"messages": [HELLO, HI], "tools": nothing}).tools == ()


def test_tools_of_a_prompt() -> None:
    assert chat({"prompt": "open a", "completion": [HI], "tools": [TOOL]}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [3, True, {}, "open", '{"name": "open"}', ["open"], [None], "null"])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(RowError, match="column `tools` is not a list of objects, nor a JSON string of one"):
        chat({"messages": [HELLO, HI], "tools": tools})


def function_call(value: Any) -> ChatExample:
    return chat({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]})


def test_function_calls_of_sharegpt_become_tool_calls() -> None:
    function = CALL["function"]
    assert isinstance(function, dict)
    wanted = (Message("user", "a"), Message("assistant", "", True, {"tool_calls": [CALL]}))
    assert function_call(json.dumps(function)).messages == wanted
    assert function_call(json.dumps({**function, "arguments": json.dumps(function["arguments"])})).messages == wanted
    assert function_call(json.dumps([function, function])).messages[1].extra == {"tool_calls": [CALL, CALL]}
    without = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    assert function_call('{"name": "stop"}').messages[1].extra == {"tool_calls": [without]}
    assert function_call('{"name": "stop", "arguments": null}').messages[1].extra == {"tool_calls": [without]}


@pytest.mark.parametrize("value", ["open a", '{"path": 1}', "[1]", "null", '{"name": 3}', '["open"]'])
def test_function_calls_in_another_form_are_text(value: str) -> None:
    example = function_call(value)
    assert example.messages[1] == Message("assistant", value, True)
    assert example.notes == ("a function call in an unknown form, read as text",)


def nest(depth: int) -> dict[str, Any]:
    return {"a": nest(depth - 1)} if depth else {}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("depth", [150, 400])
def test_nothing_is_nested_too_deeply(depth: int, as_text: bool) -> None:
    deep = nest(depth)
    with pytest.raises(RowError, match="nested more than 100 deep"):
        calls_of({"name": "open", "arguments": json.dumps(deep) if as_text else deep})
    with pytest.raises(RowError, match="nested more than 100 deep"):
        chat({"messages": [HELLO, HI], "tools": "[" * 100_000})


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("hi", "messages[1] is a string, not an object with role and content"),
    (None, "messages[1] is null, not an object"),
    ({"role": "bot", "content": "x"}, "messages[1] has the role 'bot'; known are system, user, assistant, developer"),
    ({"role": None, "content": "x"}, "messages[1] has the role null"),
    ({"content": "x"}, "messages[1] has the role null"),
    ({"role": ["user"], "content": "x"}, "messages[1] has the role list"),
    ({"role": "gpt", "content": "x"}, "messages[1] has the role 'gpt'"),
    ({"from": "alien", "value": "x"}, "messages[1] has the role 'alien'; known are system, human, user, gpt, assist"),
    ({"from": 3, "value": "x"}, "messages[1] has the role number; known are system, human"),
    ({"from": "gpt", "content": "x"}, "messages[1].value is null, not a string"),
    ({"from": "gpt", "value": ""}, "messages[1] (assistant) is empty"),
    ({"from": "function_call", "value": None}, "messages[1].value is null"),
    ({"role": "assistant"}, "messages[1].content is null, not a string"),
    ({"role": "assistant", "tool_calls": []}, "messages[1].content is null, not a string"),
    ({"role": "user", "tool_calls": [CALL]}, "messages[1].content is null, not a string"),
    ({"role": "assistant", "content": True}, "messages[1].content is a boolean, not a string"),
    ({"role": "assistant", "content": {}}, "messages[1].content is an object, not a string"),
    ({"role": "assistant", "content": " "}, "messages[1] (assistant) is empty"),
    ({"role": "assistant", "tool_calls": "open"}, "messages[1].tool_calls is not a list of objects"),
    ({"role": "assistant", "tool_calls": ["open"]}, "messages[1].tool_calls is not a list of objects"),
    ({"role": "user", "content": [{"type": "image"}]}, "messages[1].content holds something else than text"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content holds something else than text"),
    ({"role": "user", "content": ["a"]}, "messages[1].content holds something else than text"),
    ({"role": "user", "content": [{"type": "text", "text": []}]}, "messages[1].content is a list, not a string"),
    ({"role": "user", "content": "\udc00"}, "messages[1].content holds half of a surrogate pair at character 1"),
]


@pytest.mark.parametrize(("item", "reason"), BAD_MESSAGES)
def test_bad_messages(item: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        chat({"messages": [HELLO, item, HI]})
    assert caught.value.reason.startswith(reason)


def test_parquet_and_json_lines_give_the_same_conversation(tmp_path: Path) -> None:
    """Parquet's messages, calls and tools have all keys of one another, null where they had none."""
    call = {"type": "function", "function": {"name": "close", "arguments": {"now": True}}}
    messages = [
        HELLO,
        {"role": "assistant", "content": "", "tool_calls": [CALL, call]},
        {"role": "tool", "content": "done", "name": "open"},
        HI,
    ]
    other = {"type": "function", "function": {"name": "close", "description": "closes it", "parameters": {"type": "x"}}}
    row = {"messages": messages, "tools": [TOOL, other]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    lines, blocks = (next(iter(read_rows(tmp_path / name, name))) for name in ("a.jsonl", "a.parquet"))
    assert isinstance(lines, Row)
    assert isinstance(blocks, Row)
    assert lines.values != blocks.values
    assert chat(lines.values) == chat(blocks.values)
    assert chat(lines.values).messages[1].extra == {"tool_calls": [CALL, call]}
    assert chat(lines.values).tools == (TOOL, other)
