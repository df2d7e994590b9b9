"""Starts the worker processes through `accelerate launch`, passes signals on, and reads how they ended.

Whatever happens to any process of the run, none is left behind: workers die with the launcher, the launcher with the
job, and the job ends all that remain.
"""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

from job.errors import ERROR_BY_CODE, PREEMPTED, UNAVAILABLE, InternalError, JobError, OutOfMemoryError
from job.handover import RunFolder
from job.launch_command import Rendezvous, launch_command, worker_environment
from job.log import logger
from job.nodes.peers import Peers
from job.plan import TrainPlan
from job.processes import adopt_orphans, child_pids, die_with, end_descendants
from job.stopping import acknowledge_stop

GRACE_S = 10.0
_LOG_TAIL_LINES = 40
_POLL_S = 0.2
_CONSEQUENCES = (UNAVAILABLE.code, PREEMPTED.code)


def launch_workers(plan: TrainPlan, folder: RunFolder, peers: Peers) -> None:
    """Run this node's part of the plan's worker processes on the files in `folder` until all have ended well.

    Raises the JobError that the first failing worker wrote down (OutOfMemoryError where a smaller plan may do);
    InternalError or OutOfMemoryError for one that died without a word; UnavailableError when another node is lost, and
    AttemptEndedError when its attempt has ended. No process is left when this returns or raises.
    """
    rendezvous = _agree_on_rendezvous(peers)
    adopt_orphans()
    spared = child_pids()
    oom_kills_before = count_oom_kills()
    try:
        with folder.launcher_log.open("wb") as launcher_log:
            # Rank 0 sends its stderr to the launcher's stdout, which is the job's stderr, so that it comes through
            # live without the launcher's own tracebacks.
            launcher = subprocess.Popen(
                launch_command(plan, folder, rendezvous),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=launcher_log,
                env=worker_environment(plan, rendezvous),
                start_new_session=True,  # Ctrl-C on a terminal reaches the job alone, which then ends the others
                preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509 - only two system calls
            )
            returncode = _wait(launcher, peers)
    finally:
        acknowledge_stop()  # ending the workers may take longer than a reminder
        end_descendants(spared=spared, grace_s=GRACE_S)
    _raise_failure(plan, folder, peers, returncode, oom_killed=count_oom_kills() > oom_kills_before)


def _agree_on_rendezvous(peers: Peers) -> Rendezvous | None:
    """Return where the workers of all nodes meet, at a port that node 0 has free; None on one node."""
    if peers.nodes == 1:
        return None
    port = None
    if peers.node_rank == 0:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    return Rendezvous(peers.node_rank, peers.first_address, peers.exchange(port)[0], peers.interface)


def _wait(launcher: subprocess.Popen[bytes], peers: Peers) -> int:
    while True:
        try:
            return launcher.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            peers.check()


def _raise_failure(plan: TrainPlan, folder: RunFolder, peers: Peers, returncode: int, *, oom_killed: bool) -> None:
    outcomes = folder.read_outcomes()
    first_rank = peers.node_rank * plan.processes
    ranks = range(first_rank, first_rank + plan.processes)
    silent = sorted(set(ranks) - {outcome.rank for outcome in outcomes})
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
        if returncode < 0:  # the workers died with it
            raise InternalError(
                f"the launcher of the {plan.processes} workers was killed by {signal.Signals(-returncode).name}",
                hint="see what ended it: nothing in the job does",
            )
        for rank in silent:
            _log_tail(folder.worker_log(rank))
        raise InternalError(
            f"worker {silent[0]} of {plan.world_size} died without saying why (launcher ended with {returncode})",
            hint="the lines above are the last it wrote; if none are, it was killed from outside",
        )
    if returncode != 0:
        _log_tail(folder.launcher_log)
        raise InternalError(f"all workers ended well, but the launcher with {returncode}")


def _log_tail(path: Path) -> None:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines:
        logger.error("the end of %s:\n%s", path.name, "\n".join(lines[-_LOG_TAIL_LINES:]))


def count_oom_kills() -> int:
    """Return how often the kernel killed a process of this container for memory (cgroup v2), 0 where it doesn't say."""
    events = Path("/sys/fs/cgroup/memory.events")
    counts = dict(line.split() for line in events.read_text().splitlines()) if events.exists() else {}
    return int(counts.get("oom_kill", 0))
