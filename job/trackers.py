"""The experiment trackers that a run can report to: their packages, and what their clients are told by variables."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.errors import ConfigError


@dataclass(frozen=True)
class Tracker:
    """What a tracker's client needs in its environment: `secrets`, which workers get for it alone, and `variables`,
    where the user has set none. `{run_id}` and `{work_dir}` are filled in."""

    secrets: tuple[str, ...]
    variables: dict[str, str]


# By the name of the package, which is that of our extra, too.
TRACKERS = {
    "tensorboard": Tracker((), {"TENSORBOARD_LOGGING_DIR": "{work_dir}/tensorboard/{run_id}"}),
    "mlflow": Tracker(
        ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
        {
            "MLFLOW_EXPERIMENT_NAME": "sft-job",
            # By default, it tries for some minutes.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            # Both would stand in the log between the job's lines.
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_LOGGING_LEVEL": "ERROR",
        },
    ),
    "wandb": Tracker(
        ("WANDB_API_KEY",),
        {
            "WANDB_PROJECT": "sft-job",
            # A start that goes on reports to the same run.
            "WANDB_RUN_ID": "{run_id}",
            "WANDB_RESUME": "allow",
            "WANDB_DIR": "{work_dir}",
            "WANDB_INIT_TIMEOUT": "30",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
        },
    ),
}


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError when the package of a tracker is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise ConfigError(
                f"SFT_RUNTIME__REPORT_TO={','.join(names)}: the package {name} is not installed",
                hint=f"install it with the job, `pip install 'sft-job[{name}]'`, or leave {name} out",
            )


def tracker_environment(
    names: Sequence[str], environment: Mapping[str, str], *, run_id: str, work_dir: Path
) -> dict[str, str]:
    """Return what workers need in order to report to these trackers, from the job's own environment."""
    needed: dict[str, str] = {}
    for name in names:
        tracker = TRACKERS[name]
        needed |= {secret: environment[secret] for secret in tracker.secrets if secret in environment}
        for variable, text in tracker.variables.items():
            needed[variable] = environment.get(variable) or text.format(run_id=run_id, work_dir=work_dir)
    return needed
