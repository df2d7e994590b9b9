"""What was tokenised before is found again, and nothing else is taken for it."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data import Encoders, RowOptions, SourceFile, TokenizedData, load_tokenizer, tokenize_files
from job.data import cache as cache_module
from job.data import prepare as prepare_module

ROWS = [{"prompt": f"question {number}", "completion": "word " * (number + 1)} for number in range(5)]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def file(tmp_path: Path) -> SourceFile:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "7\n")
    return SourceFile(path, "s3://bucket/a.jsonl", "00ff")


class Prepare:
    """Tokenises into one folder and says whether it did, or found what was there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenized = False

    def __call__(self, files: list[SourceFile], tokenizer: Any, options: RowOptions | None = None) -> TokenizedData:
        self.tokenized = False
        return tokenize_files(
            files, tokenizer, options or RowOptions(), folder=self.folder, encoders=Encoders(1), report=self._note
        )

    def entries(self) -> list[Path]:
        return list(self.folder.iterdir())

    def _note(self, rows: int, size_bytes: int) -> None:
        self.tokenized = True


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    return Prepare(tmp_path / "tokens")


def test_the_same_again_is_loaded_with_all_that_is_known_of_it(
    prepare: Prepare, tokenizer: Any, file: SourceFile, caplog: pytest.LogCaptureFixture
) -> None:
    made = prepare([file], tokenizer)
    assert prepare.tokenized
    content = made.path.read_bytes()
    with caplog.at_level("INFO", "sft_job"):
        found = prepare([file], tokenizer)
    assert not prepare.tokenized
    assert "tokenized before: reusing" in caplog.text
    assert found.path.read_bytes() == content
    assert found.bad_rows == 1
    for name, value in vars(made).items():
        other = vars(found)[name]
        assert type(value) is type(other), name
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype, name
            assert np.array_equal(value, other), name
        else:
            assert value == other, name


def test_a_fresh_tokenizer_of_the_same_model_is_the_same(
    prepare: Prepare, tokenizer: Any, tokenizer_folder: Path, file: SourceFile
) -> None:
    prepare([file], tokenizer)
    prepare([file], load_tokenizer(tokenizer_folder))
    assert not prepare.tokenized


def other_content(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    return tokenizer, file._replace(sha256="ff00"), options


def other_name(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    return tokenizer, file._replace(name="s3://bucket/b.jsonl"), options


def other_options(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    return tokenizer, file, replace(options, loss_on="all")


def other_template(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    tokenizer.chat_template += "{# #}"
    return tokenizer, file, options


def other_eos(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer, file, options


def other_vocabulary(tokenizer: Any, file: SourceFile, options: RowOptions) -> tuple[Any, SourceFile, RowOptions]:
    tokenizer.add_tokens(["question"])
    return tokenizer, file, options


@pytest.mark.parametrize(
    "change", [other_content, other_name, other_options, other_template, other_eos, other_vocabulary]
)
def test_anything_else_is_tokenised_anew_and_takes_its_place(
    prepare: Prepare, tokenizer: Any, file: SourceFile, change: Any
) -> None:
    before = prepare([file], tokenizer)
    tokenizer, file, options = change(tokenizer, file, RowOptions())
    after = prepare([file], tokenizer, options)
    assert prepare.tokenized
    assert prepare.entries() == [after.path.parent]
    assert not before.path.exists()


def test_what_a_killed_job_left_is_not_taken_for_a_result(prepare: Prepare, tokenizer: Any, file: SourceFile) -> None:
    made = prepare([file], tokenizer)
    content = made.path.read_bytes()
    made.path.parent.rename(made.path.parent.with_name(made.path.parent.name + ".unfinished"))
    again = prepare([file], tokenizer)
    assert prepare.tokenized
    assert again.path.read_bytes() == content
    assert prepare.entries() == [again.path.parent]


def test_an_error_leaves_what_was_there(
    prepare: Prepare, tokenizer: Any, file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare([file], tokenizer)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "save_facts", fail)
        with pytest.raises(OSError, match="No space left"):
            prepare([file._replace(sha256="ff00")], tokenizer)
    assert prepare.entries() == [made.path.parent]
    prepare([file], tokenizer)
    assert not prepare.tokenized


@pytest.mark.parametrize("name", ["facts.json", "per_row.npz", "tokens.arrow"])
@pytest.mark.parametrize("content", [b"", None])
def test_a_damaged_entry_is_made_anew(
    prepare: Prepare, tokenizer: Any, file: SourceFile, name: str, content: Any
) -> None:
    made = prepare([file], tokenizer)
    damaged = made.path.parent / name
    damaged.unlink()
    if content is not None and name != "tokens.arrow":
        damaged.write_bytes(content)
    again = prepare([file], tokenizer)
    assert prepare.tokenized
    assert again.lengths_tokens.tolist() == made.lengths_tokens.tolist()
    assert again.path.is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_as_such(small_disk: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 300}) + "\n" for number in range(1_000)))
    with pytest.raises(OSError, match="space") as caught:
        Prepare(small_disk / "tokens")([SourceFile(path, "large.jsonl", "")], tokenizer)
    assert caught.value.errno == errno.ENOSPC
    assert list((small_disk / "tokens").iterdir()) == []


def test_the_code_is_part_of_the_key(
    tokenizer: Any, file: SourceFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = cache_module.make_key([file], tokenizer, RowOptions())
    (tmp_path / "other.py").write_text("# other code\n")
    monkeypatch.setattr(cache_module, "__file__", str(tmp_path / "cache.py"))
    assert cache_module.make_key([file], tokenizer, RowOptions()) != before
