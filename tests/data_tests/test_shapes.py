"""Which rows make which example, what of it is supervised, and which rows are refused."""

import math
import pickle
from typing import Any

import pytest

from job.data.shaping.shapes import (
    ChatExample,
    FatalRowError,
    LossOn,
    PlainExample,
    RowError,
    RowFormat,
    RowOptions,
    Shape,
    find_format,
    to_example,
)

SYSTEM = {"role": "system", "content": "be kind"}
HELLO = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "more?"}
SURE = {"role": "assistant", "content": "sure"}

PAIRS: list[tuple[str, str]] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("input", "output"),
]


def read(values: dict[str, Any], loss_on: LossOn = "auto", **columns: str) -> RowFormat:
    return find_format(values, "a.jsonl", RowOptions(loss_on, columns))


def chat(values: dict[str, Any], loss_on: LossOn = "auto") -> ChatExample:
    example = to_example(values, read(values, loss_on), has_template=True)
    assert isinstance(example, ChatExample)
    return example


def plain(values: dict[str, Any], loss_on: LossOn = "auto") -> PlainExample:
    example = to_example(values, read(values, loss_on), has_template=False)
    assert isinstance(example, PlainExample)
    return example


def turns(example: ChatExample) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.supervised) for message in example.messages]


@pytest.mark.parametrize(
    ("loss_on", "supervised"),
    [
        ("auto", [False, False, True, False, True]),
        ("assistant", [False, False, True, False, True]),
        ("completion", [False, False, False, False, True]),
    ],
)
def test_messages(loss_on: LossOn, supervised: list[bool]) -> None:
    example = chat({"messages": [SYSTEM, HELLO, HI, MORE, SURE]}, loss_on)
    assert [message.supervised for message in example.messages] == supervised
    assert not example.supervise_all


def test_all_supervises_everything() -> None:
    assert chat({"messages": [HELLO, HI]}, "all").supervise_all
    for question, answer in PAIRS:
        example = plain({question: "a", answer: "b"}, "all")
        assert example.spans == ((0, len(example.text)),)
    assert plain({"text": "a"}, "all") == PlainExample("a", ((0, 1),))


def test_the_last_answer_may_be_followed_by_a_question() -> None:
    example = chat({"messages": [HELLO, HI, MORE]}, "completion")
    assert [message.supervised for message in example.messages] == [False, True, False]


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_pairs_become_turns_where_there_is_a_template(question: str, answer: str) -> None:
    assert turns(chat({question: "hello", answer: "hi", "system": "be kind"})) == [
        ("system", "be kind", False),
        ("user", "hello", False),
        ("assistant", "hi", True),
    ]
    for nothing in (None, "", " "):
        assert turns(chat({question: "hello", answer: "hi", "system": nothing})) == [
            ("user", "hello", False),
            ("assistant", "hi", True),
        ]


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_pairs_are_joined_where_there_is_no_template(question: str, answer: str) -> None:
    between = "" if question == "prompt" else "\n\n"
    prompt = f"2 + 2 = {between}"
    assert plain({question: "2 + 2 = ", answer: "4"}) == PlainExample(f"{prompt}4", ((len(prompt), len(prompt) + 1),))
    prompt = f"be brief\n\n{prompt}"
    assert plain({question: "2 + 2 = ", answer: "4", "system": "be brief"}) == PlainExample(
        f"{prompt}4", ((len(prompt), len(prompt) + 1),)
    )


@pytest.mark.parametrize(("loss_on", "first"), [("auto", False), ("completion", False), ("assistant", True)])
def test_answers_inside_a_prompt_of_messages(loss_on: LossOn, first: bool) -> None:
    values = {"prompt": [HELLO, HI, MORE], "completion": [SURE]}
    assert [message.supervised for message in chat(values, loss_on).messages] == [False, first, False, True]


@pytest.mark.parametrize("answer", ["output", "response"])
@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "translate"}, "translate"),
        ({"instruction": "translate", "input": None}, "translate"),
        ({"instruction": "translate", "input": ""}, "translate"),
        ({"instruction": "translate", "input": "cat"}, "translate\n\ncat"),
    ],
)
def test_instruction(values: dict[str, Any], prompt: str, answer: str) -> None:
    values = {**values, answer: "貓"}
    assert turns(chat(values)) == [("user", prompt, False), ("assistant", "貓", True)]
    assert plain(values) == PlainExample(f"{prompt}\n\n貓", ((len(prompt) + 2, len(prompt) + 3),))


def test_numbers_are_read_as_their_json_text() -> None:
    assert plain({"question": "6 * 7 = ", "answer": 42}) == PlainExample(
        "6 * 7 = \n\n42", ((10, 12),), ("a number read as text",)
    )
    example = chat({"question": 0.5, "answer": 1e300})
    assert turns(example) == [("user", "0.5", False), ("assistant", "1e+300", True)]
    assert example.notes == ("a number read as text",)
    example = chat({"messages": [HELLO, {"role": "assistant", "content": 10**400}]})
    assert example.messages[1].content == "1" + "0" * 400
    assert example.notes == ("a number read as text",)
    assert chat({"messages": [HELLO, HI]}).notes == ()


def test_columns_are_renamed_before_they_are_read() -> None:
    row_format = read({"q": "", "a": "", "answer": ""}, q="question", a="answer")
    values = {"q": "2 + 2 = ", "a": "4", "answer": "an older one", "system": "be brief"}
    assert to_example(values, row_format, has_template=False) == PlainExample("be brief\n\n2 + 2 = \n\n4", ((20, 21),))
    # A row without the column doesn't fall back on the one that was replaced.
    with pytest.raises(RowError, match="column `answer` is missing"):
        to_example({"q": "2 + 2 = ", "answer": "an older one"}, row_format, has_template=False)


def test_two_columns_can_change_places() -> None:
    values = {"question": "4", "answer": "2 + 2 = "}
    row_format = read(values, question="answer", answer="question")
    assert to_example(values, row_format, has_template=False) == PlainExample("2 + 2 = \n\n4", ((10, 11),))


def test_a_format_survives_a_journey_to_another_process() -> None:
    options = RowOptions("all", {"q": "question"}, "{{ question }}")
    row_format = pickle.loads(pickle.dumps(find_format(["q"], "a.jsonl", options)))
    assert to_example({"q": "why?"}, row_format, has_template=False) == PlainExample("why?", ((0, 4),))
    error = pickle.loads(pickle.dumps(FatalRowError("a reason", "a hint")))
    assert (error.reason, error.hint) == ("a reason", "a hint")


BAD_ROWS: list[tuple[Shape, dict[str, Any], str]] = [
    ("text", {}, "column `text` is missing"),
    ("text", {"text": None}, "column `text` is null, not a string"),
    ("text", {"text": False}, "column `text` is a boolean, not a string"),
    ("text", {"text": math.nan}, "column `text` is NaN, not a string"),
    ("text", {"text": math.inf}, "column `text` is infinite, not a string"),
    ("text", {"text": ["a"]}, "column `text` is a list, not a string"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", {"text": "a\ud83d"}, "column `text` holds half of a surrogate pair at character 2"),
    ("prompt/completion", {"prompt": "a"}, "column `completion` is missing"),
    ("prompt/completion", {"prompt": "a", "completion": None}, "column `completion` is null, not a string"),
    ("prompt/completion", {"prompt": {}, "completion": "b"}, "column `prompt` is an object, not a string"),
    ("prompt/completion", {"prompt": "a", "completion": ""}, "completion is empty"),
    ("question/answer", {"question": "a", "answer": "\t"}, "answer is empty"),
    ("question/answer", {"question": [HELLO], "answer": "b"}, "column `question` is a list, not a string"),
    ("question/answer", {"question": "a", "answer": [HI]}, "column `answer` is a list, not a string"),
    (
        "prompt/completion",
        {"prompt": "a", "completion": "b", "system": True},
        "column `system` is a boolean, not a string",
    ),
    ("prompt/completion", {"prompt": "a", "completion": [HELLO]}, "no assistant turn"),
    ("prompt/completion", {"prompt": [SYSTEM], "completion": "b", "system": "x"}, "has both a `system` column"),
    ("instruction/output", {"instruction": "a", "output": ""}, "output is empty"),
    ("instruction/output", {"instruction": "a", "output": "b", "input": []}, "column `input` is a list, not a string"),
    ("messages", {"messages": "hello"}, "column `messages` is a string, not a list of messages"),
    ("messages", {"messages": []}, "no assistant turn"),
    ("messages", {"messages": [SYSTEM, HELLO]}, "no assistant turn"),
    ("conversations", {"conversations": {"a": 1}}, "column `conversations` is an object, not a list of messages"),
]


@pytest.mark.parametrize(("shape", "values", "reason"), BAD_ROWS)
def test_bad_rows(shape: Shape, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_example(values, RowFormat(shape, RowOptions()), has_template=True)
    assert caught.value.reason.startswith(reason)
    assert not isinstance(caught.value, FatalRowError)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [HELLO, HI]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [HELLO], "completion": "hi"},
        {"prompt": "hello", "completion": [HI]},
        {"prompt": "hello", "completion": "hi", "tools": [{"name": "open"}]},
    ],
)
def test_conversations_need_a_chat_template(values: dict[str, Any]) -> None:
    with pytest.raises(FatalRowError, match="no chat template") as caught:
        to_example(values, read(values), has_template=False)
    assert "SFT_MODEL__CHAT_TEMPLATE" in caught.value.hint


def test_a_turn_of_weight_0_is_not_learned() -> None:
    quiet = {**HI, "weight": 0}
    example = chat({"messages": [HELLO, quiet, MORE, {**SURE, "weight": 1}]})
    assert [message.supervised for message in example.messages] == [False, False, False, True]
