"""`python -m job.train.accept FOLDER`: the fresh process that loads an adapter as its users do.

It starts while files are still on their way: what takes seconds, libraries and base model, is loaded first, and then it
waits for a line on its stdin, the folder that holds what was read back. It goes without a word when no line comes.
"""

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from job.accept import AcceptanceTask
from job.handover import RunFolder, write_whole
from job.log import setup_logging
from job.train.worker import carry_out


def main(folder: RunFolder) -> int:
    """Load and compare; leave an Acceptance, and a WorkerOutcome whatever happens; return the exit code."""
    task = AcceptanceTask.model_validate_json(folder.acceptance_task.read_bytes())
    setup_logging(task.log_format, task.log_level)
    _leave_out_libraries(task)

    def accept() -> None:
        from job.train.accept_adapter import accept_adapter, load_base_as_users_do  # torch and PEFT, seconds

        base = load_base_as_users_do(task)
        adapter = sys.stdin.readline().rstrip("\n")
        if adapter:
            accepted = accept_adapter(base, Path(adapter), task)
            write_whole(folder.acceptance, accepted.model_dump_json())

    outcome = carry_out(accept, rank=0)
    write_whole(folder.acceptance_outcome, outcome.model_dump_json())
    return outcome.code


def _leave_out_libraries(task: AcceptanceTask) -> None:
    """Have PEFT and transformers do without what this needs not, as if it weren't installed: they import it if it is,
    which took 1.2 s of 4.5 in all."""
    left_out = ["boto3", "deepspeed"]
    if task.plan.quantization in ("none", "fp8"):
        left_out.append("bitsandbytes")
    for name in left_out:
        sys.modules[name] = None  # type: ignore[assignment]


def _end(code: int) -> NoReturn:
    """End without tearing down what the libraries have built up."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main(RunFolder(Path(sys.argv[1]))))
