"""Training within the memory that there is: on out-of-memory, the same run again in smaller steps.

Where there is a checkpoint it goes on from there. Else the adapter is that of a run which took the smaller steps from
the beginning. What was found is kept in the workplace for a retry, until the adapter is published.
"""

from collections.abc import Callable, Sequence

from job.errors import ConfigError, OutOfMemoryError, ResourcesError, UnavailableError
from job.handover import RunFolder
from job.log import logger
from job.memory.found import (
    MemoryFound,
    apply_memory_found,
    forget_memory_found,
    keep_memory_found,
    recall_memory_found,
)
from job.memory.smaller_plan import take_smaller_step
from job.nodes.peers import AttemptEndedError, Peers
from job.plan import TrainPlan
from job.prepared import Prepared


def train_within_memory(
    prepared: Prepared, folder: RunFolder, peers: Peers, attempt: Callable[[Prepared], None]
) -> Prepared:
    """Train as planned, or in smaller steps until the memory suffices; return what was prepared with the plan that was
    carried out.

    `attempt` trains what is handed over in the folder. All nodes take the same steps. Raises ResourcesError when the
    smallest steps need too much, and what `attempt` raises but OutOfMemoryError.
    """
    prepared = _begin_where_a_start_left_off(prepared, folder, peers)
    tried = [prepared.plan]
    shortage = _train(prepared, folder, peers, attempt)
    while shortage is not None:
        smaller = take_smaller_step(prepared.plan)
        if smaller is None:
            break
        prepared = _hand_over_again(prepared, folder, smaller)
        if peers.node_rank == 0:
            keep_memory_found(prepared)
        try:
            shortage = _train(prepared, folder, peers, attempt)
        except ConfigError as refusal:  # the plan before it was none: not every model's loss can be computed in chunks
            logger.warning("that is no way out: %s", refusal.message)
            break
        tried.append(prepared.plan)
    if shortage is None:
        return prepared
    if peers.node_rank == 0:
        forget_memory_found(prepared.workplace)  # nothing that is enough was found
    raise give_up(tried, shortage)


def _begin_where_a_start_left_off(prepared: Prepared, folder: RunFolder, peers: Peers) -> Prepared:
    mine = recall_memory_found(prepared) if peers.node_rank == 0 else None
    found = peers.exchange(None if mine is None else mine.model_dump())[0]
    if found is None:
        return prepared
    plan = apply_memory_found(prepared.plan, MemoryFound.model_validate(found))
    return prepared if plan is prepared.plan else _hand_over_again(prepared, folder, plan)


def _hand_over_again(prepared: Prepared, folder: RunFolder, plan: TrainPlan) -> Prepared:
    logger.warning("%s", plan.warnings[-1])
    return prepared.hand_over_again(folder, plan)


def _train(
    prepared: Prepared, folder: RunFolder, peers: Peers, attempt: Callable[[Prepared], None]
) -> OutOfMemoryError | None:
    """Make an attempt; return the error where memory ran out on any node."""
    shortage: OutOfMemoryError | None = None
    try:
        attempt(prepared)
    except OutOfMemoryError as error:
        shortage = error
        logger.error("%s", shortage.message)
        peers.interrupt(shortage.message)
    except AttemptEndedError as ended:
        logger.warning("%s", ended)
    try:
        endings = peers.exchange({"out_of_memory": None if shortage is None else shortage.message})
    except UnavailableError as lost:
        if not folder.trained.exists():
            raise
        logger.warning("the adapter is trained, and can be published without the other nodes: %s", lost.message)
        return None
    for rank, ending in enumerate(endings):
        if shortage is None and ending["out_of_memory"] is not None:
            shortage = OutOfMemoryError(f"node {rank}: {ending['out_of_memory']}")
    return shortage


def give_up(tried: Sequence[TrainPlan], shortage: OutOfMemoryError) -> ResourcesError:
    """Return the error that says what was tried, what the last of it was, and the remedies."""
    last = tried[-1]
    sizes = list(dict.fromkeys(plan.micro_batch_size for plan in tried))
    steps = [f"micro batches of {', '.join(map(str, sizes))}" if len(sizes) > 1 else f"a micro batch of {sizes[0]}"]
    steps += ["gradient checkpointing"] if last.gradient_checkpointing else []
    steps += [f"the {last.loss} loss"] if last.loss != "full" else []
    sequences = f"{last.micro_batch_size} sequence{'s' if last.micro_batch_size > 1 else ''}"
    processes = f"each of {last.world_size} processes" if last.world_size > 1 else "1 process"
    weights = last.dtype if last.quantization == "none" else last.quantization
    error = ResourcesError(
        f"out of memory after every smaller step was tried ({', '.join(steps)}): {shortage.message}; the last was "
        f"{sequences} of up to {last.max_length_tokens:,} tokens on {processes}, {last.model_id} in {weights}; "
        f"estimated: {last.memory.describe()}",
        hint=_name_remedies(last),
    )
    error.step = shortage.step
    return error


def _name_remedies(plan: TrainPlan) -> str:
    remedies = [f"lower SFT_DATA__MAX_LENGTH (it is {plan.max_length_tokens:,})"]
    if plan.quantization != "nf4":
        remedies.append("set SFT_QUANTIZATION=nf4")
    if plan.device == "cuda" and plan.engine == "ddp":
        remedies.append("share the model among more GPUs by SFT_PARALLEL__ENGINE=zero3")
    remedies.append("use a GPU with more memory" if plan.device == "cuda" else "give the job more memory")
    return f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
