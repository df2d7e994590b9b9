"""A full disk is recognised whatever library ran into it: /dev/full is one for every process."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from job.disk_full import is_disk_full

FULL = Path("/dev/full")


def write_by_arrow() -> None:
    with pa.OSFile(str(FULL), "wb") as stream:
        stream.write(b"x" * 100_000)


@pytest.mark.parametrize(
    "write",
    [
        lambda: FULL.write_text("x"),
        lambda: np.zeros(10_000).tofile(FULL),
        write_by_arrow,
        lambda: Tokenizer(BPE(vocab={f"token{n}": n for n in range(10_000)}, merges=[])).save(str(FULL)),
    ],
    ids=["python", "numpy", "arrow", "tokenizers"],
)
def test_of_a_library(write: Callable[[], object]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own
        write()
    assert is_disk_full(caught.value)


def test_behind_another_error() -> None:
    error = ValueError("while saving")
    error.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(error)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), MemoryError(), ValueError("error 28")])
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_disk_full(error)
