"""Prompts to be answered: from settings, files and held-out rows, written as the rows are; and what is refused, with
its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data import Encoders, RowFormat, RowOptions, SourceFile, TokenizedData, load_tokenizer, tokenize_files
from job.errors import ConfigError, DataError, NotFoundError
from job.manifest import hash_file
from job.prompts import GivenPrompt, choose_samples, fetch_prompts
from job.settings_groups import EvalSettings

CHAT = RowFormat("prompt/completion", RowOptions())
ROWS = [
    {"prompt": "question one", "completion": "answer one"},
    {"prompt": "question one", "completion": "another answer"},
    {"prompt": "question two", "completion": "answer two"},
]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def tokenize(tokenizer: Any, tmp_path: Path) -> Callable[[list[dict[str, Any]]], TokenizedData]:
    def make(rows: list[dict[str, Any]]) -> TokenizedData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceFile(path, path.name, hash_file(path))
        folder = tmp_path / "tokens"
        options, encoders = RowOptions(), Encoders(1)
        return tokenize_files([source], tokenizer, options, folder=folder, encoders=encoders, report=lambda *_: None)

    return make


def whole_rows(data: TokenizedData) -> Any:
    lengths = data.lengths_tokens.astype(np.int64)
    return np.column_stack([np.arange(len(lengths)), np.zeros_like(lengths), lengths])


def choose(
    given: list[Any],
    tokenizer: Any,
    data: TokenizedData,
    *,
    row_format: RowFormat = CHAT,
    context_tokens: int = 2048,
    segments: Any = None,
    **settings: Any,
) -> Any:
    return choose_samples(
        EvalSettings(**settings),
        [GivenPrompt(f"SFT_EVAL__PROMPTS[{index}]", one, True) for index, one in enumerate(given)],
        tokenizer,
        data.path.parent,
        row_format=row_format,
        held_out=data,
        segments=whole_rows(data) if segments is None else segments,
        context_tokens=context_tokens,
    )


def test_given_prompts_are_written_as_the_rows_are(tokenizer: Any, tokenize: Any) -> None:
    data = tokenize(ROWS)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And you?"}]
    answered = [*messages, {"role": "assistant", "content": "I am."}]
    found = choose(["Who?", messages, answered], tokenizer, data, max_new_tokens=9)
    assert found.max_new_tokens == 9
    assert found.stop_ids == [tokenizer.eos_token_id]
    first, second, third = found.prompts
    assert first.text == f"{SYSTEM}<|im_start|>user\nWho?{END}"
    assert first.messages == [{"role": "user", "content": "Who?"}]
    assert tokenizer.decode(first.ids) == first.text
    assert second.text == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnd you?{END}"
    assert (second.reference, third.reference) == (None, "I am.")
    assert third.ids == second.ids

    template = RowFormat("template", RowOptions(template="Q: {{ q }} A:"))
    [plain] = choose(["Q: who? A:"], tokenizer, data, row_format=template).prompts
    assert (plain.text, plain.messages) == ("Q: who? A:", None)
    assert tokenizer.decode(plain.ids) == "Q: who? A:"
    tokenizer.chat_template = None
    instruct = RowFormat("instruction/output", RowOptions())
    [bare] = choose(["Who?"], tokenizer, data, row_format=instruct).prompts
    assert bare.text == "Who?\n\n"  # as `job.data.shaping.shapes` writes such a row


def test_held_out_rows_are_asked_once_each(tokenizer: Any, tokenize: Any) -> None:
    data = tokenize([*ROWS, {"prompt": "long " * 300, "completion": "too long"}])
    found = choose([], tokenizer, data, context_tokens=256)
    assert [prompt.messages for prompt in found.prompts] == [
        [{"role": "user", "content": "question one"}],
        [{"role": "user", "content": "question two"}],
    ]
    assert [prompt.reference for prompt in found.prompts] == ["answer one", "answer two"]
    assert found.prompts[0].text == f"{SYSTEM}<|im_start|>user\nquestion one{END}"
    assert found.prompts[0].ids == tokenizer(found.prompts[0].text)["input_ids"]
    assert len(choose([], tokenizer, data, samples=1).prompts) == 1
    assert choose([], tokenizer, data, samples=0) is None
    assert choose([], tokenizer, data, segments=np.zeros((0, 3), dtype=np.int64)) is None
    later = whole_rows(data) + np.array([0, 5, 0])  # parts of rows that were split
    assert choose([], tokenizer, data, segments=later) is None


def test_other_shapes_of_held_out_rows(tokenizer: Any, tokenize: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ]
    [chat] = choose([], tokenizer, tokenize([{"messages": turns}])).prompts
    assert chat.text.endswith(f"one?{END}")
    assert (chat.messages, chat.reference) == (None, "first")  # whose system prompt is another
    text = "It was a dark and stormy night, and the rain fell in torrents."
    [plain] = choose([], tokenizer, tokenize([{"text": text}])).prompts
    assert plain.reference
    assert len(plain.ids) > 3
    assert text.startswith(plain.text)
    assert text.endswith(plain.reference)


def test_what_cannot_be_asked(tokenizer: Any, tokenize: Any) -> None:
    data = tokenize(ROWS)
    with pytest.raises(ConfigError, match=r"SFT_EVAL__PROMPTS\[1\]: .* are more than the base model's context of 64"):
        choose(["short", "long " * 60], tokenizer, data, context_tokens=64, max_new_tokens=8)
    with pytest.raises(ConfigError, match=r"SFT_EVAL__PROMPTS\[0\]: messages\[0\] has the role 'boss'"):
        choose([[{"role": "boss", "content": "x"}]], tokenizer, data)
    tokenizer.chat_template = "{% if messages %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(ConfigError, match=r"SFT_EVAL__PROMPTS\[0\]: the chat template refuses it: no"):
        choose(["x"], tokenizer, data)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"SFT_EVAL__PROMPTS\[0\]: a list of messages, and"):
        choose([[{"role": "user", "content": "x"}]], tokenizer, data)
    refused = GivenPrompt("p.txt:3", "x", is_setting=False).refuse("no", "hint")
    assert isinstance(refused, DataError)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffWho?\r\n\n  你是誰 \n", encoding="utf-8")
    assert [(one.where, one.content) for one in fetch_prompts(str(path), tmp_path / "here")] == [
        (f"{path}:1", "Who?"),
        (f"{path}:3", "你是誰"),
    ]
    lines = tmp_path / "prompts.jsonl"
    message = {"role": "user", "content": "x"}
    written: list[Any] = ["a", [message], {"prompt": "b"}, {"messages": [message]}]
    lines.write_text("".join(json.dumps(one) + "\n" for one in written))
    contents = [one.content for one in fetch_prompts(str(lines), tmp_path / "there")]
    assert contents == ["a", [message], "b", [message]]
    for bad in ('{"question": "x"}', "7", '""', "[]", "{"):
        lines.write_text(f'"fine"\n{bad}\n')
        with pytest.raises(DataError, match=r"prompts.jsonl:2: not "):
            fetch_prompts(str(lines), tmp_path / "there")
    lines.write_text("\n")
    with pytest.raises(DataError, match="there is no prompt in it"):
        fetch_prompts(str(lines), tmp_path / "there")
    with pytest.raises(NotFoundError, match="SFT_EVAL__PROMPTS="):
        fetch_prompts(str(tmp_path / "missing.txt"), tmp_path / "nowhere")
    assert fetch_prompts(None, tmp_path) == []
    assert [one.where for one in fetch_prompts(["a", "b"], tmp_path)] == [
        "SFT_EVAL__PROMPTS[0]",
        "SFT_EVAL__PROMPTS[1]",
    ]
