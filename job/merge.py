"""The whole model beside the adapter: merged by a process of its own, with what is needed to use it without PEFT."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from job.cgroup import count_oom_kills
from job.errors import ERROR_BY_CODE, InternalError, ResourcesError
from job.handover import RunFolder, WorkerOutcome
from job.launch import GRACE_S
from job.launch_command import worker_environment
from job.log import format_bytes, logger
from job.plan import TrainPlan
from job.prepared import Prepared
from job.processes import adopt_orphans, child_pids, die_with, end_descendants
from job.stopping import acknowledge_stop

_MODULE = "job.train.merge"
_READ_BACK_BYTES = 5 * 2**30  # a published file is read back beside the model, and no shard is larger
_MORE_MEMORY = "the whole model must fit into memory once: give the job more, or set SFT_OUTPUT__MERGE=false"


def merge_adapter(prepared: Prepared, folder: RunFolder) -> None:
    """Write the merged model into the adapter's folder, with tokenizer and chat template.

    Raises ResourcesError where disk or memory are too small, and the JobError that the process wrote down. It is gone
    when this returns or raises.
    """
    weights_bytes = prepared.inputs.base_model.weights_bytes()
    check_room(folder.root, weights_bytes)
    _run(prepared.plan, folder)
    prepared.dataset.tokenizer.save_pretrained(folder.merged)
    _stop_at(folder, prepared.dataset.tokenizer.eos_token_id)
    size_bytes = sum(path.stat().st_size for path in folder.merged.iterdir())
    logger.info("the merged model has %s", format_bytes(size_bytes))


def check_room(work_dir: Path, weights_bytes: int) -> None:
    """Raise ResourcesError when the work folder has no room for a second copy of the weights."""
    needed_bytes = weights_bytes + min(weights_bytes, _READ_BACK_BYTES)
    free_bytes = shutil.disk_usage(work_dir).free
    if free_bytes < needed_bytes:
        raise ResourcesError(
            f"SFT_OUTPUT__MERGE=true: the merged model needs {format_bytes(needed_bytes)} of disk, and "
            f"{format_bytes(free_bytes)} are free",
            hint="give SFT_RUNTIME__WORK_DIR more room, or set SFT_OUTPUT__MERGE=false",
        )


def _run(plan: TrainPlan, folder: RunFolder) -> None:
    adopt_orphans()
    spared = child_pids()
    oom_kills_before = count_oom_kills()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(folder.root)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            env=worker_environment(plan),
            start_new_session=True,  # Ctrl-C on a terminal reaches the job alone, which then ends it
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509 - only two system calls
        )
        returncode = process.wait()
    finally:
        acknowledge_stop()  # ending it may take longer than a reminder
        end_descendants(spared=spared, grace_s=GRACE_S)
    if not folder.merge_outcome.exists():
        if count_oom_kills() > oom_kills_before:
            raise ResourcesError("out of host memory while merging", hint=_MORE_MEMORY)
        raise InternalError(f"the process that merges died without saying why (it ended with {returncode})")
    outcome = WorkerOutcome.model_validate_json(folder.merge_outcome.read_bytes())
    if outcome.out_of_memory:
        raise ResourcesError(f"while merging: {outcome.message}", hint=_MORE_MEMORY)
    if outcome.code != 0:
        raise ERROR_BY_CODE[outcome.code](outcome.message, hint=outcome.hint)


def _stop_at(folder: RunFolder, token_id: int | None) -> None:
    """Have generation end at the token that the training rows end turns with, too: the base model may not know it."""
    path = folder.merged / "generation_config.json"
    if token_id is None or not path.exists():
        return
    config = json.loads(path.read_bytes())
    known = config.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    if token_id not in known:
        known = [token_id, *known]
    config["eos_token_id"] = known[0] if len(known) == 1 else known
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
