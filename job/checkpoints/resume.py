"""What a start does with the checkpoints that it finds: goes on from the newest whole one of its own run, and leaves
another run's alone."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import job
from job.checkpoints.stored import FINISHED, Checkpoint, CheckpointStore, step_folder
from job.errors import ConfigError, DamagedError, JobError
from job.handover import RunFolder, SavedStep
from job.lease import Lease
from job.log import logger
from job.nodes.identity import describe_run, name_differences
from job.nodes.peers import Peers
from job.phases import enter_phase, phase
from job.plan import TrainPlan
from job.prepared import Prepared

# What depends on the global batch, and that on the number of processes where it is left to the job.
_BY_BATCH = ("global_batch_size", "steps", "epochs", "warmup_steps", "eval_interval_steps")
_MOST_NAMED = 5


def describe_checkpoint(prepared: Prepared, step: int, world_size: int) -> Checkpoint:
    """Return what `checkpoint.json` is to say, but for the files."""
    return Checkpoint(
        run_id=prepared.inputs.run_id,
        step=step,
        world_size=world_size,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        job_version=job.__version__,
        plan=prepared.plan.model_dump(mode="json"),
        run=describe_run(prepared),
    )


def commit_step(prepared: Prepared, lease: Lease | None, taken: Path, saved: SavedStep) -> None:
    """Put what the workers have saved into the store, and remove what is older than the newest few.

    Raises UnavailableError when another job has taken the slot over.
    """
    if lease is not None:
        lease.check()
    checkpoint = describe_checkpoint(prepared, saved.step, saved.world_size)
    prepared.checkpoints.commit(taken, step_folder(saved.step), checkpoint)
    prepared.checkpoints.retain(prepared.settings.checkpoint.keep, newest_step=saved.step)


def refuse_another_runs(prepared: Prepared) -> None:
    """Look whether the checkpoints there are another run's, which may still be wanted.

    Raises ConfigError that says what differs, unless the settings say that it may be replaced.
    """
    for name, checkpoint in _readable(prepared.checkpoints):
        if checkpoint.run_id == prepared.inputs.run_id or prepared.settings.output.overwrite:
            continue
        differences = name_differences(describe_run(prepared), checkpoint.run)
        more = f" and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        raise ConfigError(
            f"{prepared.checkpoints.uri}/{name} is a checkpoint of run {checkpoint.run_id}, and this is run "
            f"{prepared.inputs.run_id}: {'; '.join(differences[:_MOST_NAMED])}{more}",
            hint="start with what that run had, publish elsewhere ({run_id} in SFT_OUTPUT__URI is filled in for each "
            "run), or set SFT_OUTPUT__OVERWRITE=true to give that run up",
        )


def adopt_plan(prepared: Prepared, folder: RunFolder, peers: Peers) -> Prepared:
    """Hand over what the run began with, where this machine's number of processes would have made another batch.

    All nodes do the same. Raises ConfigError when the processes can't share the batch.
    """
    begun = _find_begun(prepared) if peers.node_rank == 0 else None
    theirs: dict[str, Any] | None = peers.exchange(begun)[0]
    if theirs is None:
        return prepared
    plan = _adopt(prepared.plan, theirs)
    return prepared if plan is prepared.plan else prepared.hand_over_again(folder, plan)


def _find_begun(prepared: Prepared) -> dict[str, Any] | None:
    for _, checkpoint in _readable(prepared.checkpoints):
        if checkpoint.run_id == prepared.inputs.run_id:
            return checkpoint.plan
    return None


def _adopt(plan: TrainPlan, theirs: dict[str, Any]) -> TrainPlan:
    mine = plan.model_dump(mode="json", include=set(_BY_BATCH))
    changes = {name: theirs[name] for name in _BY_BATCH if theirs[name] != mine[name]}
    if not changes:
        return plan
    batch, processes = int(theirs["global_batch_size"]), plan.world_size
    if batch % processes:
        raise ConfigError(
            f"the run began with a global batch of {batch}, which {processes} processes can't share",
            hint=f"give it a number of processes that divides {batch}, or delete the checkpoints",
        )
    share = batch // processes
    micro = max(size for size in range(1, plan.micro_batch_size + 1) if share % size == 0)
    changes |= {"micro_batch_size": micro, "gradient_accumulation_steps": share // micro}
    logger.info("going on with the global batch that the run began with, %d", batch)
    return plan.model_copy(update=changes | {"sources": plan.sources | dict.fromkeys(changes, "the checkpoint")})


def fetch_newest(prepared: Prepared, target: Path) -> Checkpoint | None:
    """Bring the newest checkpoint of this run that is whole into a folder, and return what it says of itself; without
    one there is no folder.

    Another run's are removed, which the settings allow when this is called. Damaged ones are passed over with a
    warning, and stay: it may be the network that damages what it brings.
    """
    store, run_id = prepared.checkpoints, prepared.inputs.run_id
    shutil.rmtree(target, ignore_errors=True)
    for name in store.names():
        try:
            checkpoint = store.read(name)
            if checkpoint.run_id != run_id:
                logger.warning("a checkpoint of run %s gives way: %s", checkpoint.run_id, name)
                store.delete(name)
            elif name != FINISHED:
                with phase("download"):
                    store.fetch(name, checkpoint, target)
                return checkpoint
        except DamagedError as damage:
            logger.warning("passed over: %s", damage.message)
            shutil.rmtree(target, ignore_errors=True)
    return None


def keep_finished(prepared: Prepared, folder: RunFolder) -> None:
    """Put what is left to publish into the store, for a start after one that couldn't; a failure is a warning."""
    enter_phase("uploading")
    kept = folder.root / FINISHED
    shutil.rmtree(kept, ignore_errors=True)
    step = int(folder.read_result()["steps"])
    try:
        shutil.copytree(folder.adapter, kept / folder.adapter.name)
        for path in _files_to_keep(folder):
            if path.exists():
                shutil.copy(path, kept)
        prepared.checkpoints.commit(kept, FINISHED, describe_checkpoint(prepared, step, prepared.plan.world_size))
    except (JobError, OSError) as error:  # a full disk among them
        logger.warning("a start after this one would have to train again, from a checkpoint: %s", error)
    shutil.rmtree(kept, ignore_errors=True)


def _files_to_keep(folder: RunFolder) -> tuple[Path, ...]:
    return (folder.result, folder.metrics, folder.plan, folder.evaluation, folder.acceptance_rows)


def fetch_finished(prepared: Prepared, folder: RunFolder) -> TrainPlan | None:
    """Bring what an earlier start has trained, and not published, into the run's folder; return its plan, None where
    there is nothing of this run."""
    enter_phase("listing")
    store, kept = prepared.checkpoints, folder.root / FINISHED
    if FINISHED not in store.names():
        return None
    try:
        checkpoint = store.read(FINISHED)
        if checkpoint.run_id != prepared.inputs.run_id:
            return None
        store.fetch(FINISHED, checkpoint, kept)
    except DamagedError as damage:
        logger.warning("passed over: %s", damage.message)
        return None
    shutil.rmtree(folder.adapter)
    (kept / folder.adapter.name).rename(folder.adapter)
    for path in _files_to_keep(folder):
        if (kept / path.name).exists():  # an evaluation that failed leaves none, and a job before this one kept less
            (kept / path.name).replace(path)
    shutil.rmtree(kept)
    return TrainPlan.model_validate_json(folder.plan.read_bytes())


def _readable(store: CheckpointStore) -> Iterator[tuple[str, Checkpoint]]:
    for name in store.names():
        try:
            yield name, store.read(name)
        except DamagedError:  # said where it is passed over
            continue
