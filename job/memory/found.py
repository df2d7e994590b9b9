"""What a run found out about memory, kept beside its checkpoints: a start after a kill takes no step down twice."""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from job.checkpoints.stored import CHECKPOINTS
from job.errors import JobError
from job.hardware import Hardware
from job.log import format_bytes, logger
from job.memory.smaller_plan import lower
from job.plan import TrainPlan
from job.prepared import Prepared
from job.storage import Store
from job.support import Engine

_PATH = f"{CHECKPOINTS}/memory.json"


class MemoryFound(BaseModel):
    """The steps that a run went down to, and where that was: other machines, engines and runs have other needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    device: str
    engine: Engine
    world_size: int
    micro_batch_size: int
    gradient_checkpointing: float
    loss: Literal["full", "chunked", "liger"]


def keep_memory_found(prepared: Prepared) -> None:
    """Write what the plan came down to into the workplace; a failure is a warning: it costs a retry some time only."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(_describe(prepared, prepared.plan).model_dump_json(indent=2) + "\n")
        file.flush()
        try:
            prepared.workplace.put(Path(file.name), _PATH)
        except JobError as error:
            logger.warning("a retry will run out of memory again, for %s can't be kept: %s", _PATH, error.message)


def recall_memory_found(prepared: Prepared) -> MemoryFound | None:
    """Return what an earlier start of this run found on a machine like this one."""
    try:
        content = prepared.workplace.read(_PATH)
        found = None if content is None else MemoryFound.model_validate_json(content)
    except (JobError, ValidationError) as error:
        logger.warning("%s is of no use, and left aside: %s", _PATH, str(error).splitlines()[0])
        return None
    if found is None:
        return None
    here = _describe(prepared, prepared.plan)
    for name in ("run_id", "device", "engine", "world_size"):
        theirs, ours = found.model_dump()[name], here.model_dump()[name]
        if theirs != ours:
            logger.info("%s is left aside: its %s is %s, and this one's %s", _PATH, name, theirs, ours)
            return None
    return found


def forget_memory_found(workplace: Store) -> None:
    """Remove it from a run's workplace; a failure is a warning."""
    try:
        workplace.delete(_PATH)
    except JobError as error:
        logger.warning("%s stays behind: %s", _PATH, error.message)


def apply_memory_found(plan: TrainPlan, found: MemoryFound) -> TrainPlan:
    """Return the plan, where it is above what was found lowered to it."""
    values: dict[str, object] = {}
    share = plan.micro_batch_size * plan.gradient_accumulation_steps
    if found.micro_batch_size < plan.micro_batch_size and share % found.micro_batch_size == 0:
        values["micro_batch_size"] = found.micro_batch_size
    if found.gradient_checkpointing > plan.gradient_checkpointing:
        values["gradient_checkpointing"] = found.gradient_checkpointing
    if found.loss == "chunked" and plan.loss == "full":
        values["loss"] = "chunked"
    if not values:
        return plan
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    return lower(
        plan,
        values,
        source="an earlier start ran out of memory",
        warning=f"an earlier start of this run ran out of memory: starting with what it found, {shown}",
    )


def _describe(prepared: Prepared, plan: TrainPlan) -> MemoryFound:
    return MemoryFound(
        run_id=prepared.inputs.run_id,
        device=_name_device(prepared.hardware),
        engine=plan.engine,
        world_size=plan.world_size,
        micro_batch_size=plan.micro_batch_size,
        gradient_checkpointing=plan.gradient_checkpointing,
        loss=plan.loss,
    )


def _name_device(hardware: Hardware) -> str:
    if not hardware.gpus:
        return f"CPU, {format_bytes(hardware.memory_bytes)}"
    return f"{hardware.gpus[0].name}, {format_bytes(min(gpu.memory_bytes for gpu in hardware.gpus))}"
