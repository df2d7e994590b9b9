"""One training in processes of its own, measured from outside: by the clock, by the memory of its whole tree of
processes, and by what the probe in it noted at each step."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROBE = Path(__file__).parent / "training_probe"
TIMEOUT_S = 1800
_SAMPLE_S = 0.5  # between looks at the memory; reading a process's takes some milliseconds
_FOREIGN = ("SFT_", "AWS_", "HF_", "CUDA_", "OMP_", "MKL_", "GOMP_", "ACCELERATE_", "WANDB_", "PYTHON")


@dataclass(frozen=True)
class Measured:
    """One training: its optimizer steps as the probe noted them, the time of the whole, and the peak of memory."""

    steps: list[dict[str, Any]]
    whole_s: float
    peak_bytes: int

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def learned(self) -> int:
        return self._sum("learned")

    @property
    def computed(self) -> int:
        """Positions that went through the model, with padding."""
        return self._sum("computed")

    @property
    def training_tokens_per_s(self) -> float:
        """Tokens a second from the end of the first step, in which much is set up once, to the end of the last."""
        taken_s = self.steps[-1]["time_s"] - self.steps[0]["time_s"]
        return sum(step["tokens"] for step in self.steps[1:]) / taken_s

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens a second of one core's time, over the same steps: what else runs on the machine changes it less."""
        return sum(step["tokens"] for step in self.steps[1:]) / (self.steps[-1]["cpu_s"] - self.steps[0]["cpu_s"])

    @property
    def whole_tokens_per_s(self) -> float:
        return self.tokens / self.whole_s

    def _sum(self, name: str) -> int:
        return sum(step[name] for step in self.steps)


def clean_environment(folder: Path, libraries: Path, root: Path, threads: int) -> dict[str, str]:
    """Return what all that are compared have in common: threads, libraries, the probe, and empty caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, (PROBE, root, libraries))),
        "OMP_NUM_THREADS": str(threads),
        # As the job sets it for its own worker: else threads that wait burn cores that something else may need, and the
        # comparison would be about what else runs on the machine.
        "GOMP_SPINCOUNT": "2000",
        "HF_HOME": str(folder / "hf"),  # else the rows that one run has tokenised would be the next one's
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "BENCH_PROBE": str(folder / "steps.jsonl"),
    }


def run_measured(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Measured:
    """Run a command to its end. What it says goes to output.txt in the folder, whose end is shown where it fails."""
    output = folder / "output.txt"
    began_s = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
        watch = _MemoryWatch(process.pid)
        try:
            code = process.wait(timeout=TIMEOUT_S)
        finally:
            watch.stop()
            with contextlib.suppress(ProcessLookupError):  # none of it is left, unless it was cut short
                os.killpg(process.pid, signal.SIGKILL)
    whole_s = time.monotonic() - began_s
    steps_file = Path(environment["BENCH_PROBE"])
    if code or not steps_file.exists():
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{output.read_text()[-3000:]}")
    steps = [json.loads(line) for line in steps_file.read_text().splitlines()]
    return Measured(steps, whole_s, watch.peak_bytes)


class _MemoryWatch(threading.Thread):
    """Looks at the memory of a process and all below it, every half second: pages that several share count once."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid = pid
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._measure())

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _measure(self) -> int:
        try:
            parent = psutil.Process(self._pid)
            tree = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        return sum(_proportional_bytes(process.pid) for process in tree)


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
