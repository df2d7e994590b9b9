"""Which tokens the loss is taken on, and the proof that they are the answers and nothing else.

A label is the token's own id where the loss is taken, and -100 elsewhere. Labels come from the character offsets of the
tokens, so the text is tokenised once, as a whole, exactly as a model will see it.

Where an answer ends. A chat template closes an answer with a special or added token (`<|im_end|>`, `<|eot_id|>`,
`</s>`); it is supervised, for it is what makes a model stop, and blanks that the template writes after it are not. A
template that closes an answer with plain text only gives a model nothing to stop at: then the blanks after the last
answer are cut off and EOS is put there, supervised, because EOS is what generation stops at; answers before it are
supervised up to their last word. Plain text always ends in a supervised EOS.

The proof. For each supervised turn, the characters that its supervised tokens cover must be what the row says, as the
template trimmed it, and the token that ends the turn. A token across the start may add blanks only. A row for which
that does not hold is never trained on.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.data.encoding.places import TokenPlaces
from job.data.encoding.render import Rendered, Turn
from job.data.shaping.shapes import FatalRowError, Message, PlainExample, RowError

if TYPE_CHECKING:
    from tokenizers import Encoding

NOT_SUPERVISED = -100
SHOWN_CHARACTERS = 60
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # all the names that transformers passes on


class Encoded(NamedTuple):
    """One tokenised example: both (T,) int32, labels -100 where not supervised."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class _Answer(NamedTuple):
    """The supervised tokens of one turn, [first, last], and the text of the token that closes it ("" for none)."""

    first: int
    last: int
    closing: str


def label_plain(example: PlainExample, encoding: "Encoding", eos: int) -> Encoded:
    """Supervise the tokens that share a character with any span, and EOS, which is put at the end if it isn't there."""
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # (T, 2)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, end in example.spans:
        # A token that straddles the start is supervised: it holds the first characters of the completion. Some
        # tokenizers give a blank at the very end an empty range, beyond every character.
        before_end = True if end >= len(example.text) else offsets[:, 0] < end
        supervised |= (offsets[:, 1] > start) & before_end
        if start == 0:
            # A space at the very start may have the range (0, 0), as BOS has.
            supervised[1:] |= offsets[1:, 0] < end
    if len(ids) == 0 or ids[-1] != eos:
        ids, supervised = np.append(ids, np.int32(eos)), np.append(supervised, True)
    supervised[-1] = True
    return Encoded(ids, np.where(supervised, ids, np.int32(NOT_SUPERVISED)))


def label_chat(rendered: Rendered, tokens: TokenPlaces, closing: dict[int, str], eos: int | None) -> Encoded:
    """Supervise the answers of a conversation, each with the token of `closing` (id -> text) that ends it.

    `eos` goes behind a last answer that nothing closes. Raises RowError where the tokens are not those of the answers,
    and FatalRowError where no row's can be.
    """
    ids = tokens.ids
    if rendered.supervise_all:
        return _label_all(rendered.text, tokens, closing, eos)
    labels = np.full(len(ids), NOT_SUPERVISED, dtype=np.int32)
    for turn in rendered.turns:
        answer = _find_answer(turn, rendered.text, tokens, closing)
        _prove(turn, answer, rendered.text, tokens, closing)
        labels[answer.first : answer.last + 1] = ids[answer.first : answer.last + 1]
        if not answer.closing:
            rest = rendered.text[turn.end :].strip()
            if not rest:
                return _end_in_eos(ids, labels, answer.last, eos)
            _check_marked_end(turn, rendered, rest, closing)
    return Encoded(ids, labels)


def _label_all(text: str, tokens: TokenPlaces, closing: dict[int, str], eos: int | None) -> Encoded:
    ids = tokens.ids
    last, word = _find_last(text, tokens, 0, len(text.rstrip()), "the conversation")
    if closing.get(int(ids[last])) == word:
        return Encoded(ids, ids.copy())
    return _end_in_eos(ids, ids, last, eos)


def _end_in_eos(ids: NDArray[np.int32], labels: NDArray[np.int32], last: int, eos: int | None) -> Encoded:
    if eos is None:
        raise FatalRowError(
            "no token ends the answer: the chat template writes none, and the base model's tokenizer names no EOS",
            hint="set SFT_MODEL__CHAT_TEMPLATE to a template that ends a turn with a token, such as chatml",
        )
    ids, labels = ids[: last + 1], labels[: last + 1]
    if ids[-1] == eos:
        return Encoded(ids, labels)
    return Encoded(np.append(ids, np.int32(eos)), np.append(labels, np.int32(eos)))


def _find_answer(turn: Turn, text: str, tokens: TokenPlaces, closing: dict[int, str]) -> _Answer:
    written = text[turn.start : turn.end]
    where = f"messages[{turn.index}]"
    word_start = turn.start + len(written) - len(written.lstrip())
    first = _token_at(tokens, word_start, where)
    # Blanks at the start of an answer are supervised as well; some tokenizers give them empty ranges. Not those that a
    # token of the prompt has swallowed, as Phi-3's <|assistant|> does.
    while first > 0:
        start, end = tokens.range_of(first - 1)
        if end <= turn.start or text[start : turn.start].strip():
            break
        first -= 1
    last, word = _find_last(text, tokens, turn.start, turn.start + len(written.rstrip()), where)
    is_closed = _closes(turn, text, tokens, last, word, closing.get(int(tokens.ids[last])))
    return _Answer(first, last, word if is_closed else "")


def _closes(turn: Turn, text: str, tokens: TokenPlaces, last: int, word: str, token: str | None) -> bool:
    """Say whether the last token, whose text is `word`, ends the turn, and is the template's, not the answer's."""
    # The text is compared too: some vocabularies list bytes, such as <0x0A>, among their added tokens.
    if token != word:
        return False
    content = turn.message.content.strip()
    return not content.endswith(word) or text[: tokens.range_of(last)[0]].rstrip().endswith(content)


def _find_last(text: str, tokens: TokenPlaces, start: int, end: int, where: str) -> tuple[int, str]:
    """Return the last token that shares a character with [start, end), and its text without blanks."""
    last = _token_at(tokens, end - 1, where) if end > start else 0
    # The bytes of one character may be several tokens, all of them with the range of that character.
    while last + 1 < len(tokens.ids) and tokens.range_of(last + 1)[0] < end:
        last += 1
    return last, text[slice(*tokens.range_of(last))].strip()


def _token_at(tokens: TokenPlaces, character: int, where: str) -> int:
    token = tokens.find(character)
    if token is None:
        raise RowError(f"{where}: the tokenizer drops a character of it, so what is learned would not be what it says")
    return token


def _prove(turn: Turn, answer: _Answer, text: str, tokens: TokenPlaces, closing: dict[int, str]) -> None:
    """Raise RowError unless the tokens of `answer` cover what the row says, its closing token, and nothing else."""
    covered_start, covered_end = tokens.range_of(answer.first)[0], tokens.range_of(answer.last)[1]
    covered = text[covered_start:covered_end]
    stray = text[covered_start : turn.start].strip() or text[turn.end : covered_end].strip()
    words = covered.rstrip().removesuffix(answer.closing)
    if stray or not (_says(words, turn.message) or _says(_cut_closing(words, closing), turn.message)):
        expected = turn.message.content.strip() + answer.closing
        raise RowError(
            f"messages[{turn.index}]: the supervised tokens are not the answer: expected {_shorten(expected)}, found "
            f"{_shorten(covered)}"
        )
    if answer.closing and answer.closing in turn.message.content:
        raise RowError(
            f"messages[{turn.index}]: the answer holds {answer.closing}, the token that ends a turn, so the model "
            "would learn to stop there; remove it"
        )


def _cut_closing(words: str, closing: dict[int, str]) -> str:
    # Phi-3's own template ends the last answer twice: <|end|>, and then EOS.
    words = words.rstrip()
    return next((words.removesuffix(token) for token in closing.values() if token and words.endswith(token)), words)


def _says(words: str, message: Message) -> bool:
    """Say whether `words` are the message's content, behind what else the template writes of its turn."""
    if words.strip() == message.content.strip():
        return not message.extra or all(part in words for part in _other_parts(message))
    # A template may write reasoning in front of the content, and set blanks of its own between them.
    found, content = _squeeze(words), _squeeze(message.content)
    if not message.extra:
        return found.endswith(content)
    return all(_squeeze(part) in found for part in (content, *_other_parts(message)))


def _other_parts(message: Message) -> list[str]:
    """Return what a turn must say besides its content: its reasoning and the names of the functions it calls."""
    parts = [value for key in REASONING_KEYS if isinstance(value := message.extra.get(key), str)]
    calls = message.extra.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function: Any = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RowError("a tool call has no function name")
        parts.append(name)
    return parts


def _check_marked_end(turn: Turn, rendered: Rendered, rest: str, closing: dict[int, str]) -> None:
    """Raise FatalRowError where a template marks its last answer but not the token that ends it."""
    outside = [token for token in closing.values() if token and rest.startswith(token)]
    if turn.index < rendered.messages - 1 or not outside:
        return
    raise FatalRowError(
        f"messages[{turn.index}]: the chat template marks the answer but not {outside[0]}, which ends it, so the model "
        "would never learn to stop",
        hint="put {% endgeneration %} behind the token in the chat template, or set SFT_MODEL__CHAT_TEMPLATE to a "
        "shipped one, such as chatml",
    )


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _shorten(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return repr(text)
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]!r}...{text[-half:]!r}"
