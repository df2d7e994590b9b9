"""Rows -> examples: which columns hold the text, and which of it the loss is taken on.

Four shapes of rows are read: `text`; `prompt` and `completion` (strings or lists of messages); `messages`;
`instruction` and `output` with an optional `input`. A `system` column gives the system prompt of the last three. Other
columns are ignored. What comes out is either plain text or a conversation; `job.data.tokens` turns both into tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from job.data.files import json_type
from job.errors import ConfigError, DataError

LossOn = Literal["auto", "completion", "assistant", "all"]
Shape = Literal["text", "prompt/completion", "messages", "instruction/output"]

COLUMNS: dict[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction/output": ("instruction", "output"),
}
ROLES = ("system", "user", "assistant", "developer", "tool")


class RowError(Exception):
    """One row can't be used; `reason` says why, without the row's place."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FatalRowError(RowError):
    """One row can't be used, and neither can any other of its kind: the fault is the model's, not the row's."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class PlainExample:
    """Text for a model without chat: the loss is taken from character `supervised_from` to the end, EOS included."""

    text: str
    supervised_from: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` holds what a template may also want to see: `tool_calls`, `name`, `reasoning_content` ..."""

    role: str
    content: str
    supervised: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation: the loss is taken on the supervised turns, or on every token of it."""

    messages: tuple[Message, ...]
    supervise_all: bool = False


Example = PlainExample | ChatExample


def find_shape(columns: Iterable[str], name: str) -> Shape:
    """Return the one shape whose columns are all there. Raises DataError if none fits, or more than one."""
    found = set(columns)
    fitting = [shape for shape, wanted in COLUMNS.items() if found.issuperset(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    accepted = "; ".join(" and ".join(f"`{column}`" for column in wanted) for wanted in COLUMNS.values())
    if fitting:
        raise DataError(
            f"{name}: the columns fit more than one shape: {', '.join(fitting)}",
            hint=f"keep the columns of one shape and rename or drop the others. Shapes: {accepted}",
        )
    there = ", ".join(f"`{column}`" for column in sorted(found)) or "none"
    raise DataError(
        f"{name}: no known shape has the columns found: {there}", hint=f"rename the columns to one of: {accepted}"
    )


def check_loss_on(shape: Shape, loss_on: LossOn, name: str) -> None:
    """Raise ConfigError when `loss_on` asks for answers in rows that have none."""
    if shape == "text" and loss_on in ("completion", "assistant"):
        raise ConfigError(
            f"SFT_DATA__LOSS_ON={loss_on}: the rows of {name} are plain text, without an answer in them",
            hint="use auto or all, or give prompt and completion columns",
        )


def to_example(values: Mapping[str, Any], shape: Shape, loss_on: LossOn, *, has_template: bool) -> Example:
    """Turn one row into an example; `has_template` says whether the tokenizer has a chat template.

    `loss_on`: `completion` is the completion, or the last assistant turn of a conversation; `assistant` is every
    assistant turn; `all` is every token; `auto` is everything in a text, the completion of a prompt, and every
    assistant turn of a conversation. Raises RowError, or FatalRowError for a conversation without a template.
    """
    if shape == "text":
        return PlainExample(_take_text(values, "text", blank_allowed=False), 0)
    if shape == "instruction/output":
        prompt: Any = _join_instruction(values)
        completion: Any = _take_text(values, "output", blank_allowed=False)
    elif shape == "prompt/completion":
        prompt, completion = _take_prompt(values, "prompt"), _take_prompt(values, "completion")
    else:
        prompt, completion = [], _take(values, "messages", list)
    if isinstance(prompt, str) and isinstance(completion, str) and not has_template:
        return _make_plain(_take_system(values), prompt, completion, shape, loss_on)
    if not has_template:
        raise FatalRowError(
            "holds a conversation, but the base model's tokenizer has no chat template",
            hint="use an instruct model, or give prompt and completion columns that hold strings",
        )
    return _make_chat(_take_system(values), prompt, completion, loss_on)


def _make_plain(system: str, prompt: str, completion: str, shape: Shape, loss_on: LossOn) -> PlainExample:
    _check_answer(completion, "completion")
    if shape == "instruction/output":
        prompt += "\n\n"
    if system:
        prompt = f"{system}\n\n{prompt}"
    return PlainExample(prompt + completion, 0 if loss_on == "all" else len(prompt))


def _make_chat(system: str, prompt: Any, completion: Any, loss_on: LossOn) -> ChatExample:
    asked = _to_messages(prompt, "user", "prompt")
    answered = _to_messages(completion, "assistant", "completion" if asked else "messages")
    messages = [*asked, *answered]
    if system and messages and messages[0].role == "system":
        raise RowError("has both a `system` column and a system message")
    if system:
        messages.insert(0, Message("system", system))
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not any(message.role == "assistant" for message in answered):
        raise RowError("no assistant turn")
    first_answered = len(messages) - len(answered)
    if loss_on == "auto":
        answers = [index for index in answers if index >= first_answered]
    elif loss_on == "completion":
        answers = answers[-1:]
    chosen = frozenset(answers)
    supervised = tuple(
        Message(message.role, message.content, index in chosen, message.extra) for index, message in enumerate(messages)
    )
    return ChatExample(supervised, supervise_all=loss_on == "all")


def _to_messages(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, str):
        if role == "assistant":
            _check_answer(value, where)
        return [Message(role, value)]
    return [_to_message(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _to_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where} is a {json_type(item)}, not an object with role and content")
    role = item.get("role")
    if role not in ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else json_type(role)
        raise RowError(f"{where} has the role {shown}; known are {', '.join(ROLES)}")
    # Arrow gives every message every key, null where it has none.
    extra = {key: value for key, value in item.items() if key not in ("role", "content") and value is not None}
    calls_tools = role == "assistant" and bool(extra.get("tool_calls"))
    content = _join_parts(item.get("content"), where, null_allowed=calls_tools)
    if role == "assistant" and not calls_tools:
        _check_answer(content, f"{where} (assistant)")
    return Message(role, content, extra=extra)


def _join_parts(content: Any, where: str, *, null_allowed: bool) -> str:
    """Content is a string, or a list of `{"type": "text", "text": ...}` parts, which are joined."""
    if isinstance(content, str):
        return _check_unicode(content, where)
    if content is None and null_allowed:
        return ""
    if not isinstance(content, list):
        raise RowError(f"{where} has a {json_type(content)} as content, not a string")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"{where} has content that is not text")
    return _check_unicode("".join(text for text in texts if text), where)


def _join_instruction(values: Mapping[str, Any]) -> str:
    instruction = _take_text(values, "instruction", blank_allowed=True)
    given = "" if values.get("input") is None else _take_text(values, "input", blank_allowed=True)
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _take_system(values: Mapping[str, Any]) -> str:
    system = "" if values.get("system") is None else _take_text(values, "system", blank_allowed=True)
    return system if system.strip() else ""


def _take_prompt(values: Mapping[str, Any], column: str) -> Any:
    value = values.get(column)
    return _take(values, column, list) if isinstance(value, list) else _take_text(values, column, blank_allowed=True)


def _take_text(values: Mapping[str, Any], column: str, *, blank_allowed: bool) -> str:
    text: str = _take(values, column, str)
    if not blank_allowed:
        _check_answer(text, column)
    return _check_unicode(text, f"`{column}`")


def _take(values: Mapping[str, Any], column: str, wanted: type) -> Any:
    if column not in values:
        raise RowError(f"column `{column}` is missing")
    value = values[column]
    if not isinstance(value, wanted):
        kind = "a string" if wanted is str else "a list of messages"
        raise RowError(f"column `{column}` is {_with_article(json_type(value))}, not {kind}")
    return value


def _with_article(kind: str) -> str:
    if kind == "null":
        return kind
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _check_answer(text: str, where: str) -> None:
    if not text.strip():
        raise RowError(f"{where} is empty")


def _check_unicode(text: str, where: str) -> str:
    # "\\ud83d" alone is legal JSON, but no tokenizer can encode half a character.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half of a surrogate pair at character {error.start + 1}") from error
    return text
