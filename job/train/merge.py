"""`python -m job.train.merge FOLDER`: the process that merges, and writes how it ended to a file."""

import sys
from pathlib import Path

from job.handover import RunFolder, WorkerInputs, write_whole
from job.log import setup_logging
from job.plan import TrainPlan
from job.train.worker import carry_out


def main(folder: RunFolder) -> int:
    """Merge, and leave a WorkerOutcome whatever happens; return the exit code."""
    inputs = WorkerInputs.model_validate_json(folder.inputs.read_bytes())
    setup_logging(inputs.log_format, inputs.log_level)

    def merge_as_planned() -> None:
        from job.train.merge_model import merge_model  # torch and transformers, seconds

        merge_model(TrainPlan.model_validate_json(folder.plan.read_bytes()), inputs, folder)

    outcome = carry_out(merge_as_planned, rank=0)
    write_whole(folder.merge_outcome, outcome.model_dump_json())
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(RunFolder(Path(sys.argv[1]))))
