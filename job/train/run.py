"""What a worker does, top to bottom: model loaded, promises checked, checkpoint restored or base model evaluated,
trained, saved, evaluated again."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import nn

from job.errors import InternalError, PreemptedError
from job.handover import RunFolder, SampleInputs, WorkerInputs, write_whole
from job.log import logger
from job.phases import enter_phase, phase
from job.plan import TrainPlan
from job.train.acceptance_rows import measure_rows
from job.train.adapter import save_adapter
from job.train.beats import Beats
from job.train.checkpoint import Checkpoints
from job.train.checkpoint_files import open_checkpoint
from job.train.chunked_loss import MarkSupervised, check_loss_can_be_chunked, chunk_loss
from job.train.collective import find_maximum
from job.train.dataset import Collate, PadRows, TokenRows
from job.train.early_stopping import EarlyStopping
from job.train.engine import (
    callable_model,
    check_prepared,
    check_promises,
    leave_hangs_to_the_job,
    prepare_engine,
    settle_gradient_buckets,
)
from job.train.evaluate import evaluate_rows, mean_loss
from job.train.final_evaluation import FinalEvaluation
from job.train.gather import gather_trained, replace_trained
from job.train.heartbeat import Pulse
from job.train.liger import check_liger_serves
from job.train.metrics import StepMetrics
from job.train.model import check_logits_are_finite, check_rows_stay_apart, load_model
from job.train.out_of_memory import no_smaller_step_helps
from job.train.peak_memory import compare_with_estimate, measure_peak
from job.train.samples import Answerer
from job.train.stepping import StepControl
from job.train.trackers import Trackers
from job.train.trainer import StreamTrainer, keep_activations_of_last_layers, training_arguments
from job.train.varlen import JoinRows


def train(
    plan: TrainPlan,
    inputs: WorkerInputs,
    folder: RunFolder,
    *,
    rank: int,
    remember_step: Callable[[int], None],
    pulse: Pulse,
    trackers: Trackers | None = None,
) -> None:
    """Train as planned, from the checkpoint in the folder if there is one, and on rank 0 write adapter and result.

    `trackers` are told what is logged. Raises JobError for what went wrong in a way that was foreseen; PreemptedError
    when it was told to stop, and has saved a checkpoint.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    say = logger.info if rank == 0 else logger.debug
    _check_devices(plan)
    train_rows = TokenRows(inputs.train_tokens, np.load(folder.train_rows))
    eval_rows = TokenRows(inputs.eval_tokens or inputs.train_tokens, np.load(folder.eval_rows))

    trackers = trackers or Trackers(plan, [])
    metrics = StepMetrics(plan, folder, rank=rank, rows=train_rows, inputs=inputs, track=trackers.log)
    collate = _collation(plan, inputs)

    enter_phase("loading the model")
    say("loading the base model")
    prepare_engine(plan)
    arguments = training_arguments(plan, folder.root / "scratch", run_name=inputs.run_id)  # starts the process group
    checkpoint = open_checkpoint(folder.resume, plan, rank=rank)
    with no_smaller_step_helps():  # the Trainer moves the model to its device
        model = _load(plan, inputs)
        trainer = StreamTrainer(
            plan,
            start_step=0 if checkpoint is None else checkpoint.state.step,
            note_wait=metrics.note_wait,
            model=model,
            args=arguments,
            train_dataset=train_rows,
            data_collator=collate,
            callbacks=[Beats(pulse), trackers],
        )
    trainer.remove_callback(transformers.PrinterCallback)
    check_promises(plan, trainer)
    trainable, total = model.get_nb_trainable_parameters()
    result: dict[str, Any] = {"trainable_parameters": trainable, "total_parameters": total}

    def evaluate(one_by_one: bool = False, beat: Callable[[], None] = pulse.beat) -> np.ndarray:
        wrapped = callable_model(plan, trainer)
        with phase("evaluating"):
            return evaluate_rows(wrapped, eval_rows, plan, collate, rank=rank, one_by_one=one_by_one, beat=beat)

    gather = partial(gather_trained, model, plan.engine)
    stopping = _early_stopping(plan, lambda: mean_loss(evaluate()), gather, metrics)
    checkpoints = Checkpoints(plan, folder, model, trainer, metrics, stopping, rank=rank)
    control = StepControl(
        plan, folder, metrics, stopping, rank=rank, remember_step=remember_step, save=checkpoints.save
    )

    def look_first() -> None:
        enter_phase("proofs")
        leave_hangs_to_the_job()
        pulse.beat()
        check_prepared(plan, trainer.model_wrapped)
        keep_activations_of_last_layers(model, plan.gradient_checkpointing)
        if checkpoint is not None:
            trainer.count_from_start_step()
            settle_gradient_buckets(plan, trainer, collate([train_rows[0]]))
            control.before_first_step = checkpoints.restore(checkpoint)
        _prove(plan, callable_model(plan, trainer), train_rows)
        pulse.beat()
        if checkpoint is not None:
            checkpoints.say_how_exact(checkpoint.state)
        elif plan.eval_rows:
            # A fresh adapter adds nothing, so this is the base model's.
            checkpoints.eval_rows_base = evaluate()
            metrics.announce_base(mean_loss(checkpoints.eval_rows_base))
        say("training")
        metrics.start_clock()

    trainer.add_callback(control)
    trainer.add_callback(_OnBegin(look_first))
    steps = trainer.train().global_step
    if control.stopped:
        raise PreemptedError(f"stopped after step {steps} of {plan.steps}")
    result |= metrics.summarize(steps) | measure_peak(plan)
    metrics.check_not_exploded()
    is_early = control.finished_by is not None or (stopping is not None and stopping.stopped_early)
    if steps != plan.steps and not is_early:
        raise InternalError(f"training ended after {steps} of {plan.steps} steps")

    if stopping is not None:
        result |= {"best_step": stopping.best_step, "stopped_early": stopping.stopped_early}
    if control.finished_by is not None:
        result["stopped_by"] = control.finished_by
    if checkpoints.eval_rows_base is not None and np.isfinite(checkpoints.eval_rows_base).all():
        result["eval_loss_base"] = mean_loss(checkpoints.eval_rows_base)
        result |= {} if stopping is None else {"eval_loss": stopping.best_loss}
    enter_phase("saving")
    weights = gather() if stopping is None else stopping.best_weights
    pulse.beat()
    save_adapter(model, weights, folder.adapter, rank=rank)
    if rank == 0:
        compare_with_estimate(plan, int(result["peak_memory_bytes"]))
        write_whole(folder.result, json.dumps(result, allow_nan=False))
    _say_trained(plan, folder, rank)
    enter_phase("evaluating")

    # From here on the adapter is published whatever happens to the workers, unless it turns out to be worth nothing.
    if stopping is not None:
        replace_trained(model, weights, plan.engine)
    announce = partial(metrics.announce_result, steps if stopping is None else stopping.best_step)
    trained = callable_model(plan, trainer)
    final = FinalEvaluation(plan, folder, rank=rank, pulse=pulse, announce=announce)
    final.measure_rows(lambda: measure_rows(trained, plan, inputs, folder, collate, rank=rank, beat=final.beat))
    if checkpoints.eval_rows_base is not None:
        final.compare(checkpoints.eval_rows_base, eval_rows, inputs.eval_names, partial(evaluate, beat=final.beat))
    if folder.samples.exists():
        enter_phase("samples")
        samples = SampleInputs.model_validate_json(folder.samples.read_bytes())
        base, pad = model.get_base_model(), inputs.pad_token_id
        answerer = Answerer(trained, base, pad, plan, rank=rank, beat=final.beat)
        final.ask(samples, model, answerer)


def _collation(plan: TrainPlan, inputs: WorkerInputs) -> Collate:
    collate = JoinRows(plan.attn_implementation) if plan.packing else PadRows(inputs.pad_token_id)
    return MarkSupervised(collate) if plan.loss == "chunked" else collate


def _say_trained(plan: TrainPlan, folder: RunFolder, rank: int) -> None:
    find_maximum([0], plan)  # rank 0 has written all
    if rank % plan.processes == 0:
        folder.trained.touch()


def _load(plan: TrainPlan, inputs: WorkerInputs) -> PeftModel:
    """Return the model with its adapter, and the loss as planned."""
    model = load_model(plan, inputs.model_folder, vocabulary_size=inputs.vocabulary_size, new_tokens=inputs.new_tokens)
    if plan.loss == "chunked":
        chunk_loss(model, same_on_all_processes=plan.engine == "zero3")
    elif plan.loss == "liger":
        check_liger_serves(model)
    return model


class _OnBegin(transformers.TrainerCallback):  # type: ignore[misc]
    """Acts once the engine has prepared the model, before the first step: an engine that splits weights splits them
    only then, and nothing may run the bare model afterwards."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Act."""
        self._act()


def _prove(plan: TrainPlan, model: nn.Module, rows: TokenRows) -> None:
    check_logits_are_finite(model, plan, rows[0])
    if plan.packing:
        check_rows_stay_apart(model, plan, rows[0], rows[-1])
    if plan.loss == "chunked":
        check_loss_can_be_chunked(model, plan, rows[0])


def _early_stopping(
    plan: TrainPlan, evaluate: Callable[[], float], gather: Callable[[], dict[str, torch.Tensor]], metrics: StepMetrics
) -> EarlyStopping | None:
    if plan.early_stopping_patience is None or plan.eval_interval_steps is None:
        return None
    return EarlyStopping(
        steps=plan.steps,
        interval_steps=plan.eval_interval_steps,
        patience=plan.early_stopping_patience,
        evaluate=evaluate,
        gather=gather,
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
