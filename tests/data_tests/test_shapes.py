"""Which columns make which example, what is supervised, and which rows are refused."""

from typing import Any

import pytest

from job.data.shapes import (
    ChatExample,
    FatalRowError,
    LossOn,
    Message,
    PlainExample,
    RowError,
    Shape,
    check_loss_on,
    find_shape,
    to_example,
)
from job.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "be kind"}
HELLO = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "more?"}
SURE = {"role": "assistant", "content": "sure"}


def chat(values: dict[str, Any], shape: Shape, loss_on: LossOn = "auto") -> ChatExample:
    example = to_example(values, shape, loss_on, has_template=True)
    assert isinstance(example, ChatExample)
    return example


def turns(example: ChatExample) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.supervised) for message in example.messages]


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (["text", "label", "id"], "text"),
        (["completion", "prompt", "system"], "prompt/completion"),
        (["messages", "prompt", "prompt_id"], "messages"),
        (["instruction", "input", "output"], "instruction/output"),
        (["instruction", "output", "prompt"], "instruction/output"),
    ],
)
def test_find_shape(columns: list[str], shape: Shape) -> None:
    assert find_shape(columns, "a.jsonl") == shape


def test_unknown_columns_are_named_with_what_is_accepted() -> None:
    with pytest.raises(DataError) as caught:
        find_shape(["question", "answer"], "a.jsonl")
    assert caught.value.message == "a.jsonl: no known shape has the columns found: `answer`, `question`"
    assert "`prompt` and `completion`" in caught.value.hint


def test_two_shapes_at_once_are_refused() -> None:
    with pytest.raises(DataError, match=r"a\.csv: the columns fit more than one shape: text, messages"):
        find_shape(["text", "messages"], "a.csv")


@pytest.mark.parametrize(
    ("loss_on", "supervised"),
    [
        ("auto", [False, False, True, False, True]),
        ("assistant", [False, False, True, False, True]),
        ("completion", [False, False, False, False, True]),
    ],
)
def test_messages(loss_on: LossOn, supervised: list[bool]) -> None:
    example = chat({"messages": [SYSTEM, HELLO, HI, MORE, SURE]}, "messages", loss_on)
    assert [message.supervised for message in example.messages] == supervised
    assert not example.supervise_all


def test_all_supervises_everything() -> None:
    assert chat({"messages": [HELLO, HI]}, "messages", "all").supervise_all
    for values, shape in (
        ({"prompt": "a", "completion": "b"}, "prompt/completion"),
        ({"instruction": "a", "output": "b"}, "instruction/output"),
        ({"text": "a"}, "text"),
    ):
        assert to_example(values, shape, "all", has_template=False).supervised_from == 0  # type: ignore[arg-type,union-attr]


def test_the_last_answer_may_be_followed_by_a_question() -> None:
    example = chat({"messages": [HELLO, HI, MORE]}, "messages", "completion")
    assert [message.supervised for message in example.messages] == [False, True, False]


def test_prompt_and_completion_become_turns_where_there_is_a_template() -> None:
    values = {"prompt": "hello", "completion": "hi", "system": "be kind"}
    assert turns(chat(values, "prompt/completion")) == [
        ("system", "be kind", False),
        ("user", "hello", False),
        ("assistant", "hi", True),
    ]
    assert turns(chat({"prompt": "hello", "completion": "hi", "system": None}, "prompt/completion")) == [
        ("user", "hello", False),
        ("assistant", "hi", True),
    ]


@pytest.mark.parametrize(("loss_on", "first"), [("auto", False), ("completion", False), ("assistant", True)])
def test_answers_inside_a_prompt_of_messages(loss_on: LossOn, first: bool) -> None:
    values = {"prompt": [HELLO, HI, MORE], "completion": [SURE]}
    assert [message.supervised for message in chat(values, "prompt/completion", loss_on).messages] == [
        False,
        first,
        False,
        True,
    ]


def test_prompt_and_completion_are_joined_as_they_are_without_a_template() -> None:
    example = to_example({"prompt": "2 + 2 = ", "completion": "4"}, "prompt/completion", "auto", has_template=False)
    assert example == PlainExample("2 + 2 = 4", 8)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "translate"}, "translate"),
        ({"instruction": "translate", "input": None}, "translate"),
        ({"instruction": "translate", "input": ""}, "translate"),
        ({"instruction": "translate", "input": "cat"}, "translate\n\ncat"),
    ],
)
def test_instruction(values: dict[str, Any], prompt: str) -> None:
    values = {**values, "output": "貓"}
    assert turns(chat(values, "instruction/output")) == [("user", prompt, False), ("assistant", "貓", True)]
    plain = to_example(values, "instruction/output", "auto", has_template=False)
    assert plain == PlainExample(f"{prompt}\n\n貓", len(prompt) + 2)
    with_system = to_example({**values, "system": "be brief"}, "instruction/output", "auto", has_template=False)
    assert with_system == PlainExample(f"be brief\n\n{prompt}\n\n貓", len(prompt) + 12)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert turns(chat({"messages": [{"role": "user", "content": parts}, HI]}, "messages"))[0] == (
        "user",
        "hello",
        False,
    )


def test_other_keys_of_a_message_are_kept_and_nulls_are_not() -> None:
    call = {"type": "function", "function": {"name": "open", "arguments": {}}}
    messages = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    assert chat({"messages": messages}, "messages").messages[1] == Message(
        "assistant", "", True, {"tool_calls": [call]}
    )


BAD_ROWS: list[tuple[Shape, dict[str, Any], str]] = [
    ("text", {}, "column `text` is missing"),
    ("text", {"text": None}, "column `text` is null, not a string"),
    ("text", {"text": 3}, "column `text` is a number, not a string"),
    ("text", {"text": ["a"]}, "column `text` is a list, not a string"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", {"text": "a\ud83d"}, "`text` holds half of a surrogate pair at character 2"),
    ("prompt/completion", {"prompt": "a"}, "column `completion` is missing"),
    ("prompt/completion", {"prompt": "a", "completion": None}, "column `completion` is null, not a string"),
    ("prompt/completion", {"prompt": {}, "completion": "b"}, "column `prompt` is an object, not a string"),
    ("prompt/completion", {"prompt": "a", "completion": ""}, "completion is empty"),
    (
        "prompt/completion",
        {"prompt": "a", "completion": "b", "system": True},
        "column `system` is a boolean, not a string",
    ),
    ("prompt/completion", {"prompt": "a", "completion": [HELLO]}, "no assistant turn"),
    ("prompt/completion", {"prompt": [SYSTEM], "completion": "b", "system": "x"}, "has both a `system` column"),
    ("instruction/output", {"instruction": "a", "output": ""}, "output is empty"),
    ("instruction/output", {"instruction": "a", "output": "b", "input": 1}, "column `input` is a number, not a string"),
    ("messages", {"messages": "hello"}, "column `messages` is a string, not a list of messages"),
    ("messages", {"messages": []}, "no assistant turn"),
    ("messages", {"messages": [SYSTEM, HELLO]}, "no assistant turn"),
    ("messages", {"messages": [HELLO, "hi"]}, "messages[1] is a string, not an object with role and content"),
    ("messages", {"messages": [HELLO, {"role": "bot", "content": "x"}]}, "messages[1] has the role 'bot'; known are"),
    ("messages", {"messages": [HELLO, {"role": None, "content": "x"}]}, "messages[1] has the role null"),
    ("messages", {"messages": [HELLO, {"content": "x"}]}, "messages[1] has the role null"),
    ("messages", {"messages": [HELLO, {"role": ["user"], "content": "x"}]}, "messages[1] has the role list"),
    ("messages", {"messages": [HELLO, {"role": "assistant"}]}, "messages[1] has a null as content, not a string"),
    ("messages", {"messages": [HELLO, {"role": "assistant", "content": 3}]}, "messages[1] has a number as content"),
    ("messages", {"messages": [HELLO, {"role": "assistant", "content": " "}]}, "messages[1] (assistant) is empty"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, HI]},
        "messages[0] has content that is",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, HI]},
        "messages[0] has content that is",
    ),
    ("messages", {"messages": [{"role": "user", "content": "\udc00"}, HI]}, "messages[0] holds half of a surrogate"),
]


@pytest.mark.parametrize(("shape", "values", "reason"), BAD_ROWS)
def test_bad_rows(shape: Shape, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_example(values, shape, "auto", has_template=True)
    assert caught.value.reason.startswith(reason)
    assert not isinstance(caught.value, FatalRowError)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("messages", {"messages": [HELLO, HI]}),
        ("prompt/completion", {"prompt": [HELLO], "completion": "hi"}),
        ("prompt/completion", {"prompt": "hello", "completion": [HI]}),
    ],
)
def test_conversations_need_a_chat_template(shape: Shape, values: dict[str, Any]) -> None:
    with pytest.raises(FatalRowError, match="no chat template") as caught:
        to_example(values, shape, "auto", has_template=False)
    assert "instruct model" in caught.value.hint


def test_text_has_no_answers_to_take_the_loss_on() -> None:
    for loss_on in ("completion", "assistant"):
        with pytest.raises(ConfigError, match=f"SFT_DATA__LOSS_ON={loss_on}"):
            check_loss_on("text", loss_on, "a.jsonl")  # type: ignore[arg-type]
    check_loss_on("text", "all", "a.jsonl")
    check_loss_on("messages", "completion", "a.jsonl")
