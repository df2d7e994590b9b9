"""The rows that can't be used: all of them in a file, and a short account of them in memory, however many there are."""

import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from job.data.reading.rows import BadRow, dump_text

SHOWN_ROWS = 20
MAX_REASONS = 50
OTHER_REASONS = "other reasons"
_NUMBER = re.compile(r"\d+")


class BadRows:
    """Writes bad rows to a JSONL file of `file`, `line`, `reason` and `row`; use it as a context manager.

    `row` is the row as a JSON value, or its text where it could not be read as one.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.shown: list[str] = []  # the first as `file:line: reason`
        self.reasons: Counter[str] = Counter()  # rows by reason, in which numbers are N
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, rows: list[BadRow]) -> None:
        """Count and write rows."""
        for row in rows:
            self.count += 1
            if len(self.shown) < SHOWN_ROWS:
                self.shown.append(f"{row.name}:{row.number}: {row.reason}")
            reason = _NUMBER.sub("N", row.reason)
            # Reasons quote what they found, so there may be as many as rows.
            is_full = len(self.reasons) >= MAX_REASONS - 1 and reason not in self.reasons
            self.reasons[OTHER_REASONS if is_full else reason] += 1
            # Half of a surrogate pair can't be UTF-8: its escape is what JSON writes for it.
            self._file.write(_to_line(row).encode("utf-8", "backslashreplace"))


def _to_line(row: BadRow) -> str:
    where = f'"file": {dump_text(row.name)}, "line": {row.number}'
    return f'{{{where}, "reason": {dump_text(row.reason)}, "row": {row.content}}}\n'
