"""Tokenised data sets kept in a folder, so that a job that starts again need not tokenise again.

An entry is a folder named by a digest of everything that its content depends on. It gets its name by a rename when it
is whole and on the disk, so what a killed job or a crashed machine leaves behind is never taken for one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from pydantic import TypeAdapter

from job.data.reading.files import SourceFile
from job.data.shaping.shapes import RowFormat, RowOptions
from job.data.statistics import TokenizedData
from job.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = "tokens.arrow"
BAD_ROWS = "bad_rows.jsonl"
_PER_ROW = "per_row.npz"
_FACTS = "facts.json"
_UNFINISHED = ".unfinished"
_KEY_DIGITS = 32
_OPTIONS = TypeAdapter(RowOptions)
_FORMATS = TypeAdapter(tuple[RowFormat | None, ...])


def make_key(files: Sequence[SourceFile], tokenizer: "PreTrainedTokenizerBase", options: RowOptions) -> str:
    """Return a digest of the files' names and contents, the tokenizer, the options, and the code that uses them."""
    parts = {
        "files": [(file.name, file.sha256) for file in files],
        "options": _OPTIONS.dump_python(options, mode="json"),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
        "libraries": [version(library) for library in ("tokenizers", "transformers", "jinja2")],
        # No version number that someone has to remember to raise: these modules are what makes tokens of rows.
        "code": [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def load_entry(entry: Path) -> TokenizedData | None:
    """Return what an entry holds, or None where there is none; one that is damaged is removed."""
    if not entry.is_dir():
        return None
    try:
        return _read_entry(entry)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        logger.warning("%s is damaged, so the rows are tokenized again: %s", entry, error)
        shutil.rmtree(entry)
        return None


def _read_entry(entry: Path) -> TokenizedData:
    (entry / TOKENS).stat()
    facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
    with np.load(entry / _PER_ROW, allow_pickle=False) as per_row:
        return TokenizedData(
            path=entry / TOKENS,
            names=tuple(facts["names"]),
            rows_per_file=tuple(facts["rows_per_file"]),
            formats=_FORMATS.validate_python(facts["formats"]),
            lengths_tokens=per_row["lengths_tokens"],
            supervised_tokens=per_row["supervised_tokens"],
            first_supervised=per_row["first_supervised"],
            digests=per_row["digests"],
            eos_supervised_rows=facts["eos_supervised_rows"],
            end_token_rows={int(token): rows for token, rows in facts["end_token_rows"].items()},
            rows_with=facts["rows_with"],
            rows_read=facts["rows_read"],
            bad_rows=facts["bad_rows"],
            bad_reasons=facts["bad_reasons"],
            shown_bad_rows=tuple(facts["shown_bad_rows"]),
            bad_rows_path=entry / BAD_ROWS,
        )


def save_facts(data: TokenizedData, folder: Path) -> None:
    """Write into an entry's folder all that is known of the data set beside its two files."""
    facts = {name: value for name, value in vars(data).items() if not isinstance(value, np.ndarray | Path)}
    facts["formats"] = _FORMATS.dump_python(data.formats, mode="json")
    np.savez(
        folder / _PER_ROW,
        lengths_tokens=data.lengths_tokens,
        supervised_tokens=data.supervised_tokens,
        first_supervised=data.first_supervised,
        digests=data.digests,
    )
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


@contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes the entry when the block ends well; then all other entries are removed.

    When it ends in an error, nothing of it is left.
    """
    unfinished = entry.with_name(entry.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a job that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _write_through(path)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for other in entry.parent.iterdir():
        if other != entry:
            shutil.rmtree(other)


def _write_through(path: Path) -> None:
    """Have the kernel write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
