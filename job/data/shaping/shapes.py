"""Rows -> examples: which columns hold the text, and which of it the loss is taken on.

Rows have one of the shapes in `formats`: `text`; a question and an answer under many names; `messages` or ShareGPT
`conversations`; or whatever the user's template makes of their columns (`row_template`). A `system` column gives the
system prompt, and a `tools` column the tools of a conversation. What comes out is either plain text or a conversation;
`job.data.encoding` turns both into tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from job.data.shaping.cells import describe_type, take, take_answer, take_optional_text, take_text, take_tools
from job.data.shaping.conversations import to_messages
from job.data.shaping.examples import (
    ChatExample,
    Example,
    FatalRowError,
    LossOn,
    Message,
    PlainExample,
    RowError,
    RowOptions,
)
from job.data.shaping.formats import COLUMNS, RowFormat, Shape, check_options, find_format, load_template, rename

__all__ = [
    "ChatExample",
    "Example",
    "FatalRowError",
    "LossOn",
    "Message",
    "PlainExample",
    "RowError",
    "RowFormat",
    "RowOptions",
    "Shape",
    "check_options",
    "end_plain_prompt",
    "find_format",
    "to_example",
]


def to_example(values: Mapping[str, Any], row_format: RowFormat, *, has_template: bool) -> Example:
    """Turn one row into an example; `has_template` says whether the tokenizer has a chat template.

    `loss_on`: `completion` is the completion, or the last assistant turn of a conversation; `assistant` is every
    assistant turn; `all` is every token; `auto` is everything in a text, the completion of a prompt, and every
    assistant turn of a conversation. Raises RowError, or FatalRowError for a conversation without a chat template.
    """
    shape, options = row_format.shape, row_format.options
    values = rename(values, options.columns) if options.columns else values
    if options.template is not None:
        return load_template(options.template).to_example(values, options.loss_on)
    notes: list[str] = []
    if shape == "text":
        text = take_answer(values, "text", notes)
        return PlainExample(text, ((0, len(text)),), _unique(notes))
    prompt, completion = _take_turns(values, shape, notes)
    system = take_optional_text(values, "system", notes)
    tools = take_tools(values) if "tools" in COLUMNS[shape].optional else ()
    if not has_template:
        if isinstance(prompt, str) and isinstance(completion, str) and not tools:
            return _make_plain(system, prompt, completion, shape, options.loss_on, _unique(notes))
        raise FatalRowError(
            "holds a conversation, but the base model's tokenizer has no chat template",
            hint="use an instruct model, set SFT_MODEL__CHAT_TEMPLATE, or give prompt and completion columns that "
            "hold strings",
        )
    messages, first_answered = _join_turns(system, prompt, completion)
    return ChatExample(
        _supervise(messages, first_answered, options.loss_on),
        supervise_all=options.loss_on == "all",
        tools=tools,
        notes=_unique(notes),
    )


def _take_turns(
    values: Mapping[str, Any], shape: Shape, notes: list[str]
) -> tuple[str | list[Message], str | list[Message]]:
    """Return what is asked and what is answered: text or turns each."""
    columns = COLUMNS[shape].required
    if len(columns) == 1:
        return [], _take_messages(values, columns[0], notes)
    question, answer = columns
    if shape == "prompt/completion":
        return _take_prompt(values, question, notes), _take_completion(values, answer, notes)
    prompt = take_text(values, question, notes)
    if question == "instruction" and (given := take_optional_text(values, "input", notes)):
        prompt = f"{prompt}\n\n{given}"
    return prompt, take_answer(values, answer, notes)


def _take_prompt(values: Mapping[str, Any], column: str, notes: list[str]) -> str | list[Message]:
    value = take(values, column)
    return to_messages(value, column, notes) if isinstance(value, list) else take_text(values, column, notes)


def _take_completion(values: Mapping[str, Any], column: str, notes: list[str]) -> str | list[Message]:
    value = take(values, column)
    return to_messages(value, column, notes) if isinstance(value, list) else take_answer(values, column, notes)


def _take_messages(values: Mapping[str, Any], column: str, notes: list[str]) -> list[Message]:
    value = take(values, column)
    if not isinstance(value, list):
        raise RowError(f"column `{column}` is {describe_type(value)}, not a list of messages")
    return to_messages(value, column, notes)


def _make_plain(
    system: str, prompt: str, completion: str, shape: Shape, loss_on: LossOn, notes: tuple[str, ...]
) -> PlainExample:
    prompt = end_plain_prompt(prompt, shape)
    if system:
        prompt = f"{system}\n\n{prompt}"
    text = prompt + completion
    return PlainExample(text, ((0 if loss_on == "all" else len(prompt), len(text)),), notes)


def end_plain_prompt(prompt: str, shape: Shape) -> str:
    """Return a prompt as it stands before an answer in plain text, without a chat template."""
    as_it_is = shape in ("text", "template") or shape.startswith("prompt/")  # it ends as its author wants it to
    return prompt if as_it_is else prompt + "\n\n"


def _join_turns(system: str, prompt: str | list[Message], completion: str | list[Message]) -> tuple[list[Message], int]:
    """Return the turns of a conversation, and the index of the first that belongs to the completion."""
    asked = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    answered = [Message("assistant", completion)] if isinstance(completion, str) else completion
    if not any(message.role == "assistant" for message in answered):
        raise RowError("no assistant turn")
    messages = [*asked, *answered]
    if system:
        if messages[0].role == "system":
            raise RowError("has both a `system` column and a system message")
        messages.insert(0, Message("system", system))
    return messages, len(messages) - len(answered)


def _supervise(messages: list[Message], first_answered: int, loss_on: LossOn) -> tuple[Message, ...]:
    """Mark the assistant turns that the loss is taken on; one of weight 0 (OpenAI's format) never is."""
    answers = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and message.extra.get("weight", 1) != 0
    ]
    if loss_on == "auto":
        answers = [index for index in answers if index >= first_answered]
    elif loss_on == "completion":
        answers = answers[-1:]
    for index in answers:
        messages[index] = replace(messages[index], supervised=True)
    return tuple(messages)


def _unique(notes: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))
