"""Starts the worker processes through `accelerate launch`, passes signals on, and reads how they ended.

Whatever happens to any process of the run, none is left behind: workers die with the launcher, the launcher with the
job, and the job ends all that remain.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from job import engines
from job.errors import ERROR_BY_CODE, PREEMPTED, UNAVAILABLE, InternalError, JobError, ResourcesError
from job.handover import RunFolder
from job.log import SECRET_VARIABLES, logger
from job.plan import TrainPlan
from job.processes import adopt_orphans, child_pids, die_with_parent, end_descendants
from job.stopping import acknowledge_stop

_WORKER_MODULE = "job.train.worker"
_GRACE_S = 10.0
_LOG_TAIL_LINES = 40
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CONSEQUENCES = (UNAVAILABLE.code, PREEMPTED.code)


def launch_workers(plan: TrainPlan, folder: RunFolder) -> None:
    """Run the plan's worker processes on the files in `folder` until all have ended well.

    Raises the JobError that the first failing worker wrote down; InternalError or ResourcesError for one that died
    without a word. No process is left when this returns or raises.
    """
    adopt_orphans()
    spared = child_pids()
    oom_kills_before = _count_oom_kills()
    parent_pid = os.getpid()

    def tie_to_job() -> None:
        die_with_parent()
        if os.getppid() != parent_pid:  # it died before the line above
            os._exit(1)

    try:
        with folder.launcher_log.open("wb") as launcher_log:
            # Rank 0 sends its stderr to the launcher's stdout, which is the job's stderr, so that it comes through
            # live without the launcher's own tracebacks.
            launcher = subprocess.Popen(
                _launch_command(plan, folder),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=launcher_log,
                env=_worker_environment(plan),
                start_new_session=True,  # Ctrl-C on a terminal reaches the job alone, which then ends the others
                preexec_fn=tie_to_job,  # noqa: PLW1509 - nothing but two system calls happens in it
            )
            returncode = launcher.wait()
    finally:
        acknowledge_stop()  # ending the workers may take longer than a reminder
        end_descendants(spared=spared, grace_s=_GRACE_S)
    _raise_failure(plan, folder, returncode, oom_killed=_count_oom_kills() > oom_kills_before)


def _launch_command(plan: TrainPlan, folder: RunFolder) -> list[str]:
    engine = plan.engine if plan.processes > 1 else "single"
    config = Path(engines.__path__[0]) / f"{engine}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(plan.processes), "--num_cpu_threads_per_process", str(plan.threads_per_process)]
    if plan.processes > 1:
        command += ["--main_process_port", "0"]  # any free one: two jobs on a host don't collide
    return [*command, "--module", _WORKER_MODULE, str(folder.root), str(os.getpid())]


def _worker_environment(plan: TrainPlan) -> dict[str, str]:
    # The model is on the disk: workers need no credentials, so they get none. What another launcher (a training
    # operator, say) has set would make a single worker wait for peers.
    dropped = (*SECRET_VARIABLES, *_RENDEZVOUS)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    environment["OMP_NUM_THREADS"] = str(plan.threads_per_process)
    environment["HF_HUB_OFFLINE"] = "1"  # everything was fetched before: a look-up now would be a mistake
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONUNBUFFERED"] = "1"
    if plan.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a container's own host name often doesn't resolve
        # OpenMP's threads spin while they wait for each other. With another busy process on the cores they spin away
        # the time of the one that they wait for: a forward pass was measured at 9 to 19 s instead of 5.
        environment.setdefault("GOMP_SPINCOUNT", "2000")
    else:
        # With more GPUs visible than processes, transformers' Trainer would wrap the model in DataParallel.
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(str(index) for index in range(plan.processes))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: plan.processes])
    return environment


def _raise_failure(plan: TrainPlan, folder: RunFolder, returncode: int, *, oom_killed: bool) -> None:
    outcomes = folder.read_outcomes()
    silent = sorted(set(range(plan.processes)) - {outcome.rank for outcome in outcomes})
    # The first failure is the cause; a lost peer, or being ended because of it, is never the cause where there is any
    # other, a silent death included.
    failed = sorted((o for o in outcomes if o.code != 0), key=lambda o: (o.code in _CONSEQUENCES, o.time_s))
    if failed and not (silent and failed[0].code in _CONSEQUENCES):
        first = failed[0]
        _log_tail(folder.worker_log(first.rank))
        if first.code == PREEMPTED.code:
            raise InternalError(
                f"worker {first.rank} of {plan.processes} was ended by a SIGTERM from outside the job",
                hint="to stop a job, send the signal to its first process",
            )
        error: JobError = ERROR_BY_CODE[first.code](first.message, hint=first.hint)
        error.step = first.step
        raise error
    if silent:
        if oom_killed:
            raise ResourcesError(
                f"worker {silent[0]} of {plan.processes} was killed: out of host memory",
                hint="give the job more memory, or lower SFT_TRAIN__MICRO_BATCH_SIZE or SFT_DATA__MAX_LENGTH",
            )
        _log_tail(folder.launcher_log)
        if returncode < 0:  # the workers died with it
            raise InternalError(
                f"the launcher of the {plan.processes} workers was killed by {signal.Signals(-returncode).name}",
                hint="see what ended it: nothing in the job does",
            )
        for rank in silent:
            _log_tail(folder.worker_log(rank))
        raise InternalError(
            f"worker {silent[0]} of {plan.processes} died without saying why (launcher ended with {returncode})",
            hint="the lines above are the last it wrote; if none are, it was killed from outside",
        )
    if returncode != 0:
        _log_tail(folder.launcher_log)
        raise InternalError(f"all workers ended well, but the launcher with {returncode}")


def _log_tail(path: Path) -> None:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines:
        logger.error("the end of %s:\n%s", path.name, "\n".join(lines[-_LOG_TAIL_LINES:]))


def _count_oom_kills() -> int:
    """Return how often the kernel killed a process of this container for memory (cgroup v2), 0 where it doesn't say."""
    events = Path("/sys/fs/cgroup/memory.events")
    counts = dict(line.split() for line in events.read_text().splitlines()) if events.exists() else {}
    return int(counts.get("oom_kill", 0))
