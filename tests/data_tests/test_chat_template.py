"""Chat templates: the shipped ones, files, clones, and what they change in a tokenizer."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job.data.encoding.chat_template import (
    SHIPPED_NAMES,
    ChatTemplate,
    apply_template,
    clone_template,
    find_end_of_turn,
    read_template_file,
    shipped_template,
)
from job.data.encoding.labels import NOT_SUPERVISED
from job.data.encoding.render import make_renderer
from job.data.encoding.tokens import encode, load_tokenizer
from job.data.shaping.shapes import ChatExample, Message, RowError
from job.errors import ConfigError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "find_order",
            "description": "Find an order.",
            "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
        },
    },
)
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "find_order", "arguments": {"number": 7}}}


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def make_tokenizer(more_words: Sequence[str] = (), **special_tokens: str) -> Any:
    """A tokenizer that knows a few words and these special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "hello", "there", *more_words, *special_tokens.values()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special_tokens)


def write(tokenizer: Any, *turns: tuple[str, str], **options: Any) -> str:
    renderer = make_renderer(tokenizer)
    assert renderer is not None
    return renderer.write([{"role": role, "content": content} for role, content in turns], **options)


def supervised_text(tokenizer: Any, example: ChatExample) -> str:
    _, labels = encode(example, tokenizer)
    text: str = tokenizer.decode([label for label in labels if label != NOT_SUPERVISED])
    return text


# -- shipped templates -------------------------------------------------------------------------------------------------

TURNS = (("system", " Be brief. "), ("user", " hi "), ("assistant", "\nhello "), ("user", "more"), ("assistant", "ok"))
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
    "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nok<|eot_id|>",
    "gemma": "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"
    "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\nok<end_of_turn>\n",
    "mistral": "[INST] Be brief.\n\nhi[/INST] hello</s>[INST] more[/INST] ok</s>",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nhello<|end|>\n<|user|>\nmore<|end|>\n"
    "<|assistant|>\nok<|end|>\n",
}
WRITTEN["qwen"] = WRITTEN["chatml"]


@pytest.mark.parametrize("name", SHIPPED_NAMES)
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_what_a_shipped_template_writes(name: str, bos: str) -> None:
    tokenizer = make_tokenizer(eos_token="</s>", **({"bos_token": bos} if bos else {}))
    applied = apply_template(tokenizer, shipped_template(name))
    expected = WRITTEN[name]
    # A model with a BOS of its own gets that one, where the format begins with one.
    assert write(tokenizer, *TURNS) == (bos if name in ("llama3", "gemma", "mistral") else "") + expected
    assert tokenizer.eos_token == applied.end_of_turn == find_end_of_turn(tokenizer)
    assert expected.rstrip().endswith(applied.end_of_turn or "?")
    assert applied.end_of_turn in tokenizer.all_special_tokens


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_prompt_is_how_a_conversation_with_its_answer_begins(tokenizer: Any, name: str) -> None:
    apply_template(tokenizer, shipped_template(name))
    for count in (1, 2, 4):
        if TURNS[count - 1][0] == "system":
            continue
        prompt = write(tokenizer, *TURNS[:count], add_generation_prompt=True)
        assert write(tokenizer, *TURNS).startswith(prompt) == (TURNS[count][0] == "assistant")


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_shipped_templates_are_read_as_files_too(tmp_path: Path, name: str) -> None:
    shipped = shipped_template(name)
    path = tmp_path / "mine.jinja"
    path.write_text(shipped.text)
    read = read_template_file(path, "mine.jinja")
    # Marks such as [TOOL_CALLS] look like words in brackets, which a prompt may hold.
    assert {token for token in shipped.special_tokens if "TOOL" not in token} == set(read.special_tokens)


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("gemma", [("user", "a"), ("user", "b")], "expected assistant, found user"),
        ("gemma", [("assistant", "a")], "expected user, found assistant"),
        ("gemma", [("user", "a"), ("system", "b")], "a system prompt comes first"),
        ("mistral", [("user", "a"), ("user", "b")], "expected assistant, found user"),
        ("mistral", [("user", "a"), ("tool", "b")], "expected assistant, found tool"),
        ("mistral", [("user", "a"), ("system", "b")], "a system prompt comes first"),
        ("phi", [("user", "a"), ("tool", "b")], "no role .tool."),
        ("chatml", [("critic", "a")], "no role .critic."),
        ("qwen", [("critic", "a")], "no role .critic."),
        ("llama3", [("critic", "a")], "no role .critic."),
    ],
)
def test_what_a_format_has_no_words_for_is_refused(
    tokenizer: Any, name: str, turns: list[tuple[str, str]], reason: str
) -> None:
    apply_template(tokenizer, shipped_template(name))
    with pytest.raises(RowError, match=f"the chat template refuses it: .*{reason}"):
        write(tokenizer, *turns)


# -- tools -------------------------------------------------------------------------------------------------------------


def with_tools(*calls: dict[str, Any], content: str = "") -> ChatExample:
    return ChatExample(
        (
            Message("system", "Be brief."),
            Message("user", "where is order 7?"),
            Message("assistant", content, supervised=True, extra={"tool_calls": list(calls)}),
            Message("tool", '{"state": "sent"}', extra={"tool_call_id": "abcdefgh1"}),
            Message("assistant", "It is on its way.", supervised=True),
        ),
        tools=TOOLS,
    )


CALLED = {
    "chatml": '<tool_call>\n{"name": "find_order", "arguments": {"number": 7}}\n</tool_call><|im_end|>',
    "llama3": '{"name": "find_order", "parameters": {"number": 7}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "find_order", "arguments": {"number": 7}, "id": "abcdefgh1"}]<|im_end|>',
}
CALLED["qwen"] = CALLED["chatml"]
END = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "<|im_end|>"}


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("arguments", [{"number": 7}, '{"number": 7}'], ids=["object", "string"])
def test_tool_calls_are_supervised_and_their_results_are_not(tokenizer: Any, name: str, arguments: Any) -> None:
    apply_template(tokenizer, shipped_template(name))
    call = {**CALL, "function": {"name": "find_order", "arguments": arguments}}
    found = supervised_text(tokenizer, with_tools(call))
    assert found.replace("<|im_end|> It", "<|im_end|>It") == f"{CALLED[name]}It is on its way.{END[name]}"


@pytest.mark.parametrize("name", ["gemma", "phi"])
def test_formats_without_tools_refuse_them(tokenizer: Any, name: str) -> None:
    apply_template(tokenizer, shipped_template(name))
    with pytest.raises(RowError, match="has no tools"):
        encode(with_tools(CALL), tokenizer)
    with pytest.raises(RowError, match="has no tool calls"):
        encode(ChatExample(with_tools(CALL).messages[:3]), tokenizer)


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_words_beside_a_call_are_refused_where_they_would_be_lost(tokenizer: Any, name: str) -> None:
    apply_template(tokenizer, shipped_template(name))
    with pytest.raises(RowError, match="either words or"):
        encode(with_tools(CALL, content="Let me look."), tokenizer)


def test_several_calls_and_words_in_one_turn(tokenizer: Any) -> None:
    apply_template(tokenizer, shipped_template("qwen"))
    found = supervised_text(tokenizer, with_tools(CALL, CALL, content="Let me look."))
    one = CALLED["qwen"].removesuffix("<|im_end|>")
    assert found == f"Let me look.\n{one}\n{one}<|im_end|>It is on its way.<|im_end|>"


def test_results_that_follow_one_another_share_a_turn_in_qwen(tokenizer: Any) -> None:
    apply_template(tokenizer, shipped_template("qwen"))
    text = write(tokenizer, ("user", "q"), ("tool", "a"), ("tool", "b"), ("assistant", "c"))
    results = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\nc" in text


def test_tools_that_the_template_leaves_out_are_noticed(tokenizer: Any) -> None:
    answer = Message("assistant", "I call find_order.", supervised=True)
    with pytest.raises(RowError, match="the chat template does not render tools"):
        encode(ChatExample((Message("user", "q"), answer), tools=TOOLS), tokenizer)
    with pytest.raises(RowError, match="a tool has no function name"):
        encode(ChatExample((Message("user", "q"), answer), tools=({"type": "function"},)), tokenizer)


def test_calls_and_reasoning_that_the_template_leaves_out_are_noticed(tokenizer: Any) -> None:
    called = Message("assistant", "Let me look.", supervised=True, extra={"tool_calls": [CALL]})
    thought = Message("assistant", "Four.", supervised=True, extra={"reasoning_content": "2 and 2"})
    for answer in (called, thought):
        with pytest.raises(RowError, match="the supervised tokens are not the answer"):
            encode(ChatExample((Message("user", "q"), answer)), tokenizer)
    apply_template(tokenizer, shipped_template("qwen"))
    example = ChatExample((Message("user", "q"), thought))
    assert supervised_text(tokenizer, example) == "<think>\n2 and 2\n</think>\n\nFour.<|im_end|>"


# -- what a template changes in a tokenizer ----------------------------------------------------------------------------


def test_missing_tokens_are_added_and_the_end_of_turn_becomes_eos(tokenizer: Any) -> None:
    size = len(tokenizer)
    before = {token: tokenizer.encode(token) for token in shipped_template("llama3").special_tokens}
    applied = apply_template(tokenizer, shipped_template("llama3"))
    assert [(token.text, token.id) for token in applied.new_tokens] == [
        ("<|start_header_id|>", size),
        ("<|end_header_id|>", size + 1),
        ("<|eot_id|>", size + 2),
    ]
    assert {token.text: list(token.piece_ids) for token in applied.new_tokens} == before
    assert all(len(token.piece_ids) > 1 for token in applied.new_tokens)
    assert (applied.eos_before, applied.end_of_turn, tokenizer.eos_token) == ("<|im_end|>", "<|eot_id|>", "<|eot_id|>")
    assert pickle.loads(pickle.dumps(applied)) == applied


def test_tokens_that_are_there_are_not_added_again(tokenizer: Any) -> None:
    size = len(tokenizer)
    assert apply_template(tokenizer, shipped_template("chatml")).new_tokens == ()
    assert len(tokenizer) == size
    assert apply_template(tokenizer, shipped_template("phi")).new_tokens != ()
    assert apply_template(tokenizer, shipped_template("phi")).new_tokens == ()


def test_a_word_of_the_vocabulary_becomes_special_and_keeps_its_id() -> None:
    tokenizer = make_tokenizer(["<|im_end|>"], eos_token="</s>")
    id_before = tokenizer.get_vocab()["<|im_end|>"]
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    applied = apply_template(tokenizer, shipped_template("chatml"))
    assert [token.text for token in applied.new_tokens] == ["<|im_start|>"]
    assert tokenizer.encode("hello<|im_end|>")[-1] == tokenizer.eos_token_id == id_before


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_saved_tokenizer_is_the_same_when_it_is_loaded(tokenizer: Any, tmp_path: Path, name: str) -> None:
    apply_template(tokenizer, shipped_template(name))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, len(loaded)) == (tokenizer.eos_token, len(tokenizer))
    assert loaded.added_tokens_encoder == tokenizer.added_tokens_encoder
    example = ChatExample((Message("user", "hi"), Message("assistant", "hello", supervised=True)))
    assert encode(example, loaded) == encode(example, tokenizer)


def test_mistral_needs_a_tokenizer_that_names_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"SFT_MODEL__CHAT_TEMPLATE=mistral: .*names none"):
        apply_template(tokenizer, shipped_template("mistral"))


# -- the end of a turn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n<|endoftext|>\n'"), "<|endoftext|>"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n'"), None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("constant", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_found_by_use(tokenizer: Any, template: str | None, end: str | None) -> None:
    tokenizer.chat_template = template
    assert find_end_of_turn(tokenizer) == end


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_template_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% set x = '<|unused' + '|>' %}"
    )
    template = read_template_file(path, "own.jinja")
    assert set(template.special_tokens) == {"<|system|>", "<|user|>", "<|assistant|>", "<|stop|>"}
    applied = apply_template(tokenizer, template)
    assert applied.end_of_turn == tokenizer.eos_token == "<|stop|>"
    example = ChatExample((Message("user", "hi"), Message("assistant", "hello", supervised=True)))
    assert supervised_text(tokenizer, example) == "hello<|stop|>"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{% for m in messages %}\n{{ m.content }}\n{% endfor", "line 3: "),
        (b"{% for m in messages %}\n{{ m.content | absent }}{% endfor %}", "absent"),
        (b"\xff\xfe", "byte 1 is not UTF-8"),
        (b"Just words.", "does not write the messages"),
        (b"{{ messages[7].content + 'x' }}", "the chat template refuses it"),
    ],
)
def test_files_that_are_no_templates(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.jinja"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^SFT_MODEL__CHAT_TEMPLATE=mine/broken.jinja: .*{reason}") as caught:
        read_template_file(path, "mine/broken.jinja")
    assert caught.value.hint


def test_a_template_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SFT_MODEL__CHAT_TEMPLATE=x.jinja: can't be read: No such file"):
        read_template_file(tmp_path / "x.jinja", "x.jinja")


# -- clones ------------------------------------------------------------------------------------------------------------


def clone(other: Any) -> ChatTemplate:
    return clone_template(other, "org/other")


def test_a_clone_writes_what_the_other_model_writes(tokenizer: Any) -> None:
    other = make_tokenizer(bos_token="<BOS>", eos_token="it's the \\end", pad_token="<pad>")
    other.chat_template = (
        "\n {{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = clone(other)
    assert template.special_tokens == ("<BOS>", "it's the \\end")
    applied = apply_template(tokenizer, template)
    assert applied.end_of_turn == tokenizer.eos_token == "it's the \\end"
    assert write(tokenizer, *TURNS) == write(other, *TURNS)
    assert [token.text for token in applied.new_tokens] == ["<BOS>", "it's the \\end"]


def test_a_clone_of_a_model_without_bos_writes_none(tokenizer: Any) -> None:
    other = make_tokenizer(eos_token="</s>")
    other.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>")
    apply_template(tokenizer, clone(other))
    assert write(tokenizer, *TURNS) == write(other, *TURNS)


def test_a_clone_brings_the_added_tokens_that_it_writes(tokenizer: Any) -> None:
    other = make_tokenizer(eos_token="</s>")
    other.add_tokens(["<think>", "</think>", "<unused>", "\n\n", "user"])
    other.chat_template = CHATML.replace("+ m.content", "+ '<think>\n\n</think>\n\n' + m.content").replace(
        "<|im_end|>", "</s>"
    )
    assert clone(other).special_tokens == ("</s>", "<think>", "</think>")


def test_a_clone_of_nothing(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"^SFT_MODEL__CHAT_TEMPLATE=org/other: that model's tokenizer has no chat"):
        clone(tokenizer)
