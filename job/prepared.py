"""A run that is ready to train: everything that `run` and `check` have found out, and its hand-over to the workers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from job.checkpoints.stored import CheckpointStore
from job.data import NewToken
from job.dataset import Dataset
from job.handover import NewTokenInput, RunFolder, WorkerInputs
from job.hardware import Hardware
from job.inputs import Inputs
from job.log import settle_log_format
from job.memory.estimate import estimate_memory
from job.memory.setup import pick_setup
from job.phases import enter_phase
from job.plan import TrainPlan
from job.settings import Settings
from job.storage import Slot, Store
from job.stream import micro_batch_counter
from job.weights import Weights


@dataclass(frozen=True)
class Prepared:
    """Settings, machine, inputs (the base model in `model_folder`, with its weights on their way there), data set and
    plan of one run, its slot, and the places of its checkpoints and of what else is kept while it goes on."""

    settings: Settings
    hardware: Hardware
    inputs: Inputs
    model_folder: Path
    weights: Weights
    dataset: Dataset
    plan: TrainPlan
    slot: Slot
    checkpoints: CheckpointStore
    workplace: Store

    def outline(self) -> dict[str, Any]:
        """Return the fields of the log's event `plan`."""
        plan = self.plan
        return {
            "run_id": self.inputs.run_id,
            "total_steps": plan.steps,
            "epochs": plan.epochs,
            "global_batch_size": plan.global_batch_size,
            "world_size": plan.world_size,
            "engine": plan.engine,
            "device": plan.device,
            "estimated_memory_bytes": plan.memory.total_bytes,
        }

    def write_down(self, folder: RunFolder, warnings: Sequence[str]) -> None:
        """Write plan and X-ray into a fresh folder."""
        xray = {**asdict(self.dataset.xray), "warnings": list(warnings)}
        self._write_afresh(folder, json.dumps(xray, indent=2, ensure_ascii=False) + "\n")

    def hand_over(self, folder: RunFolder) -> RunFolder:
        """Write beside them what the workers need."""
        enter_phase("planning")
        folder.adapter.mkdir()
        runtime, evaluation = self.settings.runtime, self.dataset.evaluation
        template = self.dataset.template
        inputs = WorkerInputs(
            model_folder=self.model_folder,
            train_tokens=self.dataset.train.path,
            train_names=list(self.dataset.train.names),
            eval_tokens=None if evaluation is None else evaluation.path,
            eval_names=list((self.dataset.train if evaluation is None else evaluation).names),
            pad_token_id=self.dataset.tokenizer.pad_token_id or 0,
            vocabulary_size=len(self.dataset.tokenizer),
            new_tokens=[] if template is None else [_describe(token) for token in template.new_tokens],
            log_format=settle_log_format(runtime.log_format),
            log_level=runtime.log_level,
            run_id=self.inputs.run_id,
            report_to=runtime.report_to,
        )
        folder.inputs.write_text(inputs.model_dump_json(), encoding="utf-8")
        if self.dataset.samples is not None:
            folder.samples.write_text(self.dataset.samples.model_dump_json(), encoding="utf-8")
            self.dataset.tokenizer.backend_tokenizer.save(str(folder.tokenizer))
        np.save(folder.train_rows, self.dataset.train_segments)
        np.save(folder.eval_rows, self.dataset.eval_segments)
        return folder

    def hand_over_again(self, folder: RunFolder, plan: TrainPlan) -> "Prepared":
        """Hand over another plan, with the memory that it needs, and nothing left in the folder of what workers did
        there; return what is prepared now."""
        changed = replace(self, plan=self._estimate_again(plan))
        changed._write_afresh(folder, folder.xray.read_text(encoding="utf-8"))
        changed.hand_over(folder)
        return changed

    def _estimate_again(self, plan: TrainPlan) -> TrainPlan:
        facts, values = self.dataset.facts, plan.model_dump()
        tokens = micro_batch_counter(values, facts.row_tokens)(plan.micro_batch_size)
        setup = replace(pick_setup(values), micro_batch_tokens=tokens)
        memory = estimate_memory(setup, facts.shape, plan.memory.available_bytes)
        return plan.model_copy(update={"micro_batch_tokens": tokens, "memory": memory})

    def _write_afresh(self, folder: RunFolder, xray: str) -> None:
        shutil.rmtree(folder.root, ignore_errors=True)
        folder.root.mkdir(parents=True)
        folder.plan.write_text(self.plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        folder.xray.write_text(xray, encoding="utf-8")


def _describe(token: NewToken) -> NewTokenInput:
    return NewTokenInput(id=token.id, piece_ids=list(token.piece_ids))
