"""Conversations -> text, and where in that text the supervised answers stand.

The places come from the chat template itself: from its `{% generation %}` marks where it has them, else from rendering
the conversation up to each answer (`frames` saves most of those renderings). Nothing is ever found by searching for a
marker, which a user's text may hold too. That the places are right is proven in `labels`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from job.data.encoding.frames import Frames, learn_frames
from job.data.shaping.shapes import ChatExample, FatalRowError, Message, RowError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One supervised answer: messages[index], written by the template at the half-open range [start, end)."""

    index: int
    message: Message
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it, with its supervised answers in order, or every character supervised."""

    text: str
    turns: tuple[Turn, ...]
    supervise_all: bool
    messages: int  # how many there are, supervised or not


def find_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the chat template that a conversation is rendered with, or None where the tokenizer has none."""
    # A tokenizer may have several by name, none of them the default one.
    if not tokenizer.chat_template or (
        isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template
    ):
        return None
    template: str = tokenizer.get_chat_template()
    return template


class Renderer:
    """One chat template with one tokenizer's special tokens (`bos_token` and so on, as the template names them)."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any]) -> None:
        self.template = template
        self.special_tokens = dict(special_tokens)
        self.is_marked = GENERATION_MARK.search(template) is not None

    @cached_property
    def _compiled(self) -> "Template":
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template: Template = _compile_jinja_template(self.template)
        return template

    @cached_property
    def _frames(self) -> Frames | None:
        return learn_frames(self.write)

    def render(self, example: ChatExample) -> Rendered:
        """Render a conversation and find its supervised answers.

        Raises RowError when the template refuses the conversation, and FatalRowError when the template does not keep
        earlier turns as they were, so that the answers have no place in the final text.
        """
        conversation = [{"role": turn.role, "content": turn.content, **turn.extra} for turn in example.messages]
        tools = list(example.tools) or None
        is_marked = self.is_marked and not example.supervise_all
        text, marked = self._call(conversation, tools, marks=is_marked)
        _check_rendered(example.messages, text)
        if tools:
            self._check_tools(conversation, tools, text)
        if example.supervise_all:
            return Rendered(text, (), supervise_all=True, messages=len(example.messages))
        spans = _match_marks(text, marked, example.messages) if is_marked else self._match_frames(text, example)
        supervised = [index for index, message in enumerate(example.messages) if message.supervised]
        turns = [
            Turn(
                index,
                example.messages[index],
                *(spans[index] if spans else self._locate(conversation, index, text, tools)),
            )
            for index in supervised
        ]
        return Rendered(text, tuple(turns), supervise_all=False, messages=len(example.messages))

    def write(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation, as apply_chat_template would. Raises RowError if the template refuses."""
        return self._call(conversation, tools, add_generation_prompt=add_generation_prompt)[0]

    def _match_frames(self, text: str, example: ChatExample) -> dict[int, tuple[int, int]] | None:
        if self._frames is None or example.tools:
            return None
        return self._frames.match(text, example.messages)

    def _locate(
        self, conversation: list[dict[str, Any]], index: int, text: str, tools: list[dict[str, Any]] | None
    ) -> tuple[int, int]:
        """Find turn `index` in `text`: what the template adds to the prompt that a model would answer with it."""
        asked = self.write(conversation[:index], tools, add_generation_prompt=True)
        is_last = index == len(conversation) - 1
        answered = text if is_last else self.write(conversation[: index + 1], tools)
        if not is_last and not text.startswith(answered):
            # Phi-3's own template puts EOS after every finished conversation: while turns follow, it is not there.
            answered = answered.removesuffix(self.special_tokens.get("eos_token", ""))
        if answered.startswith(asked) and text.startswith(answered):
            return len(asked), len(answered)
        if index == 0:
            raise RowError("begins with an assistant turn, and the chat template has no prompt for one")
        if not answered.startswith(asked):
            raise FatalRowError(
                f"messages[{index}]: the chat template does not write an answer after its own generation prompt, so "
                "the supervised text can't be located",
                hint="set SFT_MODEL__CHAT_TEMPLATE to a template that marks its answers with {% generation %}, as the "
                "shipped ones do",
            )
        raise FatalRowError(
            f"messages[{index}]: the chat template rewrites earlier turns when others follow, so the supervised text "
            "can't be located",
            hint="set SFT_DATA__LOSS_ON=completion (only the last answer is learned), or SFT_MODEL__CHAT_TEMPLATE to a "
            "template that keeps earlier turns or marks its answers with {% generation %}, as the shipped ones do",
        )

    def _check_tools(self, conversation: list[dict[str, Any]], tools: list[dict[str, Any]], text: str) -> None:
        # A call in the conversation may write the name as well, so the text must also differ for the tools.
        if all(_tool_name(tool) in text for tool in tools) and text != self.write(conversation):
            return
        raise RowError("the chat template does not render tools")

    def _call(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError

        # apply_chat_template calls this too, but gives the marks only as tokens of one row, and refuses an empty
        # list, which is what stands before a conversation that begins with an assistant turn.
        from transformers.utils.chat_template_utils import _render_with_assistant_indices, render_jinja_template

        try:
            if tools is None and all(len(turn) == 2 for turn in conversation):
                # Roles and contents, which are text: nothing of what render_jinja_template converts or renames before
                # it does this, and that takes longer than the template itself.
                if not marks:
                    return self._write_plain(conversation, add_generation_prompt=add_generation_prompt), []
                given = {"documents": None, "add_generation_prompt": add_generation_prompt, **self.special_tokens}
                marked: tuple[str, list[tuple[int, int]]] = _render_with_assistant_indices(
                    self._compiled, conversation, tools, **given
                )
                return marked
            texts, ranges = render_jinja_template(
                conversations=[conversation],
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        return texts[0], ranges[0] if ranges else []

    @cached_property
    def _names(self) -> dict[str, Any]:
        """What the template can name besides the conversation."""
        return {**self._compiled.globals, "documents": None, "tools": None, **self.special_tokens}

    def _write_plain(self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        # As Template.render, which collects the names anew for each conversation, and takes longer for it than for the
        # rest.
        names = {**self._names, "messages": conversation, "add_generation_prompt": add_generation_prompt}
        context = self._compiled.new_context(names, shared=True)
        return "".join(self._compiled.root_render_func(context))


def make_renderer(tokenizer: "PreTrainedTokenizerBase") -> Renderer | None:
    """Return the renderer of a tokenizer's own chat template, or None where it has none."""
    template = find_template(tokenizer)
    return None if template is None else Renderer(template, tokenizer.special_tokens_map)


def _match_marks(
    text: str, marked: Sequence[tuple[int, int]], messages: Sequence[Message]
) -> dict[int, tuple[int, int]] | None:
    """Return the marked range of every assistant turn by its index; None where the marks can't be believed.

    transformers counts the marked characters wrongly inside a macro or a `set` block, so a range must hold its turn:
    nothing but the content at its start, unless the message has more to write (reasoning, tool calls).
    """
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    # A turn may be marked in pieces (its reasoning and its answer) that touch.
    joined: list[tuple[int, int]] = []
    for start, end in marked:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    if len(joined) != len(turns):
        return None
    for index, (start, end) in zip(turns, joined, strict=True):
        written, content = text[start:end], messages[index].content.strip()
        if not (content in written if messages[index].extra else written.lstrip().startswith(content)):
            return None
    return dict(zip(turns, joined, strict=True))


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RowError(f"a tool has no function name: {json.dumps(tool, ensure_ascii=False)[:80]}")
    return name


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
