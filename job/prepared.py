"""A run that is ready to train: everything that `run` and `check` have found out, and its hand-over to the workers."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from job.dataset import Dataset
from job.handover import RunFolder, WorkerInputs
from job.hardware import Hardware
from job.inputs import Inputs
from job.plan import TrainPlan
from job.settings import Settings
from job.storage import Store


@dataclass(frozen=True)
class Prepared:
    """Settings, machine, inputs (the base model in `model_folder`), data set and plan of one run, and its slot."""

    settings: Settings
    hardware: Hardware
    inputs: Inputs
    model_folder: Path
    dataset: Dataset
    plan: TrainPlan
    slot: Store

    def hand_over(self, root: Path) -> RunFolder:
        """Write into a fresh folder what the workers need."""
        shutil.rmtree(root, ignore_errors=True)
        folder = RunFolder(root)
        folder.adapter.mkdir(parents=True)
        runtime, evaluation = self.settings.runtime, self.dataset.evaluation
        inputs = WorkerInputs(
            model_folder=self.model_folder,
            train_tokens=self.dataset.train.path,
            eval_tokens=None if evaluation is None else evaluation.path,
            pad_token_id=self.dataset.tokenizer.pad_token_id or 0,
            log_format=runtime.log_format,
            log_level=runtime.log_level,
        )
        folder.plan.write_text(self.plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        folder.inputs.write_text(inputs.model_dump_json(), encoding="utf-8")
        np.save(folder.train_rows, self.dataset.train_rows)
        np.save(folder.eval_rows, self.dataset.eval_rows)
        return folder
