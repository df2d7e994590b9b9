"""What the job says while it runs: log lines as text or JSON on stderr, and progress of transfers.

Every line, tracebacks included, passes through `redact`, so that a secret which a library put into its message
doesn't come out.
"""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger("sft_job")

SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
_PROGRESS_INTERVAL_S = 10.0
_FILE_WIDTH = 120


def redact(text: str) -> str:
    """Replace the values of the credential variables wherever they stand in a text."""
    secrets = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    for secret in sorted(secrets, key=len, reverse=True):  # a long one may hold a short one: minio123 and minio
        if len(secret) >= 4:  # a shorter one would blank out ordinary words
            text = text.replace(secret, "***")
    return text


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{clock} {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            event["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(event, ensure_ascii=False)


def setup_logging(log_format: Literal["auto", "text", "json"], level: str) -> None:
    """Send the job's log lines to stderr in the format asked for, and other libraries' warnings with them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(level.upper())


@dataclass(frozen=True)
class Terminal:
    """What the log is read on: columns, and whether they have colours."""

    width: int
    has_colour: bool


def find_terminal(log_format: Literal["auto", "text", "json"]) -> Terminal:
    """Return the terminal on stderr, or what fits a log file where there is none. NO_COLOR (no-color.org) is heeded."""
    if log_format == "json" or not sys.stderr.isatty():
        return Terminal(_FILE_WIDTH, has_colour=False)
    has_colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Terminal(max(60, shutil.get_terminal_size().columns), has_colour)


@contextmanager
def transfer_progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a transfer's progress: a bar on a terminal, otherwise a line every ten seconds.

    Yields the function that takes each finished piece's size in bytes; it may be called from several threads.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, leave=False) as bar:
            yield lambda size_bytes: (bar.update(size_bytes), None)[1]
        return
    lock = threading.Lock()
    done_bytes = 0
    next_line_s = time.monotonic() + _PROGRESS_INTERVAL_S

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes, next_line_s
        with lock:
            done_bytes += size_bytes
            if time.monotonic() >= next_line_s:
                next_line_s = time.monotonic() + _PROGRESS_INTERVAL_S
                logger.info("%s: %s of %s", label, format_bytes(done_bytes), format_bytes(total_bytes))

    yield advance


def format_bytes(size_bytes: float) -> str:
    """Write a size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
