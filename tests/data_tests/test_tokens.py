"""Labels: what is supervised must decode to exactly the answers and the tokens that end them."""

# ruff: noqa: RUF001 (Chinese text has Chinese punctuation)

import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job.data.encoding.tokens import NOT_SUPERVISED, encode, encode_batch, load_tokenizer
from job.data.shaping.shapes import (
    ChatExample,
    FatalRowError,
    LossOn,
    PlainExample,
    RowError,
    RowFormat,
    RowOptions,
    Shape,
    to_example,
)
from job.errors import ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: only the last answer keeps its reasoning.
REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No token ends a turn here, only a line feed.
WORDS_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    found: list[list[int]] = []
    before = NOT_SUPERVISED
    for label in labels:
        if label != NOT_SUPERVISED:
            if before == NOT_SUPERVISED:
                found.append([])
            found[-1].append(label)
        before = label
    return [decode(tokenizer, run) for run in found]


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": "user" if index % 2 == 0 else "assistant", "content": content}
        for index, content in enumerate(contents)
    ]


def row_format(shape: Shape, loss_on: LossOn = "auto") -> RowFormat:
    return RowFormat(shape, RowOptions(loss_on))


def plain(text: str, start: int) -> PlainExample:
    return PlainExample(text, ((start, len(text)),))


def chat(messages: list[dict[str, str]], loss_on: LossOn = "auto") -> ChatExample:
    example = to_example({"messages": messages}, row_format("messages", loss_on), has_template=True)
    assert isinstance(example, ChatExample)
    return example


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_keeps_torch_out_and_is_quiet(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from job.data import load_tokenizer\n"
        f"assert load_tokenizer(Path({str(tokenizer_folder)!r})).is_fast\n"
        "assert sys.modules['torch'] is None\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, job.data; print([m for m in ('torch', 'transformers', 'pyarrow', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_folders_without_a_tokenizer_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text('{"model_type": "llama"}')
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    whole = (tokenizer_folder / "tokenizer.json").read_bytes()
    (damaged / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    (damaged / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (config_only, damaged, empty, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=folder.name):
            load_tokenizer(folder)


# -- conversations -----------------------------------------------------------------------------------------------------

CASES = {
    "one turn": conversation("hello", "hi there"),
    "several turns": conversation("hello", "hi", "and then?", "Goodbye!\nSee you."),
    "system": conversation("q", "a", system="You answer in one letter."),
    "cjk": conversation("你們幾點關門？", "我們晚上九點打烊。", "周末呢？", "週末營業到十點，歡迎光臨！"),
    "emoji": conversation("👩‍👩‍👧 ok?", "🙂🏳️‍🌈 yes 👍🏽", "more", "🇹🇼"),
    "prompt ends in a space": conversation("hello ", "there", "and  ", "more"),
    "blanks in the answer": conversation("q", "a  b\n\n\nc \t", "q", "two lines\n\n"),
    "marker in the question": conversation("<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n", "real"),
    "answer is in the question": conversation("say hi", "hi", "say hi hi", "hi"),
    "ends in a question": conversation("q", "a", "unanswered"),
    "code": conversation("code", "```python\nif x:\n    return 1\n```"),
}


@pytest.mark.parametrize("template", [None, CHATML, MARKED], ids=["own", "chatml", "marked"])
@pytest.mark.parametrize("messages", CASES.values(), ids=CASES.keys())
def test_the_answers_are_supervised_and_nothing_else(
    tokenizer: Any, template: str | None, messages: list[dict[str, str]]
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    for loss_on, expected in (("auto", answers), ("assistant", answers), ("completion", answers[-1:])):
        ids, labels = encode(chat(messages, loss_on), tokenizer)  # type: ignore[arg-type]
        assert runs(tokenizer, labels) == expected
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
        assert all(label in (NOT_SUPERVISED, token) for token, label in zip(ids, labels, strict=True))


def test_all_supervises_every_token_of_a_conversation(tokenizer: Any) -> None:
    ids, labels = encode(chat(CASES["system"], "all"), tokenizer)
    assert ids == labels == tokenizer.apply_chat_template(CASES["system"])["input_ids"]


def test_the_templates_own_mask_is_what_is_supervised(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED.replace("+ '<|im_end|>\n' }}{% endgen", "+ '<|im_end|>' }}{% endgen")
    messages = CASES["several turns"]
    _, labels = encode(chat(messages), tokenizer)
    mask = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert [label != NOT_SUPERVISED for label in labels] == [bool(bit) for bit in mask["assistant_masks"]]


def test_wrong_marks_are_not_believed(tokenizer: Any) -> None:
    # Inside a macro, transformers counts the marked characters from the wrong place.
    tokenizer.chat_template = (
        "{% macro answer(m) %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% endmacro %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "(answer(message) if message['role'] == 'assistant' else message['content'] + '<|im_end|>\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    _, labels = encode(chat(CASES["several turns"]), tokenizer)
    assert runs(tokenizer, labels) == ["hi<|im_end|>", "Goodbye!\nSee you.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING
    with pytest.raises(FatalRowError, match=r"messages\[1\]: the chat template rewrites earlier turns") as caught:
        encode(chat(CASES["several turns"]), tokenizer)
    assert "SFT_DATA__LOSS_ON=completion" in caught.value.hint
    for messages in (CASES["one turn"], CASES["several turns"]):
        _, labels = encode(chat(messages, "completion"), tokenizer)
        assert runs(tokenizer, labels) == [f"<think>\n\n</think>\n\n{messages[-1]['content']}<|im_end|>"]


def test_a_template_whose_generation_prompt_is_not_what_precedes_an_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}"
    )
    with pytest.raises(FatalRowError, match="generation prompt"):
        encode(chat(CASES["one turn"]), tokenizer)


def test_a_conversation_that_begins_with_an_answer(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Welcome!"}, *CASES["one turn"]]
    with pytest.raises(RowError, match="begins with an assistant turn") as caught:
        encode(chat(messages), tokenizer)  # this template puts a system prompt before the first turn
    assert not isinstance(caught.value, FatalRowError)
    tokenizer.chat_template = CHATML
    _, labels = encode(chat(messages), tokenizer)
    assert runs(tokenizer, labels) == ["Welcome!<|im_end|>", "hi there<|im_end|>"]


@pytest.mark.parametrize(
    "refusal",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['absent'] + 'x' }}",
        "{{ 'x' + 3 }}",
    ],
)
def test_what_a_template_refuses_is_a_bad_row(tokenizer: Any, refusal: str) -> None:
    tokenizer.chat_template = "{% if messages | length > 2 %}" + refusal + "{% endif %}" + CHATML
    good, bad, also_good = encode_batch(
        [chat(CASES["one turn"]), chat(CASES["several turns"]), chat(CASES["one turn"])], tokenizer
    )
    assert isinstance(bad, RowError)
    assert "the chat template refuses it" in bad.reason
    assert not isinstance(bad, FatalRowError)
    assert good.input_ids.tolist() == also_good.input_ids.tolist()  # type: ignore[union-attr]


def test_a_role_that_the_template_drops_is_a_bad_row(tokenizer: Any) -> None:
    messages = [*conversation("q", "a"), {"role": "tool", "content": '42 "degrees"'}, *conversation("q", "a")[1:]]
    _, labels = encode(chat(messages), tokenizer)
    assert runs(tokenizer, labels) == ["a<|im_end|>"] * 2
    tokenizer.chat_template = "{% set messages = messages | rejectattr('role', 'equalto', 'tool') %}" + CHATML
    with pytest.raises(RowError, match="does not render the role 'tool'"):
        encode(chat(messages), tokenizer)


def test_without_a_token_that_ends_a_turn_the_last_answer_ends_in_eos(tokenizer: Any) -> None:
    tokenizer.chat_template = WORDS_ONLY
    ids, labels = encode(chat(CASES["several turns"]), tokenizer)
    assert runs(tokenizer, labels) == [" hi", " Goodbye!\nSee you.<|im_end|>"]
    assert decode(tokenizer, ids).endswith("\nuser: and then?\nassistant: Goodbye!\nSee you.<|im_end|>")
    ids, labels = encode(chat(CASES["ends in a question"]), tokenizer)
    assert runs(tokenizer, labels) == [" a"]
    assert decode(tokenizer, ids).endswith("unanswered\n")
    ids, labels = encode(chat(CASES["one turn"], "all"), tokenizer)
    assert ids == labels
    assert decode(tokenizer, ids) == "user: hello\nassistant: hi there<|im_end|>"


def test_added_tokens_that_are_blanks_do_not_end_a_turn(tokenizer: Any) -> None:
    tokenizer.add_tokens(["\n\n", "</think>"])
    tokenizer.chat_template = WORDS_ONLY.replace("+ '\n' }}", "+ '\n\n' }}")
    _, labels = encode(chat(conversation("q", "<think>x</think> y")), tokenizer)
    assert runs(tokenizer, labels) == [" <think>x</think> y<|im_end|>"]
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n")
    _, labels = encode(chat(conversation("q", "<think>x</think> y")), tokenizer)
    assert runs(tokenizer, labels) == ["<think>x</think> y<|im_end|>"]


def test_a_token_across_the_boundary_is_supervised(tokenizer: Any) -> None:
    # The template's line feed and the answer's first ones make one token.
    _, labels = encode(chat(conversation("q", "\n\n\nanswer")), tokenizer)
    assert runs(tokenizer, labels)[0].lstrip("\n") == "answer<|im_end|>"
    assert runs(tokenizer, labels)[0].startswith("\n\n\n")


# What well-known models' templates do: trim, rename roles, refuse system prompts, close with EOS, swallow blanks.
KNOWN = {
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["one<|eot_id|>", "two 二<|eot_id|>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        [" one<|im_end|>", " two 二<|im_end|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["one<end_of_turn>", "two 二<end_of_turn>"],
    ),
    "phi-3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["one<|end|>", " two 二\n<|end|><|im_end|>"],  # the second token swallows the line feed after it
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates(tokenizer: Any, name: str) -> None:
    from tokenizers import AddedToken

    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in [*names, "<start_of_turn>", "<end_of_turn>"]])
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    tokenizer.chat_template, expected = KNOWN[name]
    messages = conversation("q", "one", "r ", " two 二\n")
    ids, labels = encode(chat(messages), tokenizer)
    assert runs(tokenizer, labels) == expected
    assert ids.count(tokenizer.bos_token_id) == (name != "phi-3")


def test_half_a_character_in_a_tool_call_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "(message.tool_calls or message.content) | tojson")
    messages: list[Any] = [*conversation("q"), {"role": "assistant", "tool_calls": [{"arguments": "\ud83d"}]}]
    with pytest.raises(RowError, match="surrogate"):
        encode(chat(messages), tokenizer)


PIECES = [
    "hello",
    " world",
    "你好",
    "，",
    "🙂",
    "👩‍👧",
    "\n",
    "\n\n",
    "  ",
    " ",
    "é",
    "e\u0301",
    "<b>",
    "1234",
    "\t",
    "。",
    "{{x}}",
    "Ω",
]


def random_content(rng: random.Random) -> str:
    return rng.choice("aZ你🙂9é") + "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_random_conversations(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    rng = random.Random(20)
    conversations = [
        conversation(
            *(random_content(rng) for _ in range(2 * rng.randint(1, 5) + rng.choice([0, 0, 1]))),
            system=rng.choice([None, random_content(rng)]),
        )
        for _ in range(300)
    ]
    encoded = encode_batch([chat(messages) for messages in conversations], tokenizer)
    for messages, row in zip(conversations, encoded, strict=True):
        assert not isinstance(row, RowError)
        answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert runs(tokenizer, row.labels.tolist()) == answers
        assert decode(tokenizer, row.input_ids.tolist()) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_batch_gives_what_single_rows_give(tokenizer: Any) -> None:
    examples = [chat(messages) for messages in CASES.values()]
    examples[3:3] = [plain("some text", 0), plain("2 + 2 = 4", 8)]  # type: ignore[list-item]
    for example, row in zip(examples, encode_batch(examples, tokenizer), strict=True):
        assert not isinstance(row, RowError)
        assert (row.input_ids.tolist(), row.labels.tolist()) == encode(example, tokenizer)


# -- no chat template --------------------------------------------------------------------------------------------------


def make_plain_tokenizer(kind: str) -> Any:
    """A small tokenizer that adds BOS: byte-level like GPT-2's, with and without trimmed offsets, or like Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "metaspace"))
    special = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
        alphabet: list[str] = []
        special += [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["How late are you open? Until nine. 2 + 2 = 4, answer: yes"] * 5, trainer)
    steps: list[Any] = [] if kind == "metaspace" else [processors.ByteLevel(trim_offsets=kind == "trimmed")]
    steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=["untrimmed", "trimmed", "metaspace"])
def plain_tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_plain_tokenizer(request.param)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("How late are you open?", " Until nine."),
        ("2 + 2 =", " 4"),
        ("2 + 2 = ", "4"),
        ("answer:\n", "yes"),
        ("你們幾點關門？", "九點🙂"),
        ("", "yes"),
    ],
)
def test_prompt_and_completion_as_plain_text(plain_tokenizer: Any, prompt: str, completion: str) -> None:
    values = {"prompt": prompt, "completion": completion}
    ids, labels = encode(to_example(values, row_format("prompt/completion"), has_template=False), plain_tokenizer)
    assert ids[0] == plain_tokenizer.bos_token_id
    assert ids.count(plain_tokenizer.bos_token_id) == 1
    assert labels[-1] == plain_tokenizer.eos_token_id
    assert ids == [*plain_tokenizer(prompt + completion)["input_ids"], plain_tokenizer.eos_token_id]
    supervised = decode(plain_tokenizer, [label for label in labels if label != NOT_SUPERVISED])
    # Where the prompt ends in a space, that space and the first word may be one token; it is supervised.
    assert supervised.removesuffix("</s>").strip() == completion.strip()
    first = next(index for index, label in enumerate(labels) if label != NOT_SUPERVISED)
    assert decode(plain_tokenizer, ids[1:first]).strip() == prompt.strip()
    assert NOT_SUPERVISED not in labels[first:]


def test_a_token_of_only_the_prompts_space_is_not_supervised() -> None:
    tokenizer = make_plain_tokenizer("trimmed")
    ids, labels = encode(plain("answer: (", 8), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["Ġ", "(", "</s>"]
    assert [label for label in labels if label != NOT_SUPERVISED] == ids[-2:]


@pytest.mark.parametrize("text", ["Until nine.", "九點🙂", "  yes  ", "yes\n", "yes</s>"])
def test_text_is_supervised_whole_and_ends_in_one_eos(plain_tokenizer: Any, text: str) -> None:
    ids, labels = encode(plain(text, 0), plain_tokenizer)
    assert ids[0] == plain_tokenizer.bos_token_id
    assert labels[1:] == ids[1:]
    assert ids[-1] == plain_tokenizer.eos_token_id
    assert ids.count(plain_tokenizer.eos_token_id) == 1


def test_an_instruct_tokenizer_reads_text_too(tokenizer: Any) -> None:
    ids, labels = encode(plain("a film", 0), tokenizer)
    assert labels == ids
    assert decode(tokenizer, ids) == "a film<|im_end|>"


@pytest.mark.parametrize("shape", ["prompt/completion", "instruction/output"])
def test_instruction_columns_give_the_same_tokens_as_turns(tokenizer: Any, shape: Shape) -> None:
    values = {"prompt": "q", "completion": "a", "instruction": "q", "output": "a", "system": "s"}
    ids, labels = encode(to_example(values, row_format(shape), has_template=True), tokenizer)
    assert (ids, labels) == encode(chat(conversation("q", "a", system="s")), tokenizer)


def test_a_conversation_without_a_template_is_an_error(plain_tokenizer: Any) -> None:
    with pytest.raises(RowError, match="no chat template"):
        encode(chat(CASES["one turn"]), plain_tokenizer)


def test_a_template_that_writes_bos_gets_no_second_one(plain_tokenizer: Any) -> None:
    plain_tokenizer.chat_template = "{{ bos_token }}" + WORDS_ONLY
    # The smile is bytes, which one of these vocabularies lists as added tokens: they don't end a turn.
    ids, labels = encode(chat(conversation("hello", "hi 🙂")), plain_tokenizer)
    assert ids[0] == plain_tokenizer.bos_token_id
    assert ids.count(plain_tokenizer.bos_token_id) == 1
    assert [run.strip() for run in runs(plain_tokenizer, labels)] == ["hi 🙂</s>"]


def test_a_tokenizer_without_eos_is_an_error(plain_tokenizer: Any) -> None:
    plain_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="EOS"):
        encode(plain("text", 0), plain_tokenizer)


def test_a_text_longer_than_the_models_context_is_no_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.model_max_length = 8
    logging.getLogger("transformers").propagate = True
    ids, _ = encode(plain("word " * 50, 0), tokenizer)
    logging.getLogger("transformers").propagate = False
    assert len(ids) > 50
    assert caplog.records == []
