"""What the job says while it runs: log lines as text or JSON on stderr, and progress of transfers.

As JSON, each line is one event of `EVENTS`, with its numbers as fields: `logger.info(..., extra=event("phase", ...))`.
Every line, tracebacks included, passes through `redact`, so that a secret which a library put into its message
doesn't come out.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger("sft_job")

SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
_PASSWORD_IN_URI = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
_PROGRESS_INTERVAL_S = 10.0
_FILE_WIDTH = 120
CLEAR_LINE = "\r\x1b[2K"  # of a terminal: what a process, this one or another, had drawn there as its progress

LogFormat = Literal["auto", "text", "json"]


@dataclass(frozen=True)
class Event:
    """One kind of line of a JSON log: when it is written, and what it has beside time, level, event and message. A
    field that isn't known yet, or doesn't apply, is null."""

    when: str
    fields: dict[str, str]


EVENTS = {
    "phase": Event("a part of the run begins", {"phase": "its name"}),
    "data": Event(
        "the rows are read; the message holds the X-ray",
        {
            "rows": "rows read",
            "train_rows": "rows to train on",
            "eval_rows": "rows held out",
            "train_tokens": "tokens to train on",
            "supervised_tokens": "those of them that the loss is taken on",
        },
    ),
    "plan": Event(
        "the plan is made, before anything is trained; the message holds its table",
        {
            "run_id": "name of the run",
            "total_steps": "optimizer steps",
            "epochs": "passes over the training rows",
            "global_batch_size": "sequences a step",
            "world_size": "worker processes",
            "engine": "distributed engine",
            "device": "`cuda` or `cpu`",
            "estimated_memory_bytes": "estimate for each process",
        },
    ),
    "transfer": Event(
        "a transfer goes on, every ten seconds",
        {"label": "what is transferred", "done_bytes": "so far", "total_bytes": "in all"},
    ),
    "step": Event(
        "after the first step, the last, and every `SFT_TRAIN__LOGGING_STEPS`, as in `metrics.jsonl`",
        {
            "step": "optimizer steps done",
            "total_steps": "of the plan",
            "epoch": "passes over the training rows",
            "loss": "mean over the steps since the line before",
            "grad_norm": "L2 norm of the last step's gradient, before clipping",
            "learning_rate": "of the last step",
            "tokens": "learned from so far, without padding",
            "tokens_per_second": "since the line before",
            "step_s": "seconds a step since the line before, without evaluations and checkpoints",
            "data_wait_s": "those of them in which rank 0 waited for rows",
            "elapsed_s": "seconds of training so far",
            "eta_s": "seconds left, by the mean so far",
            "memory_bytes": "rank 0's peak so far: PyTorch's tensors on a GPU, else resident",
        },
    ),
    "evaluation": Event(
        "the held-out loss is known: step 0 is the base model's",
        {"step": "optimizer steps done", "total_steps": "of the plan", "eval_loss": "loss on the held-out rows"},
    ),
    "checkpoint": Event(
        "a checkpoint is in the store",
        {
            "step": "optimizer steps done",
            "size_bytes": "its size",
            "save_s": "seconds that training stood still for it",
            "upload_s": "seconds until it was there",
        },
    ),
    "published": Event(
        "the adapter is in its slot and read back",
        {"uri": "the slot", "files": "files published", "size_bytes": "of all of them"},
    ),
    "phases": Event(
        "a run or check ends that has come to its data, right before the last line",
        {"total_s": "seconds in all, from the start of the process", "phases": "those of each phase, by name"},
    ),
    "warning": Event("something is probably wrong, or was got over", {}),
    "error": Event("what led to the end", {"traceback": "of what nobody foresaw, where there is one"}),
    "ended": Event(
        "last of all",
        {
            "code": "exit code",
            "name": "its name",
            "reason": "what happened",
            "hint": "what to do about it",
            "run_id": "name of the run",
            "step": "optimizer steps done",
            "total_steps": "of the plan",
            "output": "the slot",
        },
    ),
    "log": Event("all else", {}),
}


def redact(text: str) -> str:
    """Replace the values of the credential variables, and passwords in URIs, wherever they stand in a text."""
    secrets = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    for secret in sorted(secrets, key=len, reverse=True):  # a long one may hold a short one: minio123 and minio
        if len(secret) >= 4:  # a shorter one would blank out ordinary words
            text = text.replace(secret, "***")
    return _PASSWORD_IN_URI.sub(r"\1:***@", text)


def event(name: str, /, **fields: Any) -> dict[str, Any]:
    """Return the `extra` of a log line that is an event of `EVENTS`, with its fields."""
    return {"event": name, "fields": fields}


def log_warnings(warnings: Iterable[str]) -> None:
    """Log each of them."""
    for warning in warnings:
        logger.warning("%s", warning)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{clock} {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


class _TerminalFormatter(_TextFormatter):
    """Puts each line in the place of the progress line, which whoever draws it draws anew below."""

    def format(self, record: logging.LogRecord) -> str:
        return CLEAR_LINE + super().format(record)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.__dict__.get("event", _event_by_level(record.levelno)),
            "message": redact(record.getMessage()),
        }
        line |= {name: _as_json(value) for name, value in record.__dict__.get("fields", {}).items()}
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def _event_by_level(level: int) -> str:
    return "error" if level >= logging.ERROR else "warning" if level >= logging.WARNING else "log"


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):  # NaN isn't JSON
        return str(value)
    return redact(value) if isinstance(value, str) else value


def setup_logging(log_format: LogFormat, level: str) -> None:
    """Send the job's log lines to stderr in the format asked for, and other libraries' warnings with them."""
    handler = logging.StreamHandler(sys.stderr)
    if settle_log_format(log_format) == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TerminalFormatter() if can_redraw() else _TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)  # else Python writes them by itself
    logger.setLevel(level.upper())


def adopt_library_logs() -> None:
    """Have the lines of libraries that write them by themselves come as ours do, redacted; to be called after their
    import, which sets that up."""
    for name in ("transformers", "huggingface_hub"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def settle_log_format(log_format: LogFormat) -> Literal["text", "json"]:
    """Return what `auto` means for this process: text on a terminal, JSON elsewhere."""
    if log_format == "auto":
        return "text" if sys.stderr.isatty() else "json"
    return log_format


def can_redraw() -> bool:
    """Say whether stderr is a terminal on which a line can be written anew in its place."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True)
class Terminal:
    """What the log is read on: columns, and whether they have colours."""

    width: int
    has_colour: bool


def find_terminal(log_format: LogFormat) -> Terminal:
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
                fields = event("transfer", label=label, done_bytes=done_bytes, total_bytes=total_bytes)
                logger.info("%s: %s of %s", label, format_bytes(done_bytes), format_bytes(total_bytes), extra=fields)

    yield advance


def format_bytes(size_bytes: float) -> str:
    """Write a size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Write a time for people: `1:02:03`, `4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
