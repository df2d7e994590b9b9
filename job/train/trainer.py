"""transformers' Trainer with every default that matters chosen on purpose, and rows in an order of our own."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from job.memory.estimate import count_checkpointed_layers
from job.plan import TrainPlan
from job.stream import deal_rows
from job.support import uses_deepspeed
from job.train.dataset import StreamSampler, TokenRows
from job.train.liger import LIGER_KERNELS


def training_arguments(plan: TrainPlan, scratch: Path, *, run_name: str) -> TrainingArguments:
    """Return the Trainer's arguments; those that stand here with a default's value do so because defaults change.

    `run_name` is for trackers.
    """
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
        gradient_checkpointing=plan.gradient_checkpointing > 0,  # on by default
        gradient_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,  # every supervised token of the global batch weighs the same
        ddp_backend=("nccl" if plan.device == "cuda" else "gloo") if is_distributed else None,
        ddp_find_unused_parameters=False,
        use_liger_kernel=plan.loss == "liger",
        liger_kernel_config=LIGER_KERNELS if plan.loss == "liger" else None,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device == "cuda",
        accelerator_config={"non_blocking": plan.device == "cuda"},  # pinned batches are copied while the GPU computes
        dataloader_num_workers=0,  # rows are memory-mapped and joined in microseconds
        logging_strategy="steps",
        logging_steps=1,  # every step is looked at; StepMetrics writes some of them down
        logging_nan_inf_filter=False,  # the default replaces a NaN by the average before it
        save_strategy="no",
        eval_strategy="no",
        report_to="none",  # every step would be reported: see job.train.trackers
        run_name=run_name,
        disable_tqdm=True,
        seed=plan.seed,
    )


def keep_activations_of_last_layers(model: nn.Module, share: float) -> None:
    """Have only the first layers, a `share` of them, compute their activations again, once the Trainer has switched
    gradient checkpointing on for all.

    The first, because the others' activations are gone when these come back. A model that knows gradient checkpointing
    as a whole only, keeps none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[count_checkpointed_layers(share, len(layers)) :]:
        layer.gradient_checkpointing = False


def _optimizer_name(plan: TrainPlan) -> str:
    if plan.optimizer == "paged_adamw_8bit":
        return plan.optimizer
    return "adamw_torch_fused" if plan.device == "cuda" else "adamw_torch"


class StreamTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that reads rows in the order of `StreamSampler`, from the step after `start_step` on.

    `note_wait` is told the seconds that it waited for each micro batch.
    """

    def __init__(self, plan: TrainPlan, *, start_step: int, note_wait: Callable[[float], None], **kwargs: Any) -> None:
        self._plan = plan
        self._start_step = start_step
        self._note_wait = note_wait
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: TokenRows | None = None) -> Sampler[int]:
        plan, lengths = self._plan, self.train_dataset.lengths()
        # accelerate gives consecutive micro batches to the processes in turn
        deal = partial(deal_rows, size=plan.micro_batch_size, processes=plan.world_size, is_joined=plan.packing)
        return StreamSampler(
            plan.train_rows,
            steps=plan.steps,
            global_batch_size=plan.global_batch_size,
            seed=plan.seed,
            start_step=self._start_step,
            deal=lambda rows: rows[deal(lengths[rows][None])[0]],
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the micro batches of a step and their supervised tokens, as the Trainer does."""
        batches, tokens = super().get_batch_samples(self._watch(epoch_iterator), num_batches, device)
        return batches, tokens

    def _watch(self, micro_batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began_s = time.monotonic()
            micro_batch = next(micro_batches, None)
            self._note_wait(time.monotonic() - began_s)
            if micro_batch is None:
                return
            yield micro_batch

    def count_from_start_step(self) -> None:
        """Have the first step be the one after `start_step`: to be called when training begins."""
        self.state.global_step = self._start_step
        self._globalstep_last_logged = self._start_step  # the Trainer divides the first loss by the steps since then
