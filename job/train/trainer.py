"""transformers' Trainer with every default that matters chosen on purpose, and the metrics of each logged step."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from job.errors import DivergedError
from job.log import logger
from job.plan import TrainPlan
from job.support import uses_deepspeed
from job.train.dataset import StreamSampler, TokenRows
from job.train.liger import LIGER_KERNELS


def training_arguments(plan: TrainPlan, scratch: Path) -> TrainingArguments:
    """Return the Trainer's arguments; those that stand here with a default's value do so because defaults change."""
    is_distributed = plan.world_size > 1 or plan.engine != "ddp"
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=plan.learning_rate,
        # transformers' "constant" ignores the warmup
        lr_scheduler_type="constant_with_warmup" if plan.scheduler == "constant" else plan.scheduler,
        warmup_steps=plan.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=plan.max_grad_norm,
        optim=_optimizer_name(plan),
        bf16=plan.dtype == "bfloat16",  # on by default
        fp16=plan.dtype == "float16",
        # DeepSpeed finds the CPU by itself (DS_ACCELERATOR); with use_cpu, accelerate would run plain DDP in its place.
        use_cpu=plan.device == "cpu" and not uses_deepspeed(plan.engine),
        gradient_checkpointing=plan.gradient_checkpointing,  # on by default
        gradient_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,  # every supervised token of the global batch weighs the same
        ddp_backend=("nccl" if plan.device == "cuda" else "gloo") if is_distributed else None,
        ddp_find_unused_parameters=False,
        use_liger_kernel=plan.loss == "liger",
        liger_kernel_config=LIGER_KERNELS if plan.loss == "liger" else None,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device == "cuda",
        dataloader_num_workers=0,  # rows are memory-mapped and joined in microseconds
        logging_strategy="steps",
        logging_steps=plan.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the default replaces a NaN by the average before it
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed,
    )


def _optimizer_name(plan: TrainPlan) -> str:
    if plan.optimizer == "paged_adamw_8bit":
        return plan.optimizer
    return "adamw_torch_fused" if plan.device == "cuda" else "adamw_torch"


class StreamTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that reads rows in the order of `StreamSampler`."""

    def __init__(self, plan: TrainPlan, **kwargs: Any) -> None:
        self._plan = plan
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: TokenRows | None = None) -> Sampler[int]:
        return make_sampler(self._plan)


def make_sampler(plan: TrainPlan) -> StreamSampler:
    """Return the order of rows of the whole run; accelerate deals consecutive micro batches out to the processes."""
    return StreamSampler(plan.train_rows, steps=plan.steps, global_batch_size=plan.global_batch_size, seed=plan.seed)


def _order_by_step(plan: TrainPlan) -> np.ndarray:
    """Return the indices of the segments that each step learns from, int64 (steps, global batch)."""
    return np.fromiter(make_sampler(plan), dtype=np.int64).reshape(plan.steps, -1)


def has_exploded(losses: Sequence[float]) -> bool:
    """Say whether a run's logged losses ended far above where they began: the mean of the last quarter lies more than
    1 nat per token above that of the first. Fewer than 20 losses are too few to tell it from noise."""
    quarter = len(losses) // 4
    if len(losses) < 20:
        return False
    return sum(losses[-quarter:]) / quarter > sum(losses[:quarter]) / quarter + 1.0


class StepMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step to metrics.jsonl and the log, from rank 0, and stops all ranks when the loss leaves the
    numbers."""

    def __init__(
        self,
        plan: TrainPlan,
        path: Path,
        *,
        rank: int,
        rows: TokenRows,
        names: Sequence[str],
        remember_step: Callable[[int], None],
    ) -> None:
        self._plan = plan
        self._path = path
        self._is_writer = rank == 0
        self._rows = rows
        self._names = names
        self._tokens_by_step = rows.lengths()[_order_by_step(plan)].sum(axis=1).cumsum()  # (steps,)
        self._started_s = time.monotonic()
        self._remember_step = remember_step
        self._losses: list[float] = []
        self._logged_step = 0

    def start_clock(self) -> None:
        """Say that the first step begins."""
        self._started_s = time.monotonic()

    def summarize(self, steps: int) -> dict[str, float | int]:
        """Return how much was learned from in so many steps, by all processes, and how fast."""
        tokens, elapsed_s = self._tokens(steps), self._elapsed_s()
        return {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": round(tokens / elapsed_s, 1),
            "train_seconds": round(elapsed_s, 1),
        }

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember the step, for the outcome."""
        self._remember_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Record a step's metrics.

        Raises DivergedError, on every rank alike, since the loss in `logs` is the average over all.
        """
        if "loss" not in logs:  # the summary at the end
            return
        step, loss, grad_norm = state.global_step, float(logs["loss"]), float(logs["grad_norm"])
        elapsed_s = self._elapsed_s()
        tokens = self._tokens(step)
        if self._is_writer:
            self._write(step, loss, grad_norm, float(logs["learning_rate"]), tokens, elapsed_s)
        self._losses.append(loss)
        # In float16 the loss scale overflows now and then: the gradient is infinite, and that step is skipped.
        is_overflow = self._plan.dtype == "float16"
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or is_overflow)):
            raise DivergedError(
                f"step {step} of {self._plan.steps}: loss {loss}, gradient norm {grad_norm}, "
                f"learning rate {logs['learning_rate']:.3g}; rows since step {self._logged_step}: "
                f"{self._describe_rows(self._logged_step, step)}",
                hint=self._hint(),
            )
        self._logged_step = step

    def record_evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss after a step.

        Raises DivergedError when it is no number; on every rank alike, since all ranks evaluate to the same loss.
        """
        if self._is_writer:
            self._append({"step": step, "eval_loss": loss})
            logger.info("step %d/%d  held-out loss %.4f", step, self._plan.steps, loss)
        if not math.isfinite(loss):
            raise DivergedError(f"step {step} of {self._plan.steps}: the held-out loss is {loss}", hint=self._hint())

    def check_not_exploded(self) -> None:
        """Raise DivergedError when the run learned the opposite of what it was shown."""
        if has_exploded(self._losses):
            raise DivergedError(
                f"the loss rose from {self._losses[0]:.2f} at the first step to {self._losses[-1]:.2f} at the last",
                hint=self._hint(),
            )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _tokens(self, step: int) -> int:
        return int(self._tokens_by_step[step - 1])

    def _describe_rows(self, after_step: int, step: int) -> str:
        return self._rows.describe(_order_by_step(self._plan)[after_step:step].ravel(), self._names)

    def _hint(self) -> str:
        lower = self._plan.learning_rate / 4
        return f"the likeliest cause is a learning rate that is too high: try SFT_TRAIN__LEARNING_RATE={lower:.2g}"

    def _write(
        self, step: int, loss: float, grad_norm: float, learning_rate: float, tokens: int, elapsed_s: float
    ) -> None:
        record = {
            "step": step,
            "epoch": round(step * self._plan.global_batch_size / self._plan.train_rows, 4),
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": tokens,
            "elapsed_s": round(elapsed_s, 3),
        }
        self._append(record)
        logger.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s  %.0f s left",
            step,
            self._plan.steps,
            loss,
            grad_norm,
            learning_rate,
            tokens / elapsed_s,
            elapsed_s / step * (self._plan.steps - step),
        )

    def _append(self, record: dict[str, float]) -> None:
        # NaN isn't JSON
        finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
