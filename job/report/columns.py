"""Text in the columns of a terminal, where a wide character takes two; and text that is safe to show on one."""

import unicodedata
from collections.abc import Iterator


def make_visible(text: str) -> str:
    """Replace control characters, which could clear a terminal or forge a line of the log, and lone surrogates, which
    no file can hold."""
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs") else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    if character == "\t":
        return "    "
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def count_columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: two for a wide character, such as most of CJK."""
    return sum(_character_columns(character) for character in text)


def _character_columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Cut a text's middle out, so that it takes so many columns: the end of an answer shows what ends it."""
    if count_columns(text) <= width:
        return text
    if width < 4:
        return ""
    tail = take(text[::-1], (width - 3) // 3)[::-1]
    return f"{take(text, width - 3 - count_columns(tail))}...{tail}"


def take(text: str, width: int) -> str:
    """Return as much of a text's start as fits into so many columns."""
    used = 0
    for index, character in enumerate(text):
        used += _character_columns(character)
        if used > width:
            return text[:index]
    return text


def wrap(text: str, width: int) -> Iterator[str]:
    """Break a text between words into lines of at most so many columns; a longer word has a line of its own."""
    line = ""
    for word in text.split(" "):
        if line and count_columns(line) + 1 + count_columns(word) > width:
            yield line
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield line
