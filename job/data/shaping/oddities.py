"""What is odd about a row's text though a model can be trained on it: signs of damage, and special tokens in it."""

import re
from collections.abc import Iterable, Iterator

from job.data.shaping.examples import Example, PlainExample

CONTROL_NOTE = "control characters"
REPLACEMENT_NOTE = "replacement characters (U+FFFD), which text gets when it is decoded wrongly"
SPECIAL_NOTE = "special tokens in the text, read as if the template had written them"

_CONTROL = bytes({*range(0x20), 0x7F} - set(b"\t\n\r"))  # in UTF-8, no byte of another character is one of them


def special_token_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds any of these tokens, or None when there are none."""
    texts = {text for token in tokens if (text := token.strip())}
    return re.compile("|".join(re.escape(text) for text in sorted(texts))) if texts else None


def find_oddities(example: Example, special_tokens: re.Pattern[str] | None) -> tuple[str, ...]:
    """Return a note for each kind of oddity in an example's text.

    `special_tokens` finds the special tokens of the tokenizer (see `special_token_pattern`): those that a user's
    template writes itself are not odd, and should be left out of it.
    """
    text = "\n".join(_list_texts(example))  # one search in a long text is faster than many in short ones
    notes = []
    encoded = text.encode(errors="surrogatepass")  # what the template leaves out may hold half of a pair
    if len(encoded.translate(None, _CONTROL)) < len(encoded):  # far faster than a pattern
        notes.append(CONTROL_NOTE)
    if "\ufffd" in text:
        notes.append(REPLACEMENT_NOTE)
    if special_tokens is not None and special_tokens.search(text):
        notes.append(SPECIAL_NOTE)
    return tuple(notes)


def _list_texts(example: Example) -> Iterator[str]:
    """Yield the text of an example, or of each of its turns, their reasoning included."""
    if isinstance(example, PlainExample):
        yield example.text
        return
    for message in example.messages:
        yield message.content
        yield from (value for value in message.extra.values() if isinstance(value, str))
