"""What a checkpoint costs a training: `make bench-checkpoints`.

One job trains with a checkpoint every few steps, saved by the worker and uploaded by its parent to a real S3 server.
The step after a checkpoint was due holds the save, and it and those that follow hold the upload: what these steps take
longer than the median of all others is what the checkpoint costs. The same sum over as many steps half an interval
later shows how far noise alone goes. All are steps of one run, so a slow machine is slow for all of them.

Training has one core to itself, as it has a GPU elsewhere, and the upload and the S3 server have the others; with
--shared all use all cores, and what the upload and the server compute is taken from training.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from base_model import get_base_model, get_tiny_model
from job_cli import SHOP, job_environment, run_job
from seaweed import SeaweedFS

BUCKET = "bench"
# As sitecustomize.py, in every process of the job.
_PIN_WORKERS = """
import os, sys
if "job.train.worker" in sys.orig_argv:
    os.sched_setaffinity(0, {core})
"""
INTERVAL_S = 60.0  # between checkpoints, for the share of the wall time
TIMEOUT_S = 3600
NOTICED_S = 0.3  # after which the job's parent has found a new checkpoint
_STORED = re.compile(r"checkpoint of step (\d+) is in the store: (.+), saved in ([\d.]+) s, uploaded in ([\d.]+) s")


@dataclass(frozen=True)
class Stored:
    """A checkpoint, as the job's log tells of it."""

    step: int
    size: str
    save_s: float
    upload_s: float


@dataclass(frozen=True)
class Measured:
    """One run: how long each step took, by its number from 2 on, and the checkpoints that went to the store."""

    step_s: dict[int, float]
    stored: list[Stored]


def share_cores(folder: Path) -> Path:
    """Move this process, and all that it starts, off one core; return a folder for PYTHONPATH that moves workers
    there."""
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others)
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_PIN_WORKERS.replace("{core}", f"{{{first}}}"))
    return hook


def measure(
    server: SeaweedFS, model: Path, folder: Path, hook: Path | None, *, steps: int, every: int, batch: int
) -> Measured:
    """Train, and return what there is to reckon with."""
    environment = server.environment() | job_environment(
        folder,
        MODEL__ID=model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{BUCKET}/out",
        TRAIN__MAX_STEPS=steps,
        TRAIN__GLOBAL_BATCH_SIZE=batch,
        TRAIN__LOGGING_STEPS=1,
        CHECKPOINT__EVERY_STEPS=every,
    )
    if hook is not None:
        environment["PYTHONPATH"] = f"{hook}{os.pathsep}{environment['PYTHONPATH']}"
    ended = run_job(environment, timeout_s=TIMEOUT_S)
    if ended.code != 0:
        raise SystemExit(f"the job ended with {ended.code}:\n{ended.output}")
    with closing(server.client()) as client:
        lines = client.get_object(Bucket=BUCKET, Key="out/metrics.jsonl")["Body"].read().splitlines()
    # A step is written down before its checkpoint is saved: the save falls to the step that follows.
    elapsed_s = {line["step"]: line["elapsed_s"] for line in map(json.loads, lines) if "loss" in line}
    step_s = {step: elapsed_s[step] - elapsed_s[step - 1] for step in range(2, steps + 1)}
    stored = [Stored(int(step), size, float(a), float(b)) for step, size, a, b in _STORED.findall(ended.output)]
    return Measured(step_s, stored)


def report(found: Measured, every: int) -> None:
    """Print what a checkpoint costs, and which share of the time that is."""
    last = max(found.step_s)
    save_s = statistics.median(one.save_s for one in found.stored)
    upload_s = statistics.median(one.upload_s for one in found.stored)
    step_s = statistics.median(found.step_s.values())
    window = math.ceil((save_s + NOTICED_S + upload_s) / step_s)
    if 2 * window > every:
        raise SystemExit(
            f"a checkpoint takes {window} steps: with one every {every}, no others are left to compare with"
        )
    stored = [one.step for one in found.stored if one.step + every <= last]
    held_up = {step + n for step in range(every, last, every) for n in range(1, window + 1)}
    plain = [took for step, took in found.step_s.items() if step not in held_up and step > every]
    plain_s = statistics.median(plain)
    with_save = [found.step_s[step + 1] for step in stored]
    with_upload = [found.step_s[step + n] for step in stored for n in range(2, window + 1)]
    costs = [sum(found.step_s[step + n] - plain_s for n in range(1, window + 1)) for step in stored]
    shams = [sum(found.step_s[step + every // 2 + n] - plain_s for n in range(1, window + 1)) for step in stored]
    cost_s = statistics.median(costs)
    print(f"{len(stored)} checkpoints of {found.stored[-1].size}, one every {every} of {last} steps")
    print(f"plain step                     {plain_s:7.3f} s   median of {len(plain)}, {_spread(plain)}")
    print(f"step with the save             {statistics.median(with_save):7.3f} s   median of {len(with_save)}")
    if with_upload:
        ratio = statistics.median(with_upload) / plain_s
        print(f"later steps during the upload  {statistics.median(with_upload):7.3f} s   {ratio:.3f} of a plain one")
    print(f"training stands still          {save_s:7.3f} s   as the worker says, {save_s / INTERVAL_S:.2%} of a minute")
    print(f"upload, in the background      {upload_s:7.3f} s")
    print(f"a checkpoint costs             {cost_s:7.3f} s   {_spread(costs)}")
    print(f"noise over as many plain steps {statistics.median(shams):7.3f} s   {_spread(shams)}")
    print(f"with one a minute, that is {cost_s / INTERVAL_S:.2%} of the wall time")


def _spread(values: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"middle half {low:.3f} to {high:.3f}"


def main() -> None:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, whose checkpoints are small")
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--every", type=int, default=8, help="steps from one checkpoint to the next")
    parser.add_argument("--batch", type=int, default=2, help="rows in a step")
    parser.add_argument("--shared", action="store_true", help="all cores for training, the upload and the server")
    arguments = parser.parse_args()
    model = get_tiny_model() if arguments.quick else get_base_model()
    steps = arguments.every * (arguments.checkpoints + 1)
    with tempfile.TemporaryDirectory(prefix="sft-job-bench-") as name:
        folder = Path(name)
        hook = None if arguments.shared else share_cores(folder)
        with SeaweedFS(folder / "store") as server:
            with closing(server.client()) as client:
                client.create_bucket(Bucket=BUCKET)
            found = measure(server, model, folder, hook, steps=steps, every=arguments.every, batch=arguments.batch)
    report(found, arguments.every)


if __name__ == "__main__":
    main()
