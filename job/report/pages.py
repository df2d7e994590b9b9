"""The pages that are published with the adapter, made of its record: the model card and report.html."""

from pathlib import Path

from job.record import PAGES, PublishedFile, RunRecord, describe_file
from job.report.card import format_model_card
from job.report.html import format_report


def write_pages(record: RunRecord, folder: Path) -> list[PublishedFile]:
    """Write both into the folder of the files to publish, and return them for the manifest."""
    for name, page in zip(PAGES, (format_model_card(record), format_report(record)), strict=True):
        (folder / name).write_text(page, encoding="utf-8", errors="replace")
    return [describe_file(folder / name, folder) for name in PAGES]
