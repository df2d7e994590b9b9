"""Counted places of tokens must be those that the tokenizers library tracks, for every character and token."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from job.data.encoding.places import BatchTokenizer, ByteCounter, CountedPlaces, TokenPlaces, TrackedPlaces

PIECES = ["How late", "9.", " ", "  ", "\n", "\n\n", "\t", "\x00", "\u00a0", "\u00ad", "<|end|>", "Ġ"]
PIECES += ["é", "e\u0301", "œ", "ÿ", "你", "🙂", "👩\u200d👩\u200d👧"]
KINDS = ["untrimmed", "trimmed", "trimmed but for the first", "composed", "split first"]


def make_tokenizer(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    if kind == "split first":  # as Qwen's and Llama 3's
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken("<|end|>", special=True), AddedToken(" \n", special=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["How late are you open?   Until nine. 你們幾點關門 déjà 99"] * 5, trainer)
    if kind.startswith("trimmed"):
        trims = processors.ByteLevel(add_prefix_space=kind != "trimmed", trim_offsets=True)
        tokenizer.post_processor = processors.Sequence([trims])
    elif kind == "untrimmed":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    elif kind == "composed":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def describe(text: str, places: TokenPlaces) -> Any:
    ids = places.ids.tolist()
    return ids, [places.range_of(token) for token in range(len(ids))], [places.find(at) for at in range(len(text))]


def make_texts(count: int) -> list[str]:
    rng = random.Random(5)
    return ["", "plain", " starts blank", *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count))]


def track(tokenizer: Tokenizer, text: str) -> TrackedPlaces:
    return TrackedPlaces(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
def test_counted_places_are_the_tracked_ones(kind: str) -> None:
    tokenizer, texts = make_tokenizer(kind), make_texts(300)
    counter = ByteCounter(tokenizer)
    counted = 0
    for start in range(0, len(texts), 50):
        batch = texts[start : start + 50]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, places in zip(batch, counter.count(batch, [found.ids for found in encodings]), strict=True):
            if places is not None:
                assert describe(text, places) == describe(text, track(tokenizer, text))
                counted += 1
    # Not counted: what NFC composes, and first blanks that trimming spares.
    assert counted == len(texts) if kind in ("untrimmed", "trimmed", "split first") else counted > len(texts) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_cannot_be_counted_is_tracked(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    texts = [*["How late are you open?"] * 20, "e\u0301", " blank", "é"]
    tokenize = BatchTokenizer(tokenizer)
    for _ in range(2):
        found = tokenize(texts)
        assert [describe(text, places) for text, places in zip(texts, found, strict=True)] == [
            describe(text, track(tokenizer, text)) for text in texts
        ]
        assert isinstance(found[0], CountedPlaces)


def test_it_is_given_up_where_texts_are_changed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("untrimmed")
    tokenizer.normalizer = normalizers.Lowercase()
    tokenize = BatchTokenizer(tokenizer)
    assert isinstance(tokenize(["How late"])[0], TrackedPlaces)
    monkeypatch.setattr(ByteCounter, "count", None)  # is asked no more
    assert isinstance(tokenize(["how late"])[0], TrackedPlaces)


def test_other_vocabularies_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteCounter, "count", None)
    tokenizer = Tokenizer(models.WordLevel({"How": 0, "late": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    [places] = BatchTokenizer(tokenizer)(["How late?"])
    assert places.ids.tolist() == [0, 1, 2]


def test_ids_may_have_gaps() -> None:
    alphabet = {letter: 1000 + 7 * number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    [places] = BatchTokenizer(tokenizer)(["é a"])
    assert isinstance(places, CountedPlaces)
    assert describe("é a", places) == describe("é a", track(tokenizer, "é a"))
