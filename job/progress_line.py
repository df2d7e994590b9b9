"""One line on the terminal that says how far training has come, written anew in its place."""

import os
import sys
import time

from job.log import CLEAR_LINE, can_redraw

_INTERVAL_S = 0.1
_COLUMNS = 80  # of a terminal that doesn't say how wide it is


class ProgressLine:
    """Draws the line on stderr, if that is a terminal. Log lines of this and of other processes take its place."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_shown = is_wanted and can_redraw()
        self._drawn_s = 0.0  # by the monotonic clock

    def is_due(self) -> bool:
        """Say whether it is worth drawing."""
        return self._is_shown and time.monotonic() >= self._drawn_s + _INTERVAL_S

    def draw(self, text: str) -> None:
        """Show a text without line breaks, as much of it as the terminal's width takes."""
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
        self._drawn_s = time.monotonic()
        self._write(CLEAR_LINE + text[: columns - 1])  # in the last column, some terminals begin a new line

    def clear(self) -> None:
        """Leave nothing of it."""
        if self._is_shown:
            self._write(CLEAR_LINE)

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
