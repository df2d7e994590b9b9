"""The files of a checkpoint: rank 0 writes and reads them, and the other ranks are told what is in them.

A checkpoint is one folder, written under another name and renamed, so that there is never half of one. The parent takes
it away, by renaming it, whenever it likes.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from job.handover import METRICS, SAVED_STEP, TENSORS, TRAINING_STATE, SavedStep
from job.log import logger
from job.plan import TrainPlan
from job.train.collective import broadcast_tensor, broadcast_text
from job.train.training_state import TrainingState


class CheckpointReader:
    """A checkpoint to go on from. Reading a tensor is collective."""

    def __init__(self, folder: Path, plan: TrainPlan, state: TrainingState, catalogue: str) -> None:
        self.state = state
        self.metrics = folder / METRICS  # rank 0's alone
        self._path = folder / TENSORS
        self._plan = plan
        self._catalogue: dict[str, tuple[str, list[int]]] = json.loads(catalogue)
        self._file = safe_open(self._path, framework="pt") if self._path.exists() else None

    def list_names(self, kind: str) -> list[str]:
        """Return the names of the tensors of a kind ("weight"), without it."""
        return [name.removeprefix(f"{kind}/") for name in self._catalogue if name.startswith(f"{kind}/")]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its full name ("weight/..."), on the plan's device."""
        dtype, shape = self._catalogue[name]
        mine = self._file.get_tensor(name) if self._file is not None else None  # type: ignore[no-untyped-call]
        return broadcast_tensor(mine, shape, getattr(torch, dtype), self._plan)


def open_checkpoint(folder: Path, plan: TrainPlan, *, rank: int) -> CheckpointReader | None:
    """Return the checkpoint that rank 0 has in the folder, or None where there is none, or none that can be read."""
    state, catalogue = _read_on_first_rank(folder) if rank == 0 else ("", "")
    state, catalogue = broadcast_text(state, plan), broadcast_text(catalogue, plan)
    if not state:
        return None
    return CheckpointReader(folder, plan, TrainingState.model_validate_json(state), catalogue)


def _read_on_first_rank(folder: Path) -> tuple[str, str]:
    """Return the state and what tensors there are, both as JSON, or nothing."""
    if not folder.exists():
        return "", ""
    try:
        state = TrainingState.model_validate_json((folder / TRAINING_STATE).read_bytes())
        catalogue = {}
        with safe_open(folder / TENSORS, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                catalogue[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
    except (OSError, ValidationError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("the checkpoint can't be gone on from, so training begins at step 0: %s", reason)
        return "", ""
    return state.model_dump_json(), json.dumps(catalogue)


def write_checkpoint(
    checkpoints: Path, state: TrainingState, tensors: Mapping[str, torch.Tensor], metrics: Path, *, started_s: float
) -> bool:
    """Write a checkpoint whole, and remove older ones that nobody has taken; return whether it is there.

    `started_s` is when the processes stopped for it, by the monotonic clock. A disk that is full costs nothing but this
    checkpoint: a warning says so.
    """
    final = checkpoints / f"step-{state.step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(dict(tensors), partial / TENSORS)
        (partial / TRAINING_STATE).write_text(state.model_dump_json(), encoding="utf-8")
        shutil.copyfile(metrics, partial / METRICS)
        _flush(partial)
        save_s = time.monotonic() - started_s
        saved = SavedStep(step=state.step, world_size=state.setup.world_size, save_s=save_s)
        (partial / SAVED_STEP).write_text(saved.model_dump_json(), encoding="utf-8")
        _flush(partial / SAVED_STEP)
        partial.rename(final)
    except (OSError, SafetensorError) as error:  # SafetensorError is what it makes of a full disk
        shutil.rmtree(partial, ignore_errors=True)
        logger.warning(
            "step %d: the checkpoint can't be saved (%s); training goes on, and the one before it stays: "
            "give SFT_RUNTIME__WORK_DIR more room",
            state.step,
            error,
        )
        return False
    logger.info("step %d: checkpoint saved in %.1f s", state.step, save_s)
    _remove_older(checkpoints, final)
    return True


def _flush(path: Path) -> None:
    for one in path.iterdir() if path.is_dir() else [path]:
        with one.open("rb") as file:
            os.fsync(file.fileno())


def _remove_older(checkpoints: Path, newest: Path) -> None:
    for old in checkpoints.glob("step-*"):
        if old.name >= newest.name:
            continue
        trash = old.with_name(f"trash-{old.name}")
        with contextlib.suppress(FileNotFoundError):  # the parent has taken it just now
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
