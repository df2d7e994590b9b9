"""What the parent and its workers pass each other: files in one folder, because torchrun flattens exit codes to 1.

The parent writes the plan, the inputs and the segments of rows; the workers write the adapter, the metrics, the result
and one outcome each.

A checkpoint is a folder with these files; the parent adds its own when it puts it into the store.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SAVED_STEP = "saved.json"  # the SavedStep
TRAINING_STATE = "training.json"  # numbers: trainer, scheduler, scaler, early stopping
TENSORS = "tensors.safetensors"  # trained weights, optimizer, random number generators of every rank, best weights
METRICS = "metrics.jsonl"  # what was logged up to that step
MERGED = "merged"  # the folder, in the adapter's and in the slot, that holds the merged model


class NewTokenInput(BaseModel):
    """A token that the base model has never seen, with the ids of the tokens that its text consisted of before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    piece_ids: list[int]


class PromptInput(BaseModel):
    """A prompt to be answered before and after training: its tokens, and what a `job.evaluation.Sample` says of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ids: list[int]
    text: str
    messages: list[dict[str, Any]] | None
    reference: str | None


class SampleInputs(BaseModel):
    """Which prompts are answered, the tokens that end an answer, and the longest one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: list[PromptInput]
    stop_ids: list[int]
    max_new_tokens: int


class WorkerInputs(BaseModel):
    """Paths of what a worker reads, the vocabulary, and how it logs. `vocabulary_size` counts the tokenizer's ids;
    `train_names` are the data files that the rows of `train_tokens` came from, by their index there, `eval_names` those
    of the held-out rows. Held-out rows are of `train_tokens` where there are no `eval_tokens`. `report_to` are names of
    `job.trackers`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_folder: Path
    train_tokens: Path
    train_names: list[str]
    eval_tokens: Path | None
    eval_names: list[str]
    pad_token_id: int
    vocabulary_size: int
    new_tokens: list[NewTokenInput]
    log_format: Literal["text", "json"]
    log_level: str
    run_id: str = ""
    report_to: list[str] = []


class WorkerOutcome(BaseModel):
    """How one worker ended: an exit code of `job.errors`, at a moment (`time_s`, seconds since the epoch) and step.
    `out_of_memory`: smaller steps may need less. `stopped`: at a StopRequest, together with all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    code: int
    message: str
    hint: str
    step: int
    time_s: float
    out_of_memory: bool = False
    stopped: bool = False


class StopRequest(BaseModel):
    """The parent's wish that training end at the next step, on all ranks: with a checkpoint, or, to `finish`, as if
    that step were the last of the plan. `reason` for people: "SIGTERM"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    finish: bool = False


class SavedStep(BaseModel):
    """What the parent knows of a checkpoint that the workers have saved: after which step, by how many processes, and
    how long they stood still for it, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    world_size: int
    save_s: float


class Heartbeat(BaseModel):
    """A sign of life of one worker: how many it has given, and the step that it is in. No beat comes before the model
    is loaded; from then on each micro batch, trained or evaluated, is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beats: int
    step: int


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, by what lies in it."""

    root: Path

    @property
    def plan(self) -> Path:
        """The TrainPlan, as JSON."""
        return self.root / "plan.json"

    @property
    def xray(self) -> Path:
        """The X-ray of the data, as JSON."""
        return self.root / "xray.json"

    @property
    def inputs(self) -> Path:
        """The WorkerInputs, as JSON."""
        return self.root / "inputs.json"

    @property
    def train_rows(self) -> Path:
        """Segments to train on, int64 (N, 3) as .npy: row, first token, end of its tokens (exclusive)."""
        return self.root / "train_rows.npy"

    @property
    def eval_rows(self) -> Path:
        """Held-out segments, int64 (N, 3) as .npy, of the same form."""
        return self.root / "eval_rows.npy"

    @property
    def samples(self) -> Path:
        """The SampleInputs, as JSON; there are none where nothing is to be answered."""
        return self.root / "samples.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, as the tokenizers library saves it, where something is to be answered."""
        return self.root / "tokenizer.json"

    @property
    def adapter(self) -> Path:
        """The folder that holds the adapter."""
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        """The folder that holds the base model with the adapter merged into it."""
        return self.adapter / MERGED

    @property
    def merge_outcome(self) -> Path:
        """The WorkerOutcome of the process that merges."""
        return self.root / "merge.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each logged step (with its "loss") and each evaluation (with "eval_loss")."""
        return self.root / METRICS

    @property
    def phases(self) -> Path:
        """One line for each phase of rank 0 as it begins: its name, and when by the monotonic clock."""
        return self.root / "phases.jsonl"

    @property
    def eval_loss_base(self) -> Path:
        """The base model's held-out loss, as a JSON number, once it is known."""
        return self.root / "eval_loss_base.json"

    @property
    def result(self) -> Path:
        """The final metrics, as JSON."""
        return self.root / "result.json"

    @property
    def evaluation(self) -> Path:
        """The `job.evaluation.Evaluation`, as JSON."""
        return self.root / "evaluation.json"

    @property
    def trained(self) -> Path:
        """Is there, on every node, once rank 0 has written adapter and result: whatever happens to the workers after
        that, the adapter can be published."""
        return self.root / "trained"

    @property
    def acceptance_rows(self) -> Path:
        """What a fresh process must find again: a JSON list of AcceptanceRow. Without it, it can't be tried."""
        return self.root / "acceptance_rows.json"

    @property
    def acceptance_task(self) -> Path:
        """The AcceptanceTask, as JSON, for the process that loads the adapter back."""
        return self.root / "acceptance_task.json"

    @property
    def acceptance(self) -> Path:
        """The Acceptance, as JSON, that this process comes to."""
        return self.root / "acceptance.json"

    @property
    def acceptance_outcome(self) -> Path:
        """The WorkerOutcome of this process."""
        return self.root / "acceptance_outcome.json"

    @property
    def checkpoints(self) -> Path:
        """The folder in which rank 0 leaves checkpoints, each whole in a folder of its own, `step-00000042`."""
        return self.root / "checkpoints"

    @property
    def resume(self) -> Path:
        """The checkpoint to go on from; only rank 0 reads it. A run that starts at step 0 has none."""
        return self.root / "resume"

    @property
    def stop_request(self) -> Path:
        """The StopRequest, as JSON, once there is one."""
        return self.root / "stop.json"

    def heartbeat(self, rank: int) -> Path:
        """Return the file for a rank's last Heartbeat."""
        return self.root / f"heartbeat-{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Return the file to which a rank adds the stacks of its threads on SIGUSR1. Its first line is the process id,
        once the process is prepared for the signal."""
        return self.root / f"stacks-{rank}.txt"

    @property
    def launcher_log(self) -> Path:
        """What the launcher, and workers that failed before they could log, wrote."""
        return self.root / "launcher.log"

    def worker_log(self, rank: int) -> Path:
        """Return the file for the output of a rank other than 0."""
        return self.root / f"rank-{rank}.log"

    def outcome(self, rank: int) -> Path:
        """Return the file for a rank's WorkerOutcome."""
        return self.root / f"outcome-{rank}.json"

    def read_outcomes(self) -> list[WorkerOutcome]:
        """Return the outcomes that were written, by time."""
        found = [WorkerOutcome.model_validate_json(path.read_bytes()) for path in self.root.glob("outcome-*.json")]
        return sorted(found, key=lambda outcome: outcome.time_s)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return what was logged so far; numbers that are none are there as "nan" or "inf"."""
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        whole_lines = content[: content.rfind(b"\n") + 1].splitlines()  # the last one may be half written
        return [json.loads(line) for line in whole_lines]

    def read_last_step(self) -> int | None:
        """Return the last step that was logged, if any was."""
        logged = self.read_metrics()
        return int(logged[-1]["step"]) if logged else None

    def read_result(self) -> dict[str, Any]:
        """Return the final metrics."""
        result: dict[str, Any] = json.loads(self.result.read_bytes())
        return result


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
