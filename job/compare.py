"""`sft-job compare URI URI ...`: published runs side by side, of their settings only what differs."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from job.errors import NotFoundError
from job.evaluation import Evaluation, LossChange, RowLoss, compare_losses
from job.handover import METRICS
from job.log import format_bytes, logger
from job.manifest import MANIFEST_NAME
from job.report.columns import count_columns, cut, make_visible
from job.report.numbers import as_number, format_duration, format_perplexity
from job.report.plan import write_value
from job.report.series import read_series
from job.report.text import draw_curve, question_of, shorten
from job.settings_problems import DELIMITER, PREFIX
from job.slot import is_manifest
from job.storage import open_store

# What says where and how a run went, and what is compared as the plan or the data have it.
_NOT_COMPARED = {
    "model": {"id", "revision"},
    "data": {"uri", "eval_uri"},
    "output": {"uri"},
    "checkpoint": {"uri"},
}
_NOT_COMPARED_GROUPS = {"runtime"}
_NOT_COMPARED_PLAN = {"sources", "warnings", "memory"}
_CELL_WIDTHS = (16, 44)  # columns, at least and at most
_FILE_WIDTH = 120
_LABEL_WIDTH = 34
_CURVE_WIDTH = 24
_DIGITS = 12  # of a sha256
_SAMPLES = 5
_NONE = "-"

Row = tuple[str, list[str]]  # a label, and a cell for each run


@dataclass(frozen=True)
class PublishedRun:
    """What a slot says of its run: the manifest, the lines of metrics.jsonl, and the evaluation where there is one."""

    uri: str
    manifest: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluation: Evaluation | None

    @property
    def loss(self) -> LossChange | None:
        """The change of its held-out loss."""
        return None if self.evaluation is None else self.evaluation.loss

    def metric(self, name: str) -> float | None:
        """Return one of the final metrics, where it is a number."""
        return as_number((self.manifest.get("metrics") or {}).get(name))


def compare(uris: Sequence[str]) -> str:
    """Print a table of the runs that are published at these places, as wide as the terminal; return what was done.

    Raises NotFoundError for a place without a manifest, and the stores' errors.
    """
    runs = [read_run(uri) for uri in uris]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _FILE_WIDTH
    print("\n".join(format_comparison(runs, width=width)))
    return f"compared {len(runs)} runs"


def read_run(uri: str) -> PublishedRun:
    """Read what is published at a place, but for the adapter. Raises NotFoundError where no run is."""
    store = open_store(uri, setting="URI")
    manifest = _parse_manifest(store.read(MANIFEST_NAME))
    if manifest is None:
        raise NotFoundError(
            f"{uri}: no run is published there, for there is no {MANIFEST_NAME} of this job's",
            hint="name the place of one run: what its SFT_OUTPUT__URI was, with {run_id} filled in",
        )
    lines, evaluation = store.read(METRICS), store.read("evaluation.json")
    return PublishedRun(uri, manifest, _parse_lines(lines), _parse_evaluation(uri, evaluation))


def format_comparison(runs: Sequence[PublishedRun], *, width: int) -> Iterator[str]:
    """Yield the lines of the table, of `width` columns where that is enough for the number of runs."""
    cell = min(max((width - _LABEL_WIDTH) // len(runs) - 2, _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    settings = list(_differing_settings(runs))
    sections = {
        "": _heads(runs),
        "Settings that differ": settings,
        "Plan that differs": _differing_plan(runs, settings),
        "Data that differ": _differing_data(runs),
        "Packages and machine that differ": _differing_surroundings(runs),
        "Results": _results(runs, cell),
    }
    for title, rows in sections.items():
        lines = [_write_row(row, cell) for row in rows]
        if lines:
            yield from ([title] if title else []) + lines
    yield from _note_other_rows(runs)
    yield from _compare_samples(runs, width)


def _heads(runs: Sequence[PublishedRun]) -> Iterator[Row]:
    yield "slot", _name(runs)
    yield "run", [str(run.manifest["run_id"]) for run in runs]
    yield "made", [str(run.manifest.get("created_at", _NONE))[:16].replace("T", " ") for run in runs]


def _name(runs: Sequence[PublishedRun]) -> list[str]:
    """Name runs by the last parts of their places where these tell them apart."""
    names = [PurePosixPath(run.uri).name for run in runs]
    return names if len(set(names)) == len(names) else [run.uri for run in runs]


def _differing_settings(runs: Sequence[PublishedRun]) -> Iterator[Row]:
    trees = [dict(_flatten(run.manifest.get("settings") or {})) for run in runs]
    return _differences(trees)


def _flatten(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, value in settings.items():
        if group in _NOT_COMPARED_GROUPS:
            continue
        if not isinstance(value, dict):
            yield f"{PREFIX}{group}".upper(), value
            continue
        for field in value.keys() - _NOT_COMPARED.get(group, set()):
            yield f"{PREFIX}{group}{DELIMITER}{field}".upper(), value[field]


def _differing_plan(runs: Sequence[PublishedRun], settings: Sequence[Row]) -> Iterator[Row]:
    """Yield what was planned differently, but for what a setting's own row says already."""
    plans = [
        {name: value for name, value in (run.manifest.get("plan") or {}).items() if name not in _NOT_COMPARED_PLAN}
        for run in runs
    ]
    for name, cells in _differences(plans):
        if not any(cells == given and label.split(DELIMITER)[-1].lower() in name for label, given in settings):
            yield name, cells


def _differing_data(runs: Sequence[PublishedRun]) -> Iterator[Row]:
    """Yield the files that not all runs have, by their content."""
    by_run = [{file.get("sha256", ""): file for file in run.manifest.get("data") or []} for run in runs]
    for sha256 in dict.fromkeys(sha256 for files in by_run for sha256 in files):
        if not all(sha256 in files for files in by_run):
            uri = next(str(files[sha256].get("uri", _NONE)) for files in by_run if sha256 in files)
            cells = [
                f"{files[sha256].get('rows', _NONE)} rows, {sha256[:_DIGITS]}" if sha256 in files else _NONE
                for files in by_run
            ]
            yield uri, cells


def _differing_surroundings(runs: Sequence[PublishedRun]) -> Iterator[Row]:
    yield from _differences([{"sft-job": run.manifest.get("job_version")} for run in runs])
    yield from _differences([run.manifest.get("packages") or {} for run in runs])
    yield from _differences([run.manifest.get("hardware") or {} for run in runs])


def _differences(trees: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [tree.get(name) for tree in trees]
        if any(value != values[0] for value in values):
            yield name, [_write(value) for value in values]


def _write(value: object) -> str:
    is_plain = not isinstance(value, dict | list) or (value and all(isinstance(item, str) for item in value))
    return write_value(value) if is_plain and not isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


def _results(runs: Sequence[PublishedRun], cell: int) -> Iterator[Row]:
    yield from _metric(runs, "training loss", "train_loss", lambda loss: f"{loss:.4f}")
    yield "  step by step", [_draw_losses(run, min(_CURVE_WIDTH, cell)) for run in runs]
    yield from _metric(runs, "held-out loss before", "eval_loss_base", lambda loss: f"{loss:.4f}")
    yield from _metric(runs, "held-out loss after", "eval_loss", lambda loss: f"{loss:.4f}")
    yield "  change, 95 % interval", [_NONE if run.loss is None else _write_change(run.loss) for run in runs]
    against_first = [_compare_rows(runs[0], run) for run in runs[1:]]
    if None not in against_first:
        changes = [_write_change(change) for change in against_first if change is not None]
        yield "  against the first run", [_NONE, *changes]
    yield from _metric(runs, "perplexity before", "eval_loss_base", format_perplexity)
    yield from _metric(runs, "perplexity after", "eval_loss", format_perplexity)
    yield from _metric(runs, "steps", "steps", lambda steps: f"{steps:,.0f}")
    yield from _metric(runs, "training time", "train_seconds", format_duration)
    yield from _metric(runs, "tokens/s", "tokens_per_second", lambda speed: f"{speed:,.0f}")
    yield from _metric(runs, "peak memory", "peak_memory_bytes", format_bytes)
    yield from _metric(runs, "trained parameters", "trainable_parameters", lambda count: f"{count:,.0f}")


def _metric(runs: Sequence[PublishedRun], label: str, name: str, write: Callable[[float], str]) -> Iterator[Row]:
    values = [run.metric(name) for run in runs]
    if any(value is not None for value in values):
        yield label, [_NONE if value is None else write(value) for value in values]


def _draw_losses(run: PublishedRun, width: int) -> str:
    losses = [loss for _, loss in read_series(run.steps, "loss")]
    return draw_curve(losses, width) if losses else _NONE


def _write_change(change: LossChange) -> str:
    return f"{change.change:+.4f} ({change.change_low:+.3f} to {change.change_high:+.3f})"


def _compare_rows(first: PublishedRun, other: PublishedRun) -> LossChange | None:
    """Return how one adapter's held-out loss differs from another's; None where the rows aren't the same."""
    mine, theirs = _rows(first), _rows(other)
    if not mine or [_identify(row) for row in mine] != [_identify(row) for row in theirs]:
        return None
    pairs = zip(mine, theirs, strict=True)
    return compare_losses([theirs.model_copy(update={"loss_base": mine.loss}) for mine, theirs in pairs])


def _rows(run: PublishedRun) -> list[RowLoss]:
    return [] if run.evaluation is None else run.evaluation.rows


def _identify(row: RowLoss) -> tuple[str, int]:
    return row.line, row.supervised_tokens


def _note_other_rows(runs: Sequence[PublishedRun]) -> Iterator[str]:
    held_out = [{_identify(row) for row in _rows(run)} for run in runs if _rows(run)]
    if any(rows != held_out[0] for rows in held_out):
        yield "Not all runs held the same rows out: their losses can't be compared."


def _compare_samples(runs: Sequence[PublishedRun], width: int) -> Iterator[str]:
    """Yield what the runs answer to the prompts that all of them were given."""
    answers = [{sample.prompt: sample for sample in run.evaluation.samples} if run.evaluation else {} for run in runs]
    common = [prompt for prompt in answers[0] if all(prompt in others for others in answers)]
    if common:
        yield "Samples"
    names = _name(runs)
    label_width = min(max(map(count_columns, ["before", *names])), _LABEL_WIDTH)
    for index, prompt in enumerate(common[:_SAMPLES]):
        if index:
            yield ""
        samples = [answered[prompt] for answered in answers]
        befores = dict.fromkeys(sample.before for sample in samples if sample.before is not None)
        texts = [("asked", question_of(samples[0])), *(("before", before) for before in befores)]
        texts += [(name, sample.after) for name, sample in zip(names, samples, strict=True) if sample.after is not None]
        for label, text in texts:
            lines = shorten(text, width - label_width - 4)
            for shown, line in zip_longest([cut(label, label_width)], lines, fillvalue=""):
                yield f"  {_pad(shown, label_width)}  {line}"


def _write_row(row: Row, width: int) -> str:
    label, cells = row
    padded = [_pad(cut(make_visible(cell), width), width) for cell in cells]
    return "  ".join([f"  {_pad(cut(label, _LABEL_WIDTH - 4), _LABEL_WIDTH - 4)}", *padded]).rstrip()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - count_columns(text))


def _parse_manifest(content: bytes | None) -> dict[str, Any] | None:
    try:
        manifest = json.loads(content or b"")
    except ValueError:
        return None
    return manifest if is_manifest(manifest) else None


def _parse_lines(content: bytes | None) -> list[dict[str, Any]]:
    found = map(_parse_line, (content or b"").splitlines())
    return [line for line in found if isinstance(line, dict)]


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut off: what is whole is compared
        return None


def _parse_evaluation(uri: str, content: bytes | None) -> Evaluation | None:
    if content is None:
        return None
    try:
        return Evaluation.model_validate_json(content)
    except ValidationError:
        logger.warning("%s: evaluation.json was written by another version of the job: samples are not compared", uri)
        return None
