"""The pages beside the adapter, whatever befalls their drawing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from job.record import RunRecord
from job.report import pages
from job.report.pages import write_pages

RecordFor = Callable[..., RunRecord]


def test_a_notebooks_backend_is_no_trouble(
    record_for: RecordFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    write_pages(record_for(), tmp_path)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_drawn_costs_no_adapter(
    record_for: RecordFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: RunRecord) -> str:
        raise ValueError("<b>no fonts</b>")

    monkeypatch.setattr(pages, "format_report", fail)
    written = write_pages(record_for(), tmp_path)
    assert [file.path for file in written] == ["README.md", "report.html"]
    assert "ValueError: &lt;b&gt;no fonts" in (tmp_path / "report.html").read_text()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "report.html can't be drawn" in warning
