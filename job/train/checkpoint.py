"""Checkpoints: the state of training, whole and by name, whatever engine has split it, and training that goes on.

What is restored is exact: with the same setup, the steps that follow are those of a run that was never stopped, bit by
bit. With another setup (processes, engine, micro batch) the same rows follow, and only random numbers and rounding are
others.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from peft import PeftModel

from job.errors import InternalError
from job.handover import RunFolder
from job.log import logger
from job.phases import enter_phase
from job.plan import TrainPlan
from job.train.checkpoint_files import CheckpointReader, write_checkpoint
from job.train.collective import find_maximum, gather_bytes
from job.train.early_stopping import EarlyStopping
from job.train.evaluate import mean_loss
from job.train.gather import find_trained, gather_one, replace_one
from job.train.metrics import StepMetrics
from job.train.optimizer_state import (
    can_be_saved,
    gather_states,
    read_loss_scale,
    restore_loss_scale,
    restore_states,
)
from job.train.random_state import read_random_state, restore_random_state, seed_anew
from job.train.trainer import StreamTrainer
from job.train.training_state import TrainingState, describe_setup


class Checkpoints:
    """Saves and restores one training. Everything here is collective."""

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        model: PeftModel,
        trainer: StreamTrainer,
        metrics: StepMetrics,
        stopping: EarlyStopping | None,
        *,
        rank: int,
    ) -> None:
        self.eval_rows_base: np.ndarray | None = None  # what `evaluate_rows` found of the base model
        self._plan = plan
        self._folder = folder
        self._model = model
        self._trainer = trainer
        self._metrics = metrics
        self._stopping = stopping
        self._rank = rank
        self._setup = describe_setup(plan)

    def save(self, step: int) -> None:
        """Save a checkpoint of what was learned in so many steps."""
        enter_phase("saving")
        started_s = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._gather():
            if self._rank == 0:
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        is_saved = self._rank == 0 and write_checkpoint(
            self._folder.checkpoints, self._read_state(step), tensors, self._folder.metrics, started_s=started_s
        )
        if find_maximum([int(is_saved)], self._plan)[0]:  # whichever rank fails later says which checkpoint there is
            self._metrics.saved_step = step

    def restore(self, checkpoint: CheckpointReader) -> Callable[[], None]:
        """Restore the training, prepared by its engine but without a step taken; return what must be called right
        before the first step, so that the random numbers are those that come next."""
        state, trainer, plan = checkpoint.state, self._trainer, self._plan
        self._check_same_run(checkpoint)
        with torch.no_grad():
            for name, weight in find_trained(self._model).items():
                replace_one(weight, checkpoint.read(f"weight/{name}"), plan.engine)
        self._restore_optimizer(checkpoint)
        schedule = trainer.lr_scheduler
        schedule.load_state_dict(
            schedule.state_dict()
            | {
                "last_epoch": state.schedule_steps,
                "_step_count": state.schedule_steps + 1,
                "_last_lr": [state.learning_rate for _ in schedule.get_last_lr()],
            }
        )
        for group in trainer.optimizer.param_groups:
            group["lr"] = state.learning_rate
        restore_loss_scale(trainer, plan, state.loss_scale)
        base = None
        if checkpoint.list_names("evaluation"):
            self.eval_rows_base = checkpoint.read("evaluation/base").cpu().numpy()
            base = mean_loss(self.eval_rows_base)
        self._metrics.go_on_from(state.metrics, checkpoint.metrics, base)
        self._metrics.saved_step = state.step
        if self._stopping is not None and state.stopping is not None:
            best = {name: checkpoint.read(f"best/{name}").cpu() for name in checkpoint.list_names("best")}
            self._stopping.go_on_from(state.stopping, best)
        return self._restore_random(checkpoint)

    def say_how_exact(self, state: TrainingState) -> None:
        """Log whether the run goes on as it would have, and what is different else."""
        if self._rank > 0:
            return
        differences = state.setup.list_differences(self._setup)
        if not can_be_saved(self._plan):
            differences.append(f"{self._plan.optimizer} under {self._plan.engine}")
        if not differences:
            logger.info("going on from step %d of %d", state.step, self._plan.steps)
            return
        others = "sums are rounded otherwise"
        others += "" if state.setup.draws_as(self._setup) else ", dropout draws other random numbers"
        others += "" if self._takes_optimizer(state) else ", the optimizer's averages start anew"
        logger.warning(
            "going on from step %d of %d with the rows that come next, but not to the last bit as that run would have "
            "(%s): %s",
            state.step,
            self._plan.steps,
            "; ".join(differences),
            others,
        )

    def _gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        trained = find_trained(self._model)
        for name, weight in trained.items():
            yield f"weight/{name}", gather_one(name, weight, self._plan.engine)
        for name, key, state in gather_states(self._trainer, trained, self._plan):
            yield f"optimizer/{name}/{key}", state
        if self._stopping is not None:
            yield from ((f"best/{name}", best) for name, best in self._stopping.best_weights.items())
        if self.eval_rows_base is not None:
            yield "evaluation/base", torch.from_numpy(self.eval_rows_base)
        for kind, content in read_random_state(self._plan.device).items():
            for rank, of_rank in enumerate(gather_bytes(content, self._plan)):
                yield f"random/{rank}/{kind}", of_rank

    def _read_state(self, step: int) -> TrainingState:
        schedule = self._trainer.lr_scheduler
        return TrainingState(
            step=step,
            global_batch_size=self._plan.global_batch_size,
            seed=self._plan.seed,
            setup=self._setup,
            schedule_steps=schedule.last_epoch,
            learning_rate=schedule.get_last_lr()[0],  # the same for all that is trained
            loss_scale=read_loss_scale(self._trainer, self._plan),
            metrics=self._metrics.read_state(),
            stopping=None if self._stopping is None else self._stopping.read_state(),
        )

    def _check_same_run(self, checkpoint: CheckpointReader) -> None:
        """Raise InternalError for a checkpoint of another run: the job should never have handed it over."""
        state, plan = checkpoint.state, self._plan
        trained = sorted(find_trained(self._model))
        if (state.global_batch_size, state.seed) != (plan.global_batch_size, plan.seed) or state.step >= plan.steps:
            raise InternalError(
                f"the checkpoint is of another run: step {state.step}, global batch {state.global_batch_size}, seed "
                f"{state.seed}; the plan has {plan.steps} steps, {plan.global_batch_size}, {plan.seed}"
            )
        if checkpoint.list_names("weight") != trained:
            raise InternalError("the checkpoint is of another run: other weights are trained in it")

    def _takes_optimizer(self, state: TrainingState) -> bool:
        return state.setup.optimizer == self._plan.optimizer and can_be_saved(self._plan)

    def _restore_optimizer(self, checkpoint: CheckpointReader) -> None:
        if not self._takes_optimizer(checkpoint.state):
            return
        keys: dict[str, list[str]] = {}
        for name in checkpoint.list_names("optimizer"):
            parameter, key = name.rsplit("/", 1)
            keys.setdefault(parameter, []).append(key)
        restore_states(
            self._trainer,
            find_trained(self._model),
            self._plan,
            keys,
            lambda name, key: checkpoint.read(f"optimizer/{name}/{key}"),
        )

    def _restore_random(self, checkpoint: CheckpointReader) -> Callable[[], None]:
        state, plan, rank = checkpoint.state, self._plan, self._rank
        if not state.setup.draws_as(self._setup):
            return lambda: seed_anew(plan.seed, state.step, rank)
        states = {name: checkpoint.read(f"random/{name}").cpu() for name in checkpoint.list_names("random")}
        mine = {name.split("/")[1]: one for name, one in states.items() if name.startswith(f"{rank}/")}
        return lambda: restore_random_state(mine)
