"""One attempt at training: from the newest checkpoint on, under watch, with new checkpoints going to the store."""

import time
from datetime import datetime
from pathlib import Path

from job.checkpoints.resume import commit_step, fetch_newest
from job.checkpoints.uploads import Uploads
from job.errors import DivergedError, JobError
from job.evaluation import read_evaluation
from job.handover import RunFolder, SavedStep, write_whole
from job.launch import launch_workers, list_ranks
from job.lease import Lease
from job.log import logger
from job.nodes.peers import Peers
from job.outcome import Progress
from job.prepared import Prepared
from job.stopping import stop_in
from job.supervise import Supervisor
from job.watchdog import Watchdog


def attempt_training(
    prepared: Prepared,
    folder: RunFolder,
    peers: Peers,
    lease: Lease | None,
    progress: Progress,
    *,
    deadline_s: float | None,
) -> None:
    """Train what is handed over in the folder, until the deadline (monotonic clock) at most; on node 0 with its hold on
    the slot. `progress` learns of each checkpoint in the store.

    What fails after training costs nothing but its figures. Raises what `launch_workers` raises before that, and the
    checkpoints' store when it is out of reach at the start.
    """
    settings = prepared.settings
    newest = None if lease is None else fetch_newest(prepared, folder.resume)
    newest_step = None if newest is None else newest.step
    if newest is not None:
        progress.checkpoint_step = newest.step
        progress.checkpoint_s = datetime.fromisoformat(newest.created_at).timestamp()

    def commit(taken: Path, saved: SavedStep) -> None:
        commit_step(prepared, lease, taken, saved)
        progress.checkpoint_step, progress.checkpoint_s = saved.step, time.time()

    grace_s = settings.runtime.grace_seconds
    watchdog = Watchdog(
        folder,
        list_ranks(prepared.plan, peers),
        limit_s=settings.runtime.hang_minutes * 60,
        several_nodes=prepared.plan.nodes > 1,
    )
    with Uploads(folder.checkpoints, commit, newest_step=newest_step, grace_s=grace_s) as uploads:
        supervisor = Supervisor(
            folder,
            peers,
            uploads,
            watchdog,
            settings.runtime,
            deadline_s=deadline_s,
            finish_at_deadline=settings.train.accept_partial,
        )
        try:
            launch_workers(prepared.plan, folder, peers, supervisor)
        except JobError as failure:
            if isinstance(failure, DivergedError) or not folder.trained.exists():
                raise
            peers.interrupt(failure.message)  # other nodes' workers may wait for those of this one
            _note_failure(folder, failure)
        if supervisor.is_stopping:  # in the last evaluation: what is left of the grace is for publishing
            stop_in(supervisor.left_s)


def _note_failure(folder: RunFolder, failure: JobError) -> None:
    """Say that what comes after training has failed: the adapter is there, and worth more than its evaluation."""
    logger.warning("the adapter is trained, but its evaluation failed: %s", failure.message)
    found = read_evaluation(folder.evaluation)
    problems = [*found.problems, f"the evaluation failed: {failure.message}"]
    write_whole(folder.evaluation, found.model_copy(update={"problems": problems}).model_dump_json(indent=1) + "\n")
