"""All that is known of a run once it has trained, in one place: the manifest, the model card, report.html and the text
at the end of the log say what stands here, and nothing else."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import job
from job.accept import Acceptance
from job.evaluation import Evaluation
from job.handover import RunFolder
from job.hardware import Hardware
from job.manifest import DataFile, hash_file, package_versions
from job.phases import add_up_phases
from job.plan import TrainPlan
from job.serving import EngineVerdict

if TYPE_CHECKING:
    from job.prepared import Prepared

PAGES = ("README.md", "report.html")  # what is made of a record, to be published with the files that it lists
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PublishedFile:
    """A file of the slot; the names are the manifest's."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class RunRecord:
    """One run: what it was given, what was planned, what came out and what of it was proved.

    `settings` are resolved and without secrets, by group, and `given` those of them that aren't by default; `steps` are
    the lines of metrics.jsonl; `metrics` the final ones; `phases` the seconds of each of this
    start so far; `files` what is published but for the pages that are made of
    this record. `hub_revision` is the base model's commit, None for one that isn't the Hub's. `engines` is empty, and
    `acceptance` and `serve_command` are None, where nobody has looked.
    """

    run_id: str
    job_version: str
    created_at: str
    output: str
    settings: dict[str, Any]
    given: dict[str, Any]
    plan: TrainPlan
    hub_revision: str | None
    hardware: Hardware
    data: list[DataFile]
    packages: dict[str, str]
    metrics: dict[str, Any]
    steps: list[dict[str, Any]]
    phases: dict[str, float]
    evaluation: Evaluation | None
    acceptance: Acceptance | None
    engines: list[EngineVerdict]
    serve_command: str | None
    warnings: list[str]
    xray: dict[str, Any]
    files: list[PublishedFile]


def record_run(
    prepared: "Prepared",
    folder: RunFolder,
    *,
    acceptance: Acceptance | None = None,
    engines: Sequence[EngineVerdict] = (),
    serve_command: str | None = None,
) -> RunRecord:
    """Return the record of a run that has trained, whose files to publish lie in the adapter's folder."""
    xray = json.loads(folder.xray.read_bytes())
    evaluation = folder.evaluation
    return RunRecord(
        run_id=prepared.inputs.run_id,
        job_version=job.__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        output=prepared.slot.uri,
        settings=prepared.settings.model_dump(mode="json"),
        given=prepared.settings.model_dump(mode="json", exclude_unset=True),
        plan=prepared.plan,
        hub_revision=prepared.inputs.base_model.hub_revision,
        hardware=prepared.hardware,
        data=prepared.dataset.files,
        packages=package_versions(),
        metrics=folder.read_result(),
        steps=folder.read_metrics(),
        phases=add_up_phases(),
        evaluation=Evaluation.model_validate_json(evaluation.read_bytes()) if evaluation.exists() else None,
        acceptance=acceptance,
        engines=list(engines),
        serve_command=serve_command,
        warnings=[*xray["warnings"], *prepared.plan.warnings],
        xray=xray,
        files=[file for file in list_files(folder.adapter) if file.path not in PAGES],  # PEFT leaves a README.md, too
    )


def list_files(folder: Path) -> list[PublishedFile]:
    """Return the files in a folder and its folders, by path."""
    return [describe_file(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def describe_file(path: Path, folder: Path) -> PublishedFile:
    """Return what the manifest says of a file in the folder of those to publish."""
    return PublishedFile(path.relative_to(folder).as_posix(), hash_file(path), path.stat().st_size)


def make_manifest(record: RunRecord, pages: Sequence[PublishedFile]) -> dict[str, Any]:
    """Return the manifest of a run that is published with the record's files and the pages made of it."""
    loss = None if record.evaluation is None else record.evaluation.loss
    return {
        "schema_version": _SCHEMA_VERSION,
        "run_id": record.run_id,
        "created_at": record.created_at,
        "job_version": record.job_version,
        "settings": record.settings,
        "base_model": {"id": record.plan.model_id, "revision": record.plan.model_revision},
        "data": [asdict(file) for file in record.data],
        "packages": record.packages,
        "hardware": asdict(record.hardware),
        "plan": record.plan.model_dump(mode="json"),
        "metrics": record.metrics,
        "phases": record.phases,
        "evaluation": None if loss is None else loss.model_dump(mode="json"),
        "acceptance": None if record.acceptance is None else record.acceptance.model_dump(mode="json"),
        "serving": {"engines": [asdict(verdict) for verdict in record.engines], "vllm": record.serve_command},
        "warnings": record.warnings,
        "files": sorted((asdict(file) for file in [*record.files, *pages]), key=lambda file: file["path"]),
    }
