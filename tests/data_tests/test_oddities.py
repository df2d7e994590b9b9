"""Which signs of damage are noted, and which special tokens."""

import re

import pytest

from job.data.shaping.oddities import CONTROL_NOTE, REPLACEMENT_NOTE, SPECIAL_NOTE, find_oddities, special_token_pattern
from job.data.shaping.shapes import ChatExample, Message, PlainExample

PATTERN = special_token_pattern(["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<s>"])


def plain(text: str) -> PlainExample:
    return PlainExample(text, ((0, len(text)),))


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("plain\ttext\r\n\u00a0é 你好 😀\u200d\u2028", ()),
        ("a\x00b", (CONTROL_NOTE,)),
        ("\x1b[0m", (CONTROL_NOTE,)),
        ("\x08\x0b\x0c\x7f", (CONTROL_NOTE,)),
        ("caf\ufffd", (REPLACEMENT_NOTE,)),
        ("say <|im_end|> twice <|im_end|>", (SPECIAL_NOTE,)),
        ("[INST]", (SPECIAL_NOTE,)),
        ("<|im_en|> [inst] I", ()),
        ("</s>\ufffd\x01", (CONTROL_NOTE, REPLACEMENT_NOTE, SPECIAL_NOTE)),
    ],
)
def test_oddities(text: str, notes: tuple[str, ...]) -> None:
    assert find_oddities(plain(text), PATTERN) == notes
    chat = ChatExample((Message("user", "hello"), Message("assistant", text, True)))
    assert find_oddities(chat, PATTERN) == notes
    thought = ChatExample((Message("assistant", "hi", True, {"reasoning_content": text, "tool_calls": [{}]}),))
    assert find_oddities(thought, PATTERN) == notes


@pytest.mark.parametrize("code", [code for code in range(0x100) if chr(code) not in "\t\n\r"])
def test_control_characters(code: int) -> None:
    assert find_oddities(plain(chr(code)), None) == ((CONTROL_NOTE,) if code < 0x20 or code == 0x7F else ())


def test_no_special_tokens_are_nowhere() -> None:
    assert special_token_pattern([]) is None
    # Some tokenizers have blanks among their added tokens.
    assert special_token_pattern(["", " ", "\n"]) is None
    assert find_oddities(plain("</s>"), None) == ()


def test_tokens_are_text_and_not_patterns() -> None:
    tokens = ["a.c", "(", "[x]", "|"]
    pattern = special_token_pattern(tokens)
    assert pattern is not None
    assert all(re.fullmatch(pattern, token) for token in tokens)
    assert pattern.search("abc x") is None
