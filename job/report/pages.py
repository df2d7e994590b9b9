"""The pages that are published with the adapter, made of its record: the model card and report.html."""

import html
from pathlib import Path

from job.log import logger
from job.record import PAGES, PublishedFile, RunRecord, describe_file
from job.report.card import format_model_card
from job.report.html import format_report


def write_pages(record: RunRecord, folder: Path) -> list[PublishedFile]:
    """Write both into the folder of the files to publish, and return them for the manifest."""
    for name, page in zip(PAGES, (format_model_card(record), _draw_report(record)), strict=True):
        (folder / name).write_text(page, encoding="utf-8", errors="replace")
    return [describe_file(folder / name, folder) for name in PAGES]


def _draw_report(record: RunRecord) -> str:
    try:
        return format_report(record)
    except Exception as error:  # noqa: BLE001 - whatever it is: hours of training are not lost for a page
        reason = f"{type(error).__name__}: {error}"
        logger.warning("report.html can't be drawn, and is published without its contents: %s", reason)
        return (
            f"<!DOCTYPE html>\n<title>Run {record.run_id}</title>\n"
            f"<p>The report could not be drawn ({html.escape(reason)}). "
            "All that it would have shown is in manifest.json, plan.json, evaluation.json and metrics.jsonl.</p>\n"
        )
