"""Log lines hold no secret, and progress adds up."""

import ast
import json
import logging
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from job.log import (
    EVENTS,
    adopt_library_logs,
    event,
    format_bytes,
    format_duration,
    logger,
    redact,
    setup_logging,
    transfer_progress,
)

JOB = Path(__file__).parents[2] / "job"
SECRET = 'wJalr"\\XUtnFEMI'


@pytest.mark.parametrize("log_format", ["auto", "text", "json"])
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "WANDB_API_KEY"])
def test_lines_and_tracebacks_are_redacted(
    log_format: Literal["auto", "text", "json"],
    name: str,
    capsys: pytest.CaptureFixture[str],
    own_logging: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, SECRET)
    setup_logging(log_format, "info")
    try:
        raise ValueError(f"refused: {SECRET}")
    except ValueError:
        logger.exception("can't use %s", SECRET)
    logging.getLogger("some.library").warning("token %s", SECRET)
    logger.debug("not shown")
    text = capsys.readouterr().err
    assert "wJalr" not in text
    assert "refused: ***" in text
    assert "token ***" in text
    assert "not shown" not in text
    if log_format != "text":  # stderr is no terminal here
        first, second = (json.loads(line) for line in text.splitlines())
        assert (first["level"], first["event"], first["message"]) == ("error", "error", "can't use ***")
        assert first["traceback"].endswith("ValueError: refused: ***")
        assert (second["level"], second["event"]) == ("warning", "warning")
    else:
        assert "error: can't use ***\nTraceback" in text


def test_a_secret_that_holds_another_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minio")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minio123")
    assert redact("minio, minio123") == "***, ***"


def test_a_password_in_a_uri_goes() -> None:
    text = (
        "can't reach https://me:p%40ss:word@mlflow.example:5000/api, https://mlflow.example:5000/a@b, s3://bucket/a@b"
    )
    assert redact(text) == text.replace("p%40ss:word", "***")


def test_fields_of_an_event_are_redacted_and_valid_json(
    capsys: pytest.CaptureFixture[str], own_logging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    setup_logging("json", "info")
    logger.info("diverged", extra=event("ended", reason=f"with {SECRET}", code=80, step=None, loss=float("nan")))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of a library", stacklevel=1)

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    ended, warned = (json.loads(line, parse_constant=refuse) for line in capsys.readouterr().err.splitlines())
    assert {name: ended[name] for name in ("event", "reason", "code", "step", "loss")} == {
        "event": "ended",
        "reason": "with ***",
        "code": 80,
        "step": None,
        "loss": "nan",
    }
    assert warned["event"] == "warning"
    assert "of a library" in warned["message"]


def event_calls() -> Iterator[tuple[str, set[str | None]]]:
    for path in JOB.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "event":
                [name] = node.args
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}"
                yield str(name.value), {keyword.arg for keyword in node.keywords}


def test_every_event_is_documented_and_every_documented_one_there_is() -> None:
    calls = list(event_calls())
    assert {name for name, _ in calls} | {"log", "warning", "error"} == EVENTS.keys()
    for name, fields in calls:
        documented = EVENTS[name].fields.keys()
        assert fields - {None} <= documented, name  # None: **fields, which the test of a whole run looks at
        assert None in fields or fields == documented, name


def test_a_value_too_short_for_a_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the")
    assert redact("the cat") == "the cat"


class SlowCount(int):
    """A number that lets other threads run while it is added."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return other + int(self)


def test_progress_of_several_threads_adds_up(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("job.log.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    caplog.set_level(logging.INFO, logger="sft_job")
    with transfer_progress("data", 4096) as advance:

        def move() -> None:
            for _ in range(128):
                advance(SlowCount(5))
                advance(SlowCount(-3))  # a try that failed

        threads = [threading.Thread(target=move) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert caplog.messages == []
        clock.now_s = 60.0
        advance(0)
        advance(0)  # no burst of lines after a long silence
        assert caplog.messages == ["data: 2.0 KiB of 4.0 KiB"]
        clock.now_s = 70.0
        advance(2048)
    assert caplog.messages[1:] == ["data: 4.0 KiB of 4.0 KiB"]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_for_people(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (86_400, "24:00:00")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_libraries_that_log_by_themselves_are_adopted(
    own_logging: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(library, "propagate", False)
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    setup_logging("json", "info")
    adopt_library_logs()
    logging.getLogger("huggingface_hub.client").warning("no luck with %s", "hf_geheim")
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "no luck with ***"
