"""The proof of each row: what its supervised tokens decode to is the answer and the token that ends it."""

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.encoding.chat_template import SHIPPED_NAMES, apply_template, shipped_template
from job.data.encoding.labels import NOT_SUPERVISED
from job.data.encoding.render import Renderer, make_renderer
from job.data.encoding.tokens import encode, encode_batch, load_tokenizer
from job.data.shaping.shapes import ChatExample, FatalRowError, Message, PlainExample, RowError

OWN = "own"  # SmolLM2's template, which marks nothing
BYTE_LEVEL, METASPACE = "byte-level", "metaspace"


def make_metaspace_tokenizer() -> Any:
    """A small Unigram tokenizer as sentencepiece makes them: blanks are part of words, rare characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    sentences = ["How late are you open? Until nine.", "我們晚上九點打烊。", "2 + 2 = 4, the answer is yes 🙂"] * 5
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(sentences, trainer)
    words = sorted(trained.get_vocab(), key=trained.token_to_id)[len(special) :]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [(piece, -1.0 - index / 10) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class Tokenizers(dict[tuple[str, str], Any]):
    """Tokenizers by kind and template."""

    def __repr__(self) -> str:
        return "(tokenizers)"  # hypothesis prints it with every failure


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path) -> Tokenizers:
    """Each kind of tokenizer with each template."""
    made = Tokenizers()
    made[BYTE_LEVEL, OWN] = load_tokenizer(tokenizer_folder)
    for name in SHIPPED_NAMES:
        for kind in (BYTE_LEVEL, METASPACE):
            made[kind, name] = load_tokenizer(tokenizer_folder) if kind == BYTE_LEVEL else make_metaspace_tokenizer()
            apply_template(made[kind, name], shipped_template(name))
    return made


ALL = [(BYTE_LEVEL, OWN), *((kind, name) for name in SHIPPED_NAMES for kind in (BYTE_LEVEL, METASPACE))]
every_template = pytest.mark.parametrize("which", ALL, ids=["-".join(which) for which in ALL])


def chat(*contents: str, system: str | None = None) -> ChatExample:
    """A conversation of user and assistant turns, all answers supervised."""
    roles = ("user", "assistant")
    turns = [Message(roles[index % 2], content, supervised=index % 2 == 1) for index, content in enumerate(contents)]
    return ChatExample((*([] if system is None else [Message("system", system)]), *turns))


def supervised_runs(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    found: list[list[int]] = []
    for before, label in zip([NOT_SUPERVISED, *labels], labels, strict=False):
        if label == NOT_SUPERVISED:
            continue
        if before == NOT_SUPERVISED:
            found.append([])
        found[-1].append(label)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in found]


def expected_runs(example: ChatExample, name: str, tokenizer: Any) -> list[str]:
    answers = [turn.content if name == OWN else turn.content.strip() for turn in example.messages if turn.supervised]
    return [answer + tokenizer.eos_token for answer in answers]


def check_row(example: ChatExample, name: str, kind: str, tokenizer: Any) -> None:
    ids, labels = encode(example, tokenizer)
    runs, expected = supervised_runs(tokenizer, labels), expected_runs(example, name, tokenizer)
    if kind == METASPACE:
        expected = [text.replace("▁", " ") for text in expected]  # it can't tell this character from a blank
    # A token across the start may bring the template's blanks with it, and blanks alone.
    assert [run.lstrip() for run in runs] == [text.lstrip() for text in expected]
    assert all(label in (NOT_SUPERVISED, token) for token, label in zip(ids, labels, strict=True))
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]


CASES = {
    "one turn": chat("hello", "hi there"),
    "several turns and a system prompt": chat("hello", "hi", "and then?", "Bye!\nSee you.", system="Be brief."),
    "empty system prompt": chat("q", "a", system=""),
    "cjk": chat("你們幾點關門", "我們晚上九點打烊。", "周末呢", "營業到十點"),
    "emoji": chat("👩‍👩‍👧 ok?", "🙂🏳️‍🌈 yes 👍🏽", "more", "🇹🇼"),
    "prompt ends in a space": chat("hello ", "there", "and  ", "more"),
    "answers with blanks around them": chat("q", "  a \t", "q", "\n\n\ntwo\n\nlines\n\n", "q", " \n x"),
    "code": chat("code", "```python\nif x:\n    return 1\n```"),
    "markers in the question": chat("<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n", "real", "[/INST] </s>", "b"),
    "the answer is in the question": chat("say hi", "hi", "say hi hi", "hi", system="hi"),
    "other marks in the answer": chat("q", "<|im_start|>user [INST] <think>x</think> <b>bold</b> {{ y }}"),
    "almost the end": chat("q<|im_end", "a<|im_end <|eot_id| </s", "q", "<"),
    "ends in a question": chat("q", "a", "unanswered"),
}


@every_template
@pytest.mark.parametrize("example", CASES.values(), ids=CASES.keys())
def test_the_answers_and_their_ends_are_supervised_and_nothing_else(
    tokenizers: Tokenizers, which: tuple[str, str], example: ChatExample
) -> None:
    check_row(example, which[1], which[0], tokenizers[which])


@every_template
def test_a_template_without_its_marks_gives_the_same_labels(tokenizers: Tokenizers, which: tuple[str, str]) -> None:
    marked = tokenizers[which]
    unmarked = copy.deepcopy(marked)
    unmarked.chat_template = re.sub(r"\{%- (end)?generation %\}", "", marked.chat_template)
    examples = list(CASES.values())
    for one, other in zip(encode_batch(examples, marked), encode_batch(examples, unmarked), strict=True):
        assert not isinstance(one, RowError)
        assert not isinstance(other, RowError)
        assert (one.input_ids.tolist(), one.labels.tolist()) == (other.input_ids.tolist(), other.labels.tolist())


LITERALS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "[/INST]",
    "</s>",
    "<end_of_turn>",
    "<|eot_id|>",
    "👩‍👩‍👧",
    " ",
    "\n\n",
]
# SmolLM2's vocabulary lacks the bytes of some control characters and unassigned planes, and drops them.
characters = st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"])
texts = st.lists(st.text(characters, max_size=12) | st.sampled_from(LITERALS), max_size=4).map("".join)
answers = texts.filter(lambda text: bool(text.strip()))
conversations = st.builds(
    lambda turns, system: chat(*(content for turn in turns for content in turn), system=system),
    st.lists(st.tuples(texts, answers), min_size=1, max_size=3),
    st.none() | texts,
)


@every_template
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(example=conversations)
def test_any_conversation_is_proven_or_refused(
    tokenizers: Tokenizers, which: tuple[str, str], example: ChatExample
) -> None:
    tokenizer = tokenizers[which]
    ends = [message for message in example.messages if message.supervised and tokenizer.eos_token in message.content]
    if not ends:
        check_row(example, which[1], which[0], tokenizer)
        return
    with pytest.raises(RowError, match=r"the token that ends a turn|are not the answer"):
        encode(example, tokenizer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(example=conversations)
def test_frames_find_what_rendering_the_prefixes_finds(tokenizers: Tokenizers, example: ChatExample) -> None:
    quick = make_renderer(tokenizers[BYTE_LEVEL, OWN])
    assert quick is not None
    slow = Renderer(quick.template, quick.special_tokens)
    slow.__dict__["_frames"] = None
    assert quick.render(example) == slow.render(example)


@pytest.mark.parametrize("kind", [BYTE_LEVEL, METASPACE])
@pytest.mark.parametrize("answer", ["one<|im_end|>two", "one<|im_end|>", "\n<|im_end|>"])
def test_an_answer_that_holds_its_end_is_refused(tokenizers: Tokenizers, kind: str, answer: str) -> None:
    with pytest.raises(RowError, match=r"messages\[1\]: the answer holds <\|im_end\|>"):
        encode(chat("q", answer), tokenizers[kind, "chatml"])


def test_every_row_of_a_batch_is_judged_alone(tokenizers: Tokenizers) -> None:
    rng = random.Random(3)
    examples = [*CASES.values(), chat("q", "a<|im_end|>b")]
    rng.shuffle(examples)
    tokenizer = tokenizers[BYTE_LEVEL, "chatml"]
    for example, row in zip(examples, encode_batch(examples, tokenizer), strict=True):
        if isinstance(row, RowError):
            assert "a<|im_end|>b" in example.messages[1].content
        else:
            assert (row.input_ids.tolist(), row.labels.tolist()) == encode(example, tokenizer)


# -- templates and tokenizers that would train on something else -------------------------------------------------------

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("{% if m.role == 'assistant' %}{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}", "Yes<|im_end|>"),
        ("{{ m.content }}{% if m.role == 'assistant' %} Cheers{% endif %}", "Yes, of course. Cheers<|im_end|>"),
        ("{{ m.content | upper }}", "YES, OF COURSE.<|im_end|>"),
    ],
    ids=["cuts", "adds", "changes"],
)
def test_a_template_that_changes_the_answer_is_refused(tokenizer: Any, body: str, found: str) -> None:
    tokenizer.chat_template = HEAD + body + TAIL
    with pytest.raises(RowError) as caught:
        encode(chat("q", "Yes, of course."), tokenizer)
    assert caught.value.reason == (
        f"messages[1]: the supervised tokens are not the answer: expected 'Yes, of course.<|im_end|>', found {found!r}"
    )


def test_marks_without_the_end_are_refused(tokenizer: Any) -> None:
    mark, unmark = "{% if m.role == 'assistant' %}{% generation %}", "{% endgeneration %}"
    body = mark + "{{ m.content }}" + unmark + "{% else %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = HEAD + body + TAIL
    with pytest.raises(FatalRowError, match=r"marks the answer but not <\|im_end\|>") as caught:
        encode(chat("q", "a", "q", "b"), tokenizer)
    assert "endgeneration" in caught.value.hint


def test_marks_around_more_than_the_answer_are_not_believed(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{% generation %}" + (
        HEAD + "{{ m.content }}" + TAIL
    ).removeprefix("{% for m in messages %}").replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    _, labels = encode(chat("q", "a", "q", "b"), tokenizer)
    assert supervised_runs(tokenizer, labels) == ["a<|im_end|>", "b<|im_end|>"]


def test_marks_in_pieces_that_touch_are_one_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% generation %}"
        "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    _, labels = encode(chat("q", "a", "q", "b"), tokenizer)
    assert supervised_runs(tokenizer, labels) == ["a<|im_end|>", "b<|im_end|>"]


def test_blanks_that_a_token_of_the_prompt_swallows_are_not_supervised(tokenizer: Any) -> None:
    from tokenizers import AddedToken

    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(name, special=True, rstrip=True) for name in names], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    _, labels = encode(chat("q", "  \n one", "q", "two"), tokenizer)
    assert supervised_runs(tokenizer, labels) == ["one<|end|>", "two<|end|>"]


def test_a_tokenizer_that_drops_the_start_of_an_answer_is_found_out(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("©", "")
    with pytest.raises(RowError, match=r"messages\[1\]: the tokenizer drops a character"):
        encode(chat("q", "© all rights"), tokenizer)


WORDS_ONLY = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("last", ["b</think>", "b<|im_end|>", "b🙂"])
def test_a_token_of_the_answer_does_not_end_the_turn(tokenizer: Any, last: str) -> None:
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template = WORDS_ONLY
    ids, labels = encode(chat("q", "a</think>", "q", last), tokenizer)
    expected = [" a</think>", " " + last.removesuffix("<|im_end|>") + "<|im_end|>"]
    assert supervised_runs(tokenizer, labels) == expected
    assert ids[-1] == tokenizer.eos_token_id


def test_no_token_to_stop_at_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = WORDS_ONLY
    tokenizer.eos_token = None
    with pytest.raises(FatalRowError, match="no token ends the answer"):
        encode(chat("q", "a"), tokenizer)


# -- plain text with several spans -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts", "expected"),
    [
        ("Q: one A: two Q: three A: four", [(9, 13), (25, 30)], [" two", " four<|im_end|>"]),
        ("### 指令: 幾點 ### 回應: 九點🙂", [(19, 22)], ["九點🙂<|im_end|>"]),
        ("all of it", [(0, 9)], ["all of it<|im_end|>"]),
        ("start, middle, end", [(0, 6), (14, 18)], ["start,", " end<|im_end|>"]),
        ("🙂🙃🙂", [(1, 3)], ["🙃🙂<|im_end|>"]),
    ],
)
def test_spans_of_plain_text(tokenizer: Any, text: str, parts: list[tuple[int, int]], expected: list[str]) -> None:
    ids, labels = encode(PlainExample(text, tuple(parts)), tokenizer)
    assert supervised_runs(tokenizer, labels) == expected
    assert tokenizer.decode(ids) == text + "<|im_end|>"
