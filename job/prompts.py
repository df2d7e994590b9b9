"""The prompts that base model and adapter answer: those that the user gives, or some of the held-out rows'.

They become token ids here, before training, by the same chat template as the rows: one that can't be used is reported
when it is cheap.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data import NOT_SUPERVISED, Integers, RowFormat, TokenizedData
from job.data.encoding.render import Renderer, make_renderer
from job.data.encoding.tokens import encode_prompt
from job.data.reading.lines import read_document
from job.data.shaping.conversations import to_messages
from job.data.shaping.shapes import Message, RowError, end_plain_prompt
from job.data.turn_end import find_stop_ids
from job.downloads import Downloads
from job.errors import ConfigError, DataError, JobError
from job.handover import PromptInput, SampleInputs
from job.settings_groups import EvalSettings
from job.storage import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTING = "SFT_EVAL__PROMPTS"
_MAX_FILE_BYTES = 16 << 20
_PLAIN_PROMPT_TOKENS = 64  # of a row that is all answer
_ROWS_LOOKED_AT = 100  # for each prompt that is wanted
_FORMS = 'a text, a list of messages, or an object that has one of them as "prompt" or "messages"'


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt of the user's, and where it stands: "SFT_EVAL__PROMPTS[0]", or file and line."""

    where: str
    content: str | list[dict[str, Any]]
    is_setting: bool

    def refuse(self, reason: str, hint: str) -> JobError:
        """Return the error for it: a setting is wrong, or a file."""
        kind = ConfigError if self.is_setting else DataError
        return kind(f"{self.where}: {reason}", hint=hint)


def fetch_prompts(prompts: str | list[str | list[dict[str, Any]]] | None, folder: Path) -> list[GivenPrompt]:
    """Return the prompts that SFT_EVAL__PROMPTS lists, or those of the file that it names.

    Raises DataError for a file that holds something else, and the stores' errors.
    """
    if prompts is None:
        return []
    if isinstance(prompts, list):
        return [GivenPrompt(f"{_SETTING}[{index}]", prompt, True) for index, prompt in enumerate(prompts)]
    store = open_store(prompts, setting=_SETTING)
    files = store.find()
    fetched = Downloads(folder, store, files).fetch(files, "prompts")
    given = [prompt for file in fetched for prompt in _read_lines(file.path, file.source.uri)]
    if not given:
        raise DataError(f"{_SETTING}={prompts}: there is no prompt in it", hint="write one prompt a line")
    return given


def _read_lines(path: Path, name: str) -> Iterator[GivenPrompt]:
    for number, line in enumerate(read_document(path, name, None, _MAX_FILE_BYTES).split("\n"), start=1):
        if text := line.strip():
            where = f"{name}:{number}"
            content = _parse_line(text, where) if name.endswith(".jsonl") else text
            yield GivenPrompt(where, content, is_setting=False)


def _parse_line(text: str, where: str) -> str | list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}", hint=f"a line is {_FORMS}") from error
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    is_text = isinstance(value, str) and bool(value.strip())
    if is_text or (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        prompt: str | list[dict[str, Any]] = value
        return prompt
    raise DataError(f"{where}: not a prompt", hint=f"a line is {_FORMS}")


def choose_samples(
    settings: EvalSettings,
    given: list[GivenPrompt],
    tokenizer: "PreTrainedTokenizerBase",
    model_folder: Path,
    *,
    row_format: RowFormat | None,
    held_out: TokenizedData,
    segments: Integers,
    context_tokens: int,
) -> SampleInputs | None:
    """Return what is to be answered before and after, None where nothing is: the given prompts, written as the rows of
    `row_format` are, or those of the first held-out `segments` (M, 3).

    Raises ConfigError or DataError for a given prompt that the chat template refuses, or that leaves no room for an
    answer in the model's context.
    """
    prompts = _Prompts(tokenizer, row_format, room_tokens=context_tokens - settings.max_new_tokens)
    if given:
        chosen = [prompts.encode(prompt, settings.max_new_tokens) for prompt in given]
    else:
        chosen = prompts.take(held_out, segments, settings.samples)
    if not chosen:
        return None
    stop_ids = find_stop_ids(tokenizer, model_folder)
    return SampleInputs(prompts=chosen, stop_ids=stop_ids, max_new_tokens=settings.max_new_tokens)


class _Prompts:
    """Makes prompts with one tokenizer. `row_format` is that of the rows, `room_tokens` the longest prompt."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", row_format: RowFormat | None, *, room_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._shape = "text" if row_format is None else row_format.shape
        self._room_tokens = room_tokens
        self._renderer = make_renderer(tokenizer)

    def encode(self, given: GivenPrompt, max_new_tokens: int) -> PromptInput:
        """Return a given prompt as the model sees it."""
        content = given.content
        if isinstance(content, str) and (self._renderer is None or self._shape in ("text", "template")):
            text = end_plain_prompt(content, self._shape)
            prompt = PromptInput(ids=self._to_ids(text, is_plain=True), text=text, messages=None, reference=None)
        else:
            prompt = self._encode_chat(given)
        if len(prompt.ids) > self._room_tokens:
            raise given.refuse(
                f"{len(prompt.ids):,} tokens, and SFT_EVAL__MAX_NEW_TOKENS={max_new_tokens} for the answer, are more "
                f"than the base model's context of {self._room_tokens + max_new_tokens:,}",
                hint="shorten the prompt, or lower SFT_EVAL__MAX_NEW_TOKENS",
            )
        return prompt

    def _encode_chat(self, given: GivenPrompt) -> PromptInput:
        if self._renderer is None:
            raise given.refuse(
                "a list of messages, and the base model's tokenizer has no chat template",
                hint="give texts, set SFT_MODEL__CHAT_TEMPLATE, or use an instruct model",
            )
        content = given.content
        try:
            turns = [Message("user", content)] if isinstance(content, str) else to_messages(content, "messages", [])
            reference = turns.pop().content if len(turns) > 1 and turns[-1].role == "assistant" else None
            messages = [{"role": turn.role, "content": turn.content, **turn.extra} for turn in turns]
            text = self._renderer.write(messages, add_generation_prompt=True)
        except RowError as error:
            raise given.refuse(error.reason, hint="write it as a conversation that ends in the user's turn") from error
        return PromptInput(ids=self._to_ids(text, is_plain=False), text=text, messages=messages, reference=reference)

    def _to_ids(self, text: str, *, is_plain: bool) -> list[int]:
        return encode_prompt(text, self._tokenizer, is_plain=is_plain)

    def take(self, data: TokenizedData, segments: Integers, wanted: int) -> list[PromptInput]:
        """Return the prompts of the first rows, those left out that are too long or were there before."""
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(data.path))).read_all()
        frame = _learn_frame(self._renderer)
        found: dict[tuple[int, ...], PromptInput] = {}
        for row, start, stop in segments[: _ROWS_LOOKED_AT * wanted].tolist():
            if len(found) == wanted:
                break
            if start > 0:  # the middle of a row that was split
                continue
            ids, labels = (table[name][row].values.to_numpy()[:stop] for name in ("input_ids", "labels"))
            first, end = _find_answer(labels)
            if 0 < first <= self._room_tokens:
                prompt = self._decode(ids[:first].tolist(), ids[first:end].tolist(), frame)
                found.setdefault(tuple(prompt.ids), prompt)
        return list(found.values())

    def _decode(self, ids: list[int], answer: list[int], frame: tuple[str, str] | None) -> PromptInput:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        reference = self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        messages = None
        if frame is not None and text.startswith(frame[0]) and text.endswith(frame[1]):
            question = text[len(frame[0]) : len(text) - len(frame[1])]
            messages = [{"role": "user", "content": question}]
            is_same = self._renderer is not None and self._renderer.write(messages, add_generation_prompt=True) == text
            messages = messages if is_same else None
        return PromptInput(ids=ids, text=text, messages=messages, reference=reference.strip())


def _find_answer(labels: "Integers") -> tuple[int, int]:
    """Return where the first answer of a row begins and ends, given its labels (T,); a part of a row that is all
    answer counts as its prompt."""
    import numpy as np

    supervised = labels != NOT_SUPERVISED
    supervised[0] = False  # never predicted
    if not supervised.any():
        return 0, 0
    first = int(supervised.argmax())
    rest = np.flatnonzero(~supervised[first:])
    end = first + int(rest[0]) if len(rest) else len(labels)
    return (min(_PLAIN_PROMPT_TOKENS, end // 2), end) if first == 1 else (first, end)


def _learn_frame(renderer: Renderer | None) -> tuple[str, str] | None:
    """Return what the chat template writes before and behind a single question, to tell the question by it."""
    if renderer is None:
        return None
    probe = "What is this?"
    try:
        text = renderer.write([{"role": "user", "content": probe}], add_generation_prompt=True)
    except RowError:
        return None
    before, found, behind = text.partition(probe)
    return (before, behind) if found else None
