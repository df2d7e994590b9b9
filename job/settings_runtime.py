"""The group of settings that every command reads: where and how the job itself runs."""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from job.settings_fields import Group, Trackers, unit_of


class RuntimeSettings(Group):
    """Where and how the job itself runs."""

    work_dir: Path = Field(
        Path(tempfile.gettempdir()) / "sft-job",
        description="Folder for downloads and intermediate files; one job at a time",
    )
    log_format: Literal["auto", "text", "json"] = Field("auto", description="Text or JSON; auto: text on a terminal")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is logged")
    termination_log: Path = Field(
        Path("/dev/termination-log"),
        description="File for the outcome as JSON; the default is written only if it exists",
    )
    max_hours: Annotated[float, Field(gt=0, le=8760)] | None = Field(
        None,
        description="Stop after this time: with a checkpoint, for the next start to go on from, or see "
        "SFT_TRAIN__ACCEPT_PARTIAL",
        json_schema_extra=unit_of("hours"),
    )
    grace_seconds: float = Field(
        30,
        ge=1,
        le=86_400,
        description="Time between SIGTERM and SIGKILL, as the platform grants it (Kubernetes: "
        "terminationGracePeriodSeconds)",
        json_schema_extra=unit_of("seconds"),
    )
    hang_minutes: float = Field(
        30,
        gt=0,
        le=1440,
        description="End a run in which a worker takes longer for one micro batch",
        json_schema_extra=unit_of("minutes"),
    )
    report_to: Trackers = Field([], description="Experiment trackers that are told, such as tensorboard,mlflow,wandb")
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None,
        description="Port at which Prometheus finds /metrics while the job runs",
        json_schema_extra=unit_of("none"),
    )
