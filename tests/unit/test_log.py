"""Log lines hold no secret, and progress adds up."""

import json
import logging
import threading
import time
from types import SimpleNamespace
from typing import Literal

import pytest

from job.log import format_bytes, logger, redact, setup_logging, transfer_progress

SECRET = 'wJalr"\\XUtnFEMI'


@pytest.mark.parametrize("log_format", ["auto", "text", "json"])
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN"])
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
    if log_format == "json":
        first, second = (json.loads(line) for line in text.splitlines())
        assert (first["level"], first["message"]) == ("error", "can't use ***")
        assert first["traceback"].endswith("ValueError: refused: ***")
        assert second["level"] == "warning"
    else:
        assert "error: can't use ***\nTraceback" in text


def test_a_secret_that_holds_another_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minio")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minio123")
    assert redact("minio, minio123") == "***, ***"


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
