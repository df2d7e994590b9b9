"""Which columns make which shape, how a user settles it, and what is said when nothing fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.shaping.formats import COLUMNS, Shape, check_options, find_format, rename
from job.data.shaping.shapes import LossOn, RowOptions
from job.errors import ConfigError, DataError

MARKED = "Q: {{ question }} A: {% generation %}{{ answer }}{% endgeneration %}"


def find(columns: list[str], **renamed: str) -> Shape:
    return find_format(columns, "a.jsonl", RowOptions(columns=renamed)).shape


@pytest.mark.parametrize("shape", COLUMNS)
def test_every_shape_is_found_by_its_columns(shape: Shape) -> None:
    columns = COLUMNS[shape]
    assert find(list(columns.required)) == shape
    assert find([*columns.required, *columns.optional, "id", "source"]) == shape


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (["text", "label", "id"], "text"),
        (["messages", "prompt", "prompt_id"], "messages"),
        (["messages", "tools"], "messages"),
        # All four columns of the one are columns of the other.
        (["instruction", "input", "output"], "instruction/output"),
        (["instruction", "input", "output", "system"], "instruction/output"),
        (["instruction", "output", "prompt"], "instruction/output"),
        (["question", "answer", "context"], "question/answer"),
    ],
)
def test_find_format(columns: list[str], shape: Shape) -> None:
    assert find(columns) == shape


@pytest.mark.parametrize(
    ("columns", "shapes", "example"),
    [
        (["text", "messages"], "text (columns `text`); messages (columns `messages`)", '{"text": "text"}'),
        (
            ["question", "answer", "response"],
            "question/answer (columns `question` and `answer`); question/response (columns `question` and `response`)",
            '{"question": "question", "answer": "answer"}',
        ),
        (
            ["instruction", "input", "output", "text"],
            "text (columns `text`); instruction/output (columns `instruction` and `output`)",
            '{"text": "text"}',
        ),
    ],
)
def test_two_shapes_at_once_are_refused(columns: list[str], shapes: str, example: str) -> None:
    with pytest.raises(DataError) as caught:
        find(columns)
    assert caught.value.message == f"a.jsonl: the columns fit more than one shape: {shapes}"
    assert f"SFT_DATA__COLUMNS='{example}'" in caught.value.hint


def test_the_advice_on_two_shapes_works() -> None:
    columns = ["question", "answer", "response"]
    assert find(columns, question="question", answer="answer") == "question/answer"
    assert find(columns, question="question", response="response") == "question/response"
    assert find(["instruction", "input", "output"], input="input", output="output") == "input/output"
    # The advice names the columns of the file, not those that they are renamed to.
    with pytest.raises(DataError) as caught:
        find(["q", "answer", "response"], q="question")
    assert """SFT_DATA__COLUMNS='{"q": "question", "answer": "answer"}'""" in caught.value.hint
    assert find(["q", "answer", "response"], q="question", answer="answer") == "question/answer"


def test_renaming_both_shapes_settles_nothing() -> None:
    with pytest.raises(DataError, match=r"text \(columns `text`\); messages \(columns `messages`\)"):
        find(["text", "messages"], text="text", messages="messages")


def test_unknown_columns_are_named_with_what_is_accepted() -> None:
    with pytest.raises(DataError) as caught:
        find(["body", "title"])
    assert caught.value.message == "a.jsonl: no known shape has the columns found: `body`, `title`"
    for part in ("SFT_DATA__COLUMNS", "SFT_DATA__TEMPLATE", "`prompt` and `completion`", "`conversations`"):
        assert part in caught.value.hint
    assert "what you mean" not in caught.value.hint
    with pytest.raises(DataError, match="columns found: none"):
        find([])


@pytest.mark.parametrize(
    ("columns", "renaming"),
    [
        (["Question", "Answer"], '{"Question": "question", "Answer": "answer"}'),
        (["promt", "completion"], '{"promt": "prompt", "completion": "completion"}'),
        (["texts"], '{"texts": "text"}'),
    ],
)
def test_a_near_name_is_suggested(columns: list[str], renaming: str) -> None:
    with pytest.raises(DataError) as caught:
        find(columns)
    assert caught.value.hint.startswith(f"is SFT_DATA__COLUMNS='{renaming}' what you mean?")


def test_a_misspelt_target_is_corrected() -> None:
    with pytest.raises(DataError) as caught:
        find(["q", "a"], q="qestion", a="answer")
    assert caught.value.message == "a.jsonl: no known shape has the columns found: `answer`, `qestion`"
    assert caught.value.hint.startswith("""is SFT_DATA__COLUMNS='{"q": "question", "a": "answer"}' what you mean?""")


def test_a_renamed_column_must_be_there() -> None:
    with pytest.raises(DataError) as caught:
        find(["qestion", "answer"], question="prompt", answer="completion")
    assert caught.value.message == (
        "a.jsonl: SFT_DATA__COLUMNS renames `question`, but the columns are `answer`, `qestion`"
    )
    assert caught.value.hint == "did you mean `qestion`?"


def test_two_columns_cannot_become_one() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(RowOptions(columns={"a": "text", "b": "text"}))
    assert caught.value.message == (
        'SFT_DATA__COLUMNS={"a": "text", "b": "text"}: both `a` and `b` would become `text`'
    )
    with pytest.raises(ConfigError):
        find(["a", "b"], a="text", b="text")


@pytest.mark.parametrize(
    ("columns", "renamed", "described"),
    [
        (["text", "id"], {}, "text, from the column `text`"),
        (["review"], {"review": "text"}, "text, from the column `review` as `text`"),
        (
            ["q", "a"],
            {"q": "question", "a": "answer"},
            "question/answer, from the columns `q` as `question` and `a` as `answer`",
        ),
        (
            ["instruction", "context", "output", "system"],
            {"context": "input"},
            "instruction/output, from the columns `instruction`, `output`, `context` as `input` and `system`",
        ),
        (["messages", "tools"], {"messages": "messages"}, "messages, from the columns `messages` and `tools`"),
    ],
)
def test_a_format_describes_itself(columns: list[str], renamed: dict[str, str], described: str) -> None:
    assert find_format(columns, "a.jsonl", RowOptions(columns=renamed)).describe() == described


def test_a_template_is_a_format_of_its_own() -> None:
    # Whatever shapes fit.
    row_format = find_format(["text", "messages", "question", "a"], "a", RowOptions("auto", {"a": "answer"}, MARKED))
    assert row_format.shape == "template"
    assert row_format.describe() == "template, from the columns `a` as `answer` and `question`"


def test_the_fields_of_a_template_are_columns() -> None:
    with pytest.raises(DataError) as caught:
        find_format(["question", "anwser"], "a.jsonl", RowOptions(template=MARKED))
    assert caught.value.message == (
        "a.jsonl: SFT_DATA__TEMPLATE uses the field `answer`, but the columns are `anwser`, `question`"
    )
    assert caught.value.hint == "did you mean `anwser`?"
    # A column that was renamed is no longer there under its old name.
    with pytest.raises(DataError, match="uses the field `answer`"):
        find_format(["question", "answer"], "a", RowOptions("auto", {"answer": "reply"}, MARKED))


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_text_has_no_answers_to_take_the_loss_on(loss_on: LossOn) -> None:
    with pytest.raises(ConfigError, match=f"SFT_DATA__LOSS_ON={loss_on}: the rows of a.jsonl are plain text"):
        find_format(["text"], "a.jsonl", RowOptions(loss_on))
    assert find_format(["text"], "a.jsonl", RowOptions("all")).shape == "text"
    assert find_format(["messages"], "a.jsonl", RowOptions(loss_on)).shape == "messages"


names = st.text("abcd", min_size=1, max_size=2)


@given(st.dictionaries(names, st.integers()), st.dictionaries(names, names))
def test_renaming_keeps_the_other_columns(values: dict[str, int], columns: dict[str, str]) -> None:
    columns = {found: wanted for found, wanted in columns.items() if list(columns.values()).count(wanted) == 1}
    renamed = rename(values, columns)
    for found, wanted in columns.items():
        assert renamed.get(wanted) == values.get(found)
    for column in values.keys() - columns.keys() - set(columns.values()):
        assert renamed[column] == values[column]
    assert renamed.keys() <= values.keys() | set(columns.values())
