"""Starts the worker processes, several of them through `accelerate launch`, and reads how they ended.

Whatever happens to any process of the run, none is left behind: workers die with the launcher, the launcher with the
job, and the job ends all that remain.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from job.cgroup import count_oom_kills
from job.errors import (
    ERROR_BY_CODE,
    PREEMPTED,
    UNAVAILABLE,
    InternalError,
    JobError,
    OutOfMemoryError,
    PreemptedError,
    UnavailableError,
)
from job.handover import RunFolder
from job.launch_command import Rendezvous, launch_command, needs_launcher, tracking_environment, worker_environment
from job.log import logger
from job.nodes.peers import Peers
from job.phases import enter_phase, take_over_phases
from job.plan import TrainPlan
from job.processes import adopt_orphans, child_pids, die_with, end_descendants
from job.stopping import acknowledge_stop
from job.supervise import Supervisor

GRACE_S = 10.0
_LOG_TAIL_LINES = 40
_CONSEQUENCES = (UNAVAILABLE.code, PREEMPTED.code)


def launch_workers(plan: TrainPlan, folder: RunFolder, peers: Peers, supervisor: Supervisor) -> None:
    """Run this node's part of the plan's worker processes on the files in `folder` until all have ended well.

    Raises the JobError that the first failing worker wrote down (OutOfMemoryError where a smaller plan may do);
    InternalError or OutOfMemoryError for one that died without a word; InternalError, or with several nodes
    UnavailableError, for one that hangs; UnavailableError when another node is lost, AttemptEndedError when its attempt
    has ended, and PreemptedError when the workers were told to stop. No process is left when this returns or raises,
    and the last checkpoint is in the store, if there was time.
    """
    rendezvous = _agree_on_rendezvous(peers)
    adopt_orphans()
    spared = child_pids()
    oom_kills_before = count_oom_kills()
    grace_s = GRACE_S
    folder.phases.unlink(missing_ok=True)
    enter_phase("starting workers")
    try:
        with folder.launcher_log.open("wb") as launcher_log:
            # Rank 0 sends its stderr to the launcher's stdout, which is the job's stderr, so that it comes through
            # live without the launcher's own tracebacks.
            launcher = subprocess.Popen(
                launch_command(plan, folder, rendezvous),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=launcher_log,
                env=worker_environment(plan, rendezvous, shutdown_s=supervisor.grace_s) | tracking_environment(folder),
                start_new_session=True,  # Ctrl-C on a terminal reaches the job alone, which then ends the others
                preexec_fn=partial(_prepare_launcher, os.getpid()),  # noqa: PLW1509 - only three system calls
            )
            returncode = supervisor.wait(launcher)
    except PreemptedError:
        grace_s = 0.0  # there is no time left
        raise
    except UnavailableError as lost:
        if not (supervisor.is_stopping or _have_stopped(plan, folder, peers)):
            raise
        logger.info("%s", lost.message)  # all nodes stop, and it has ended a moment before this one
        returncode = 0
    finally:
        acknowledge_stop()  # ending the workers may take longer than a reminder
        end_descendants(spared=spared, grace_s=grace_s)
        take_over_phases(folder.phases)
        enter_phase("uploading")
        supervisor.flush()
        enter_phase("other")
    oom_killed = count_oom_kills() > oom_kills_before
    try:
        _raise_failure(plan, folder, peers, supervisor, returncode, oom_killed=oom_killed)
    except (InternalError, UnavailableError) as failure:
        if supervisor.is_stopping:  # who sends a signal to one process may send it to all
            logger.warning("while stopping: %s", failure.message)
            raise supervisor.preempted(None) from failure
        raise


def _prepare_launcher(job_pid: int) -> None:
    # Where a platform sends SIGTERM to every process at once, the workers stop at the end of their step, and a launcher
    # that dies of it would take them along. torchrun has a handler of its own.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(job_pid)


def _agree_on_rendezvous(peers: Peers) -> Rendezvous | None:
    """Return where the workers of all nodes meet, at a port that node 0 has free; None on one node."""
    if peers.nodes == 1:
        return None
    port = None
    if peers.node_rank == 0:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    return Rendezvous(peers.node_rank, peers.first_address, peers.exchange(port)[0], peers.interface)


def list_ranks(plan: TrainPlan, peers: Peers) -> range:
    """Return the ranks of this node's workers."""
    first_rank = peers.node_rank * plan.processes
    return range(first_rank, first_rank + plan.processes)


def _have_stopped(plan: TrainPlan, folder: RunFolder, peers: Peers) -> bool:
    """Say whether all workers of this node have ended because they were told to stop."""
    return {outcome.rank for outcome in folder.read_outcomes() if outcome.stopped} == set(list_ranks(plan, peers))


def _raise_failure(
    plan: TrainPlan, folder: RunFolder, peers: Peers, supervisor: Supervisor, returncode: int, *, oom_killed: bool
) -> None:
    outcomes = folder.read_outcomes()
    silent = sorted(set(list_ranks(plan, peers)) - {outcome.rank for outcome in outcomes})
    if _have_stopped(plan, folder, peers):
        with suppress(UnavailableError):  # node 0 ends when its checkpoint is in the store
            peers.wait_for_first_node(supervisor.left_s)
        raise supervisor.preempted(outcomes[0].step)
    # The first failure is the cause; a lost peer, or being ended because of it, is never the cause where there is any
    # other, a silent death included.
    failed = sorted((o for o in outcomes if o.code != 0), key=lambda o: (o.code in _CONSEQUENCES, o.time_s))
    if failed and not (silent and failed[0].code in _CONSEQUENCES):
        first = failed[0]
        if first.code in _CONSEQUENCES:
            peers.wait_for_cause()
        _log_tail(folder.worker_log(first.rank))
        if first.code == PREEMPTED.code:
            raise InternalError(
                f"worker {first.rank} of {plan.world_size} was ended by a SIGTERM from outside the job",
                hint="to stop a job, send the signal to its first process",
            )
        kind = OutOfMemoryError if first.out_of_memory else ERROR_BY_CODE[first.code]
        error: JobError = kind(first.message, hint=first.hint)
        error.step = first.step
        raise error
    if silent:
        if oom_killed:
            raise OutOfMemoryError(f"worker {silent[0]} of {plan.world_size} was killed: out of host memory")
        _log_tail(folder.launcher_log)
        if returncode < 0 and needs_launcher(plan):  # the workers died with it
            raise InternalError(
                f"the launcher of the {plan.processes} workers was killed by {signal.Signals(-returncode).name}",
                hint="see what ended it: nothing in the job does",
            )
        for rank in silent:
            _log_tail(folder.worker_log(rank))
        raise InternalError(
            f"worker {silent[0]} of {plan.world_size} died without saying why ({_describe_end(plan, returncode)})",
            hint="the lines above are the last it wrote; if none are, it was killed from outside",
        )
    if returncode != 0:
        _log_tail(folder.launcher_log)
        raise InternalError(f"all workers ended well, but the launcher with {returncode}")


def _describe_end(plan: TrainPlan, returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"{'launcher' if needs_launcher(plan) else 'it'} ended with {returncode}"


def _log_tail(path: Path) -> None:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines:
        logger.error("the end of %s:\n%s", path.name, "\n".join(lines[-_LOG_TAIL_LINES:]))
