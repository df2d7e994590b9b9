"""Conversations -> text, and where in that text the supervised answers stand.

The places come from the chat template itself: from its `{% generation %}` marks where it has them, else from rendering
the conversation up to each answer. Nothing is ever found by searching for a marker, which a user's text may hold too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.data.shapes import ChatExample, FatalRowError, Message, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it, and the half-open character ranges that are supervised, in order."""

    text: str
    spans: list[tuple[int, int]]
    supervise_all: bool


def find_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the chat template that a conversation is rendered with, or None where the tokenizer has none."""
    # A tokenizer may have several by name, none of them the default one.
    if not tokenizer.chat_template or (
        isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template
    ):
        return None
    template: str = tokenizer.get_chat_template()
    return template


def render(example: ChatExample, tokenizer: "PreTrainedTokenizerBase", template: str) -> Rendered:
    """Render a conversation with `template` and find its supervised answers, in O(turns) renderings.

    Raises RowError when the template refuses the conversation, and FatalRowError when the template does not keep
    earlier turns as they were, so that the answers have no place in the final text.
    """
    conversation = [{"role": message.role, "content": message.content, **message.extra} for message in example.messages]
    supervised = [index for index, message in enumerate(example.messages) if message.supervised]
    spans = None
    if not example.supervise_all and GENERATION_MARK.search(template):
        text, marked = _render_marked(conversation, tokenizer, template)
        spans = _choose_marked(text, marked, example.messages, supervised)
    else:
        text = _apply(conversation, tokenizer, template)
    _check_rendered(example.messages, text)
    if example.supervise_all:
        spans = [(0, len(text))]
    if spans is None:
        spans = [_locate(conversation, index, text, tokenizer, template) for index in supervised]
    return Rendered(text, spans, example.supervise_all)


def _choose_marked(
    text: str, marked: list[tuple[int, int]], messages: Sequence[Message], supervised: list[int]
) -> list[tuple[int, int]] | None:
    """Of the ranges that the template marks, those of the supervised turns; None where they can't be told apart."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(marked) == len(answers):
        by_turn = dict(zip(answers, marked, strict=True))
        # transformers counts the marked characters wrongly inside a macro or a `set` block, so look at what is there.
        if all(messages[turn].content.strip()[-20:] in text[slice(*by_turn[turn])] for turn in answers):
            return [by_turn[turn] for turn in supervised]
        return None
    # A template may mark one turn in several pieces (its reasoning and its answer).
    return marked if supervised == answers else None


def _locate(
    conversation: list[dict[str, Any]], index: int, text: str, tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[int, int]:
    """Find turn `index` in `text`: what the template adds to the prompt that a model would answer with that turn."""
    asked = _apply(conversation[:index], tokenizer, template, add_generation_prompt=True)
    is_last = index == len(conversation) - 1
    answered = text if is_last else _apply(conversation[: index + 1], tokenizer, template)
    if not is_last and not text.startswith(answered):
        # Phi-3's template puts EOS after every finished conversation: while turns follow, it is not there.
        answered = answered.removesuffix(tokenizer.eos_token or "")
    if answered.startswith(asked) and text.startswith(answered):
        return len(asked), len(answered)
    if index == 0:
        raise RowError("begins with an assistant turn, and the chat template has no prompt for one")
    if not answered.startswith(asked):
        raise FatalRowError(
            f"messages[{index}]: the chat template does not write an answer after its own generation prompt, so the "
            "supervised text can't be located",
            hint="use a chat template that marks its answers with {% generation %}",
        )
    raise FatalRowError(
        f"messages[{index}]: the chat template rewrites earlier turns when others follow, so the supervised text "
        "can't be located",
        hint="set SFT_DATA__LOSS_ON=completion (only the last answer is learned), or use a chat template that keeps "
        "earlier turns or marks its answers with {% generation %}",
    )


def _apply(
    conversation: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    return _call_template(conversation, tokenizer, template, add_generation_prompt, marks=False)[0]


def _render_marked(
    conversation: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[str, list[tuple[int, int]]]:
    return _call_template(conversation, tokenizer, template, add_generation_prompt=False, marks=True)


def _call_template(
    conversation: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    add_generation_prompt: bool,
    *,
    marks: bool,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError

    # apply_chat_template calls this too, but gives the marks only as tokens of one row, and refuses an empty list,
    # which is what stands before a conversation that begins with an assistant turn.
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, ranges = render_jinja_template(
            conversations=[conversation],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise RowError(f"the chat template refuses it: {error}") from error
    return texts[0], ranges[0] if ranges else []


def _check_rendered(messages: Sequence[Message], text: str) -> None:
    """Raise RowError when the text can't be tokenised, or lacks a turn of an unusual role, dropped in silence."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Contents were checked before; what else a message holds, such as the arguments of a tool call, was not.
        raise RowError("the rendered conversation holds half of a surrogate pair") from error
    for message in messages:
        content = message.content.strip()
        if message.role in ("user", "assistant") or not content or content in text:
            continue
        # Some templates write what a tool returns as a JSON string.
        if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise RowError(f"the chat template does not render the role {message.role!r}")
