"""The outcome fits into a termination log and holds no secret."""

import json
from pathlib import Path

import pytest

from job.errors import CONFIG, OK
from job.outcome import Progress, format_outcome, write_outcome
from job.settings_runtime import RuntimeSettings

LIMIT_BYTES = 4096


def runtime(path: Path, *, was_asked_for: bool) -> RuntimeSettings:
    return RuntimeSettings.model_construct({"termination_log"} if was_asked_for else set(), termination_log=path)


def test_a_short_outcome_is_whole() -> None:
    progress = Progress(run_id="0123456789abcdef", step=3, total_steps=10, output="s3://b/o")
    assert json.loads(format_outcome(CONFIG, "wrong", "right", progress)) == {
        "code": 78,
        "name": "config",
        "message": "wrong",
        "hint": "right",
        "run_id": "0123456789abcdef",
        "step": 3,
        "total_steps": 10,
        "output": "s3://b/o",
    }


@pytest.mark.parametrize("character", ["a", '"', "\n", "語", "\U0001f600", "\ud800"])
@pytest.mark.parametrize(("message", "hint", "output"), [(9999, 10, 10), (10, 9999, 10), (9999, 9999, 4000)])
def test_a_long_outcome_is_cut_and_still_json(character: str, message: int, hint: int, output: int) -> None:
    text = format_outcome(CONFIG, character * message, character * hint, Progress(output=character * output))
    assert 3000 < len(text.encode()) <= LIMIT_BYTES
    outcome = json.loads(text)
    assert (outcome["code"], outcome["name"]) == (78, "config")
    for name, length in (("message", message), ("hint", hint), ("output", output)):
        assert 0 < len(outcome[name]) <= length
        assert length > 10 or outcome[name] == character * length  # what is short stays whole


def test_secrets_are_redacted_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t" * 10)
    text = format_outcome(CONFIG, "s3cr3t" * 10 + "x" * 3800 + "s3cr3t" * 10, "s3cr3t" * 10, Progress())
    assert "s3cr3t" not in text
    assert json.loads(text)["hint"] == "***"


def test_the_default_path_is_written_only_where_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "termination-log"
    write_outcome(runtime(path, was_asked_for=False), "first")
    assert not path.exists()
    write_outcome(runtime(path, was_asked_for=True), "second")
    assert path.read_text() == "second"
    write_outcome(runtime(path, was_asked_for=False), "third")
    assert path.read_text() == "third"


def test_a_path_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_outcome(runtime(tmp_path / "no" / "folder", was_asked_for=True), format_outcome(OK, "", "", Progress()))
    assert "SFT_RUNTIME__TERMINATION_LOG=" in caplog.text
