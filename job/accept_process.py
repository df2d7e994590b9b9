"""The fresh process that loads what was published: started early, told where it lies, and ended whatever happens."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from job.accept import ROWS, Acceptance, AcceptanceTask
from job.cgroup import count_oom_kills
from job.errors import DATA, ERROR_BY_CODE, InternalError, RefusedError
from job.handover import RunFolder, WorkerOutcome
from job.hardware import Hardware
from job.launch_command import worker_environment
from job.log import format_bytes
from job.memory.estimate import estimate_memory
from job.memory.model_shape import ModelShape
from job.memory.setup import pick_setup
from job.plan import TrainPlan
from job.prepared import Prepared
from job.processes import die_with

_MODULE = "job.train.accept"
_KEPT = "start again: what was trained is kept; if it is refused again, please report it, with the log"


def make_task(prepared: Prepared, folder: RunFolder) -> AcceptanceTask | str:
    """Return what the fresh process of a run is to do, or why it can't be tried."""
    plan, dataset, runtime = prepared.plan, prepared.dataset, prepared.settings.runtime
    rows = ROWS.validate_json(folder.acceptance_rows.read_bytes()) if folder.acceptance_rows.exists() else []
    if not rows:
        return "the trained model's loss on single rows was not measured"
    lacking = find_lacking_memory(plan, dataset.facts.shape, prepared.hardware)
    if lacking is not None:
        return lacking
    new_tokens = [] if dataset.template is None else dataset.template.new_tokens
    return AcceptanceTask(
        plan=plan,
        model_folder=prepared.model_folder,
        new_token_ids={token.text: token.id for token in new_tokens},
        rows=rows,
        log_format=runtime.log_format,
        log_level=runtime.log_level,
    )


def find_lacking_memory(plan: TrainPlan, shape: ModelShape, hardware: Hardware) -> str | None:
    """Return why the whole model can't be held by one process, on the device that it was trained on, if it can't."""
    is_gpu = plan.device == "cuda"
    if is_gpu and not hardware.gpus:
        return "it was trained on a GPU, and there is none here"
    there_bytes = min(gpu.memory_bytes for gpu in hardware.gpus) if is_gpu else hardware.memory_bytes
    alone = replace(pick_setup(plan.model_dump()), engine="ddp", offload=False, nodes=1, processes=1)
    needs = estimate_memory(alone, shape, there_bytes)
    needed_bytes = needs.weights_bytes + needs.adapter_bytes + needs.overhead_bytes
    if needed_bytes <= there_bytes:
        return None
    where = "one GPU" if is_gpu else "the host"
    return f"the whole model needs {format_bytes(needed_bytes)}, and {where} has {format_bytes(there_bytes)}"


class FreshProcess:
    """A process that gets ready, and then waits to be told where the adapter is."""

    def __init__(self, process: "subprocess.Popen[str]", folder: RunFolder) -> None:
        self._process = process
        self._folder = folder
        self._oom_kills_before = count_oom_kills()

    def accept(self, adapter: Path, *, limit_s: float) -> Acceptance:
        """Have it load the adapter in a folder, and return what it came to, within so many seconds.

        Raises RefusedError for an adapter that isn't what was trained, and the JobError that it ended with otherwise.
        """
        try:
            self._process.communicate(f"{adapter}\n", timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Acceptance(skipped=f"it took longer than {limit_s / 60:g} minutes")
        if not self._folder.acceptance_outcome.exists():
            if count_oom_kills() > self._oom_kills_before:
                return Acceptance(skipped="out of host memory")
            ended = self._process.returncode
            raise InternalError(f"the process that loads the adapter died without saying why (it ended with {ended})")
        outcome = WorkerOutcome.model_validate_json(self._folder.acceptance_outcome.read_bytes())
        if outcome.out_of_memory:
            return Acceptance(skipped=outcome.message)
        if outcome.code == DATA.code:
            raise RefusedError(outcome.message, hint=_KEPT)
        if outcome.code != 0:
            raise ERROR_BY_CODE[outcome.code](outcome.message, hint=outcome.hint)
        return Acceptance.model_validate_json(self._folder.acceptance.read_bytes())


@contextmanager
def fresh_process(task: AcceptanceTask, folder: RunFolder) -> Iterator[FreshProcess]:
    """Start the process for the block, and end it there; no part of the parent's environment but the workers' is its.

    `folder` is for what the two pass each other.
    """
    for path in (folder.acceptance, folder.acceptance_outcome):
        path.unlink(missing_ok=True)
    folder.acceptance_task.write_text(task.model_dump_json(), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", _MODULE, str(folder.root)],
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        stderr=sys.stderr.fileno(),
        text=True,
        env=_environment(task),
        start_new_session=True,  # Ctrl-C on a terminal reaches the job alone, which then ends it
        preexec_fn=partial(_prepare, os.getpid()),  # noqa: PLW1509 - only three system calls
    ) as process:
        try:
            yield FreshProcess(process, folder)
        finally:
            process.kill()  # it holds nothing that must be put away


def _prepare(job_pid: int) -> None:
    # Where a platform sends SIGTERM to every process at once, the job decides what is still done.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(job_pid)


def _environment(task: AcceptanceTask) -> Mapping[str, str]:
    return worker_environment(task.plan.model_copy(update={"nodes": 1, "processes": 1}))


@contextmanager
def ready_to_accept(prepared: Prepared, folder: RunFolder) -> Iterator[Callable[[Path], Acceptance]]:
    """Start the process of a run for the block, and yield what has it load the adapter in a folder, or says why that
    can't be tried."""
    task = make_task(prepared, folder)
    if isinstance(task, str):
        why = task
        yield lambda _: Acceptance(skipped=why)
        return
    limit_s = prepared.settings.runtime.hang_minutes * 60
    with fresh_process(task, folder) as process:
        yield partial(process.accept, limit_s=limit_s)
