"""Which characters of its text each token stands for.

The tokenizers library can keep track of that while it splits a text, and takes longer then. The tokens of a byte-level
vocabulary are their text's bytes, one after the other, so their places follow by counting. That they are is never
assumed: a text is counted where its tokens' bytes are its own, and split again with tracking where they are not.
"""

import json
import string
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_BLANKS = "Ġ" + string.whitespace  # the first is how byte-level vocabularies write a space
_NO_TEXT = b"\xff"  # is in no text
_MISSES_AT_MOST = 0.1  # of the texts; where more can't be counted, it isn't tried any longer
_TEXTS_AT_ONCE = 32  # the library's own objects, far larger than the ids, then stay in the processor's cache


class TokenPlaces(Protocol):
    """A text's T tokens, and where in the text they stand."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens' ids (T,)."""

    def find(self, character: int) -> int | None:
        """Return the first token that stands for a character, or None where none does."""

    def range_of(self, token: int) -> tuple[int, int]:
        """Return the half-open range of characters that a token stands for."""


class TrackedPlaces:
    """Places that the tokenizers library has tracked."""

    def __init__(self, encoding: "Encoding") -> None:
        self._encoding = encoding
        self.ids: NDArray[np.int32] = np.array(encoding.ids, dtype=np.int32)

    def find(self, character: int) -> int | None:
        """See TokenPlaces."""
        token: int | None = self._encoding.char_to_token(character)
        return token

    def range_of(self, token: int) -> tuple[int, int]:
        """See TokenPlaces."""
        # Not encoding.offsets[token], which builds the whole list each time.
        found: tuple[int, int] | None = self._encoding.token_to_chars(token)
        return found or (0, 0)  # a token that the tokenizer added by itself


class CountedPlaces:
    """Places that were counted: ids, starts and ends (T,), these two from `zero` on."""

    __slots__ = ("_ends", "_starts", "_zero", "ids")

    def __init__(self, ids: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64], zero: int) -> None:
        self.ids = ids
        self._starts, self._ends, self._zero = starts, ends, zero

    def find(self, character: int) -> int | None:
        """See TokenPlaces."""
        position = character + self._zero
        token = int(self._ends.searchsorted(position, side="right"))
        return token if token < len(self.ids) and self._starts[token] <= position else None

    def range_of(self, token: int) -> tuple[int, int]:
        """See TokenPlaces."""
        return int(self._starts[token]) - self._zero, int(self._ends[token]) - self._zero


class BatchTokenizer:
    """Texts -> tokens and their places, without any that the tokenizer would add."""

    def __init__(self, backend: "Tokenizer") -> None:
        self._backend = backend
        self._counter = ByteCounter(backend) if is_byte_level(backend) else None

    def __call__(self, texts: Sequence[str]) -> list[TokenPlaces]:
        """Tokenise texts together."""
        if self._counter is None:
            return self._track(texts)
        rows = [row for start in range(0, len(texts), _TEXTS_AT_ONCE) for row in self._split(texts, start)]
        places = self._counter.count(texts, rows)
        missed = [index for index, found in enumerate(places) if found is None]
        if len(missed) > _MISSES_AT_MOST * len(texts):
            self._counter = None
        tracked = dict(zip(missed, self._track([texts[index] for index in missed]), strict=True))
        return [tracked[index] if found is None else found for index, found in enumerate(places)]

    def _split(self, texts: Sequence[str], start: int) -> list[list[int]]:
        some = texts[start : start + _TEXTS_AT_ONCE]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(some, add_special_tokens=False)]

    def _track(self, texts: Sequence[str]) -> list[TokenPlaces]:
        return [TrackedPlaces(encoding) for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]


def is_byte_level(backend: "Tokenizer") -> bool:
    """Say whether a tokenizer's vocabulary is made of bytes, so that its tokens can be counted."""
    return "ByteLevel" in _list_types(backend.pre_tokenizer)


class ByteCounter:
    """Counts how many characters the tokens of one byte-level tokenizer stand for."""

    def __init__(self, backend: "Tokenizer") -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        # The blanks around a token's text are no part of it to some tokenizers; the first of a text may be.
        self._trims, self._spares_first = _find_trimming(backend.post_processor)
        self._texts = np.zeros(0, dtype=np.object_)  # by id, of the tokens that have turned up
        self._sizes = np.zeros(0, dtype=np.int32)  # by id: bytes, 0 where the token hasn't turned up
        self._blanks = np.zeros((0, 2), dtype=np.int32)  # by id: in front and behind

    def count(self, texts: Sequence[str], rows: Sequence[list[int]]) -> list[CountedPlaces | None]:
        """Return the places of each text's token ids, or None where they are not the bytes of the text."""
        lengths = [len(row) for row in rows]
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=sum(lengths))
        sizes = self._measure(ids)
        pieces = self._texts[ids].tolist()
        ends = np.cumsum(sizes, dtype=np.int64)
        starts = ends - sizes
        # All texts at once, for numpy takes as long for one as for many: `zeros` are their first bytes among all.
        borders = [0, *accumulate(lengths)]
        zeros = np.append(starts, ends[-1:])[borders[:-1]].tolist() if len(ids) else [0] * len(texts)
        is_counted = []
        for text, (start, stop), zero in zip(texts, pairwise(borders), zeros, strict=True):
            encoded = text.encode()
            is_text = b"".join(pieces[start:stop]) == encoded
            if is_text and len(encoded) != len(text):
                _to_characters(encoded, zero, starts[start:stop], ends[start:stop])
            is_counted.append(is_text and not (self._spares_first and text.startswith(" ")))
        if self._trims:
            leading, trailing = self._blanks[ids].T
            np.minimum(starts + leading, ends, out=starts)
            np.maximum(ends - trailing, starts, out=ends)
        return [
            CountedPlaces(ids[start:stop], starts[start:stop], ends[start:stop], zero) if counted else None
            for (start, stop), zero, counted in zip(pairwise(borders), zeros, is_counted, strict=True)
        ]

    def _measure(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return how many bytes each token is."""
        if (missing := int(ids.max(initial=-1)) + 1 - len(self._sizes)) > 0:
            self._texts = np.pad(self._texts, (0, missing))
            self._sizes = np.pad(self._sizes, (0, missing))
            self._blanks = np.pad(self._blanks, ((0, missing), (0, 0)))
        sizes: NDArray[np.int32] = self._sizes[ids]
        if sizes.all():
            return sizes
        for token in np.unique(ids[sizes == 0]).tolist():
            written = self._backend.id_to_token(token) or ""
            self._texts[token] = text = self._read(token, written)
            self._sizes[token] = len(text)
            without = written.lstrip(_BLANKS), written.rstrip(_BLANKS)
            self._blanks[token] = [len(written) - len(rest) for rest in without]
        return self._sizes[ids]

    def _read(self, token: int, written: str) -> bytes:
        if token in self._added:
            return written.encode() or _NO_TEXT
        try:
            return bytes([self._byte_of[character] for character in written]) or _NO_TEXT
        except KeyError:
            return _NO_TEXT


def _to_characters(encoded: bytes, zero: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Turn the starts and ends of a text's tokens from bytes into characters, both counted from `zero` on.

    A token that holds some of a character's bytes stands for the whole character.
    """
    is_first = (np.frombuffer(encoded, dtype=np.uint8) & 0xC0) != 0x80  # byte of a character
    characters = np.cumsum(is_first) - 1 + zero  # of each byte
    starts[:] = characters[starts - zero]
    ends[:] = characters[ends - zero - 1] + 1


def _byte_characters() -> list[str]:
    """Return the character that byte-level vocabularies write for each byte: printable ones as they are in Latin-1, and
    the others, in their order, from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _find_trimming(post_processor: Any) -> tuple[bool, bool]:
    """Say whether a tokenizer leaves blanks out of a token's range, and if so, whether it spares a text's first one."""
    for step in _list_steps(post_processor):
        if step["type"] == "ByteLevel" and step["trim_offsets"]:
            return True, bool(step["add_prefix_space"])
    return False, False


def _list_types(step: Any) -> list[str]:
    return [part["type"] for part in _list_steps(step)]


def _list_steps(step: Any) -> list[dict[str, Any]]:
    """Return the settings of a tokenizer's step, and of those that it consists of."""
    if step is None:
        return []
    settings = json.loads(step.__getstate__())
    return [settings, *settings.get("pretokenizers", []), *settings.get("processors", [])]
