"""How a run ended, in the form that Kubernetes shows: one JSON object in the termination log, 4,096 bytes at most."""

import json
from dataclasses import dataclass

from job.errors import OK, ExitCode
from job.log import event, logger, redact
from job.phases import OTHER, enter_phase, log_phases
from job.settings_runtime import RuntimeSettings

_LIMIT_BYTES = 4096  # what the kubelet keeps of a termination log


@dataclass
class Progress:
    """How far the run has come: what an outcome says of it, wherever it ends, and what may be watched until then."""

    phase: str = "starting"
    run_id: str | None = None
    step: int | None = None
    total_steps: int | None = None
    output: str | None = None
    checkpoint_step: int | None = None  # of the newest checkpoint in the store
    checkpoint_s: float | None = None  # since the epoch, when it came there

    def enter(self, part: str, *, phase: str = OTHER) -> None:
        """Begin a part of what is done, with the first of its `job.phases`, and say so in the log."""
        enter_phase(phase)
        self.phase = part
        logger.info("== %s", part, extra=event("phase", phase=part))


def log_outcome(ending: ExitCode, message: str, hint: str, progress: Progress, *, success: str) -> None:
    """Say how it ended, to people (with 0: `success`) and as the event that is the last of a log."""
    if progress.total_steps is not None:
        log_phases()
    run = {"run_id": progress.run_id, "step": progress.step, "total_steps": progress.total_steps}
    more = {"reason": message, "hint": hint, **run, "output": progress.output}
    fields = event("ended", code=ending.code, name=ending.name, **more)
    if ending is OK:
        logger.info("%s", success, extra=fields)
        return
    logger.error("%s", message)
    if hint:
        logger.error("remedy: %s", hint)
    logger.error("exit code %d (%s): %s", ending.code, ending.name, ending.when, extra=fields)


def format_outcome(ending: ExitCode, message: str, hint: str, progress: Progress) -> str:
    """Return the outcome as JSON, its longest texts cut so that the whole stays within the limit."""
    outcome: dict[str, int | str | None] = {
        "code": ending.code,
        "name": ending.name,
        "message": redact(message),
        "hint": redact(hint),
        "run_id": progress.run_id,
        "step": progress.step,
        "total_steps": progress.total_steps,
        "output": progress.output,
    }
    while len(text := json.dumps(outcome)) > _LIMIT_BYTES:
        # By their length as JSON: it writes a character outside ASCII as 6 bytes, or as 12.
        longest = max(("message", "hint", "output"), key=lambda name: len(json.dumps(outcome[name])))
        whole = str(outcome[longest])
        outcome[longest] = whole[: len(whole) * 9 // 10]
    return text


def write_outcome(runtime: RuntimeSettings, text: str) -> None:
    """Write the outcome to the termination log; the default path only where the kubelet made it, since it lies in
    /dev."""
    path = runtime.termination_log
    if "termination_log" not in runtime.model_fields_set and not path.exists():
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("SFT_RUNTIME__TERMINATION_LOG=%s: can't be written: %s", path, error.strerror)
