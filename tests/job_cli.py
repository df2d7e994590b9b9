"""Runs the job as its users do: `python -m job` in a process of its own, with nothing but environment variables."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOP = ROOT / "tests" / "data" / "shop"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, all that it said, and what it wrote to the termination log."""

    code: int
    output: str
    outcome: dict[str, Any]


def job_environment(folder: Path, **settings: object) -> dict[str, str]:
    """Return an environment for one job with work folder and termination log in `folder`.

    `settings` are variables without their prefix, `TRAIN__MAX_STEPS=3`. Nothing of this machine's own configuration of
    AWS, the Hub or the job is in it.
    """
    foreign = ("SFT_", "AWS_", "HF_", "CUDA_", "OMP_", "GOMP_", "MLFLOW_", "TENSORBOARD_", "WANDB_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "AWS_CONFIG_FILE": str(folder / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "SFT_RUNTIME__LOG_FORMAT": "text",
        "SFT_EVAL__SAMPLES": "0",  # answers take their time, and few tests look at them
        "SFT_RUNTIME__WORK_DIR": str(folder / "work"),
        "SFT_RUNTIME__TERMINATION_LOG": str(folder / "termination.json"),
    }
    return environment | {f"SFT_{name}": str(value) for name, value in settings.items()}


def start_job(environment: dict[str, str], *arguments: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `python -m job` and return the process; its stdout and stderr come as one stream.

    `prefix` is a command that starts it in its own place, such as `ip netns exec NAME`.
    """
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "job", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_job(
    environment: dict[str, str], *arguments: str, prefix: Sequence[str] = (), timeout_s: float = TIMEOUT_S
) -> Ended:
    """Run `python -m job` to its end; `prefix` as for `start_job`."""
    log = Path(environment["SFT_RUNTIME__TERMINATION_LOG"])
    log.unlink(missing_ok=True)
    with start_job(environment, *arguments, prefix=prefix) as process:
        output, _ = process.communicate(timeout=timeout_s)
    outcome = json.loads(log.read_text()) if log.exists() else {}
    return Ended(process.returncode, output, outcome)


def without_measurements(record: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl without what depends on the machine and the moment."""
    measured = ("elapsed_s", "step_s", "data_wait_s", "tokens_per_second", "memory_bytes", "phases")
    return {name: value for name, value in record.items() if name not in measured}
