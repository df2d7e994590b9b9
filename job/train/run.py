"""What a worker does, top to bottom: promises checked, model loaded, evaluated, trained, evaluated again, saved."""

import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType
from peft import PeftModel

from job.errors import InternalError
from job.handover import RunFolder, WorkerInputs, write_whole
from job.log import logger
from job.plan import TrainPlan
from job.train.adapter import save_adapter
from job.train.dataset import PadRows, TokenRows, join_rows
from job.train.early_stopping import EarlyStopping
from job.train.model import check_logits_are_finite, check_rows_stay_apart, load_model
from job.train.trainer import StepMetrics, StreamTrainer, evaluate_loss, training_arguments


def train(
    plan: TrainPlan, inputs: WorkerInputs, folder: RunFolder, *, rank: int, remember_step: Callable[[int], None]
) -> None:
    """Train as planned and, on rank 0, write adapter and result into the folder.

    Raises JobError for what went wrong in a way that was foreseen.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    say = logger.info if rank == 0 else logger.debug
    _check_devices(plan)
    train_rows = TokenRows(inputs.train_tokens, np.load(folder.train_rows))
    eval_rows = TokenRows(inputs.eval_tokens or inputs.train_tokens, np.load(folder.eval_rows))

    say("loading the base model")
    arguments = training_arguments(plan, folder.root / "scratch")  # starts the process group
    transformers.set_seed(plan.seed)  # the adapter starts from random numbers; the Trainer would seed only afterwards
    model = load_model(plan, inputs.model_folder, vocabulary_size=inputs.vocabulary_size, new_tokens=inputs.new_tokens)
    metrics = StepMetrics(
        plan,
        folder.metrics,
        rank=rank,
        rows=train_rows,
        names=inputs.train_names,
        remember_step=remember_step,
    )
    collate = join_rows if plan.packing else PadRows(inputs.pad_token_id)
    evaluate = partial(evaluate_loss, model, eval_rows, plan, collate, rank=rank)
    stopping = _early_stopping(plan, model, evaluate, metrics)
    trainer = StreamTrainer(
        plan,
        model=model,
        args=arguments,
        train_dataset=train_rows,
        data_collator=collate,
        callbacks=[metrics] if stopping is None else [metrics, stopping],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    _check_promises(plan, trainer)
    check_logits_are_finite(model, plan, train_rows[0])
    if plan.packing:
        check_rows_stay_apart(model, train_rows[0], train_rows[-1])

    result: dict[str, float | int] = {}
    if plan.eval_rows:
        # A fresh adapter adds nothing, so this is the base model's.
        result["eval_loss_base"] = evaluate()
        say("held-out loss of the base model: %.4f", result["eval_loss_base"])
    say("training")
    started_s = time.monotonic()
    trained = trainer.train()
    elapsed_s = time.monotonic() - started_s
    metrics.check_not_exploded()
    result |= {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "tokens": metrics.tokens(trained.global_step),
        "tokens_per_second": round(metrics.tokens(trained.global_step) / elapsed_s, 1),
        "train_seconds": round(elapsed_s, 1),
    }
    if stopping is not None:
        stopping.restore_best()
        result |= {"best_step": stopping.best_step, "stopped_early": stopping.stopped_early}
    if plan.eval_rows:
        result["eval_loss"] = evaluate()
        say("held-out loss: %.4f before, %.4f after", result["eval_loss_base"], result["eval_loss"])
    if trained.global_step != plan.steps and not (stopping is not None and stopping.stopped_early):
        raise InternalError(f"training ended after {trained.global_step} of {plan.steps} steps")
    if rank == 0:
        save_adapter(model, folder.adapter)
        write_whole(folder.result, json.dumps(result, allow_nan=False))


def _early_stopping(
    plan: TrainPlan, model: PeftModel, evaluate: Callable[[], float], metrics: StepMetrics
) -> EarlyStopping | None:
    if plan.early_stopping_patience is None or plan.eval_interval_steps is None:
        return None
    return EarlyStopping(
        model,
        interval_steps=plan.eval_interval_steps,
        patience=plan.early_stopping_patience,
        evaluate=evaluate,
        record=metrics.record_evaluation,
    )


def _check_devices(plan: TrainPlan) -> None:
    found = torch.cuda.device_count()
    if plan.device == "cuda" and found != plan.processes:
        raise InternalError(
            f"the plan is for {plan.processes} GPUs, and PyTorch {torch.__version__} sees {found}",
            hint="the driver may be too old for this PyTorch, or this PyTorch is built without CUDA",
        )
    torch.set_num_threads(plan.threads_per_process)


def _check_promises(plan: TrainPlan, trainer: StreamTrainer) -> None:
    """Compare what accelerate set up with the plan: several ways to ask for more processes give one, without a word."""
    state = trainer.accelerator.state
    several = DistributedType.MULTI_GPU if plan.device == "cuda" else DistributedType.MULTI_CPU
    promised = (several if plan.processes > 1 else DistributedType.NO, plan.processes, plan.device)
    actual = (state.distributed_type, state.num_processes, state.device.type)
    if actual != promised:
        raise InternalError(f"the plan promised (type, processes, device) {promised}, the run has {actual}")
    if not trainer.model_accepts_loss_kwargs:
        logger.warning("this architecture averages the loss by micro batch, so long answers weigh less than planned")
