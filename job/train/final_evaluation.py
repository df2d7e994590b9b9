"""What is measured once the adapter is safe: the held-out loss, row by row, and answers before and after.

Nothing here may cost the run its result. Out of memory leads to one row at a time and then to no figures, a wish to
stop to no more of them, and what is missing is said.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer

from job.errors import DivergedError, InternalError
from job.evaluation import Evaluation, LossChange, RowLoss, Sample, compare_losses
from job.handover import RunFolder, SampleInputs, StopRequest, write_whole
from job.log import logger
from job.plan import TrainPlan
from job.train.collective import find_maximum
from job.train.dataset import TokenRows
from job.train.evaluate import mean_loss
from job.train.heartbeat import Pulse
from job.train.out_of_memory import describe_shortage
from job.train.samples import Answerer

_SAMPLES_AT_ONCE = 8
_ANSWERS_S = 120.0  # before, and after

T = TypeVar("T")


class _StoppedError(Exception):
    """Somebody wants the run to end. Raised on all processes alike."""


class _ShortageError(Exception):
    """Memory ran out, on any process. Raised on all alike."""


class FinalEvaluation:
    """Collects what is measured, and writes it down on rank 0. Everything here is collective.

    `announce` says on rank 0 what the held-out loss was and is.
    """

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        *,
        rank: int,
        pulse: Pulse,
        announce: Callable[[float, float], None],
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._rank = rank
        self._pulse = pulse
        self._announce = announce
        self._found = Evaluation()
        self._write()

    def beat(self) -> None:
        """Give a sign of life after a piece of work, and learn on all processes alike whether to go on."""
        self._pulse.beat()
        self._agree(None)

    def measure_rows(self, measure: Callable[[], None]) -> None:
        """Have the rows measured that a fresh process must find again, one at a time; `measure` calls `beat`."""
        self._attempt("the loss on single rows", lambda _: measure(), ways=(True,))

    def compare(
        self, base: np.ndarray, rows: TokenRows, names: list[str], evaluate: Callable[[bool], np.ndarray]
    ) -> None:
        """Compare the losses of the base model (N, 2) with those of the adapter, which `evaluate` returns, given
        whether to take the rows one by one; it calls `beat` after each micro batch. The result gets the figures, too.

        Raises DivergedError when the adapter's loss is no number.
        """
        trained = self._attempt("the held-out loss", evaluate)
        if trained is None:
            return
        if not np.isfinite(mean_loss(trained)):
            raise DivergedError(
                f"the held-out loss of the adapter is {mean_loss(trained)}",
                hint=f"its numbers are beyond SFT_MODEL__DTYPE={self._plan.dtype}: lower SFT_TRAIN__LEARNING_RATE",
            )
        if not np.isfinite(base).all():
            self._note("the held-out loss of the base model is no number, so nothing can be compared with it")
            return
        _, lines = rows.sources(names)
        pairs = zip(lines, rows.add_up(base), rows.add_up(trained), strict=True)
        losses = [
            RowLoss(line=line, supervised_tokens=int(tokens), loss_base=before / tokens, loss=after / tokens)
            for line, (before, tokens), (after, _) in pairs
        ]
        change = compare_losses(losses)
        self._found = self._found.model_copy(update={"loss": change, "rows": losses})
        self._write()
        if self._rank == 0:
            result = self._folder.read_result() | _name_figures(change)
            write_whole(self._folder.result, json.dumps(result, allow_nan=False))
            self._announce(change.loss_base, change.loss)
            logger.info("%s", change.describe())
            if (doubt := change.doubt()) is not None:
                logger.warning("%s", doubt)

    def ask(self, samples: SampleInputs, model: PeftModel, answerer: Answerer) -> None:
        """Have the base model within `model`, and then the adapter, answer the prompts; `answerer` calls `beat`."""
        tokenizer, started_s = Tokenizer.from_file(str(self._folder.tokenizer)), time.monotonic()

        def answer() -> list[str | None]:
            until_s = time.monotonic() + _ANSWERS_S
            found = self._attempt(
                "the answers to prompts",
                lambda one_by_one: answerer.answer(
                    samples, batch_size=1 if one_by_one else _SAMPLES_AT_ONCE, until_s=until_s
                ),
            )
            if time.monotonic() >= until_s:
                self._note(f"answering took longer than {_ANSWERS_S:.0f} s: some answers are cut off, or missing")
            return [None if ids is None else tokenizer.decode(ids).strip() for ids in found or none]

        none = [None for _ in samples.prompts]
        with model.disable_adapter():
            before = answer()
        answers = zip(samples.prompts, before, answer(), strict=True)
        found = [
            Sample(messages=prompt.messages, prompt=prompt.text, reference=prompt.reference, before=first, after=second)
            for prompt, first, second in answers
        ]
        self._found = self._found.model_copy(update={"samples": found})
        self._write()
        if self._rank == 0:
            answered, spent_s = sum(sample.after is not None for sample in found), time.monotonic() - started_s
            logger.info("%d of %d prompts answered before and after, in %.0f s", answered, len(found), spent_s)

    def _attempt(self, what: str, measure: Callable[[bool], T], ways: Sequence[bool] = (False, True)) -> T | None:
        """Return what can be measured in one of the ways, with several sequences at a time or one by one, or None."""
        try:
            self._agree(None)
            for one_by_one in ways:
                try:
                    return self._measure(measure, one_by_one)
                except _ShortageError:
                    if self._rank == 0 and not one_by_one:
                        logger.warning("out of memory while computing %s: one at a time", what)
            self._note(f"{what}: out of memory, even for one at a time")
        except _StoppedError:
            self._note(f"{what}: the run was told to stop before it was known")
        return None

    def _measure(self, measure: Callable[[bool], T], one_by_one: bool) -> T:
        shortage = None
        try:
            return measure(one_by_one)
        except (RuntimeError, MemoryError, OSError) as error:
            shortage = describe_shortage(error)
            # Where the weights are split, other processes wait within the model: this one has to fail, and with it all.
            if shortage is None or self._plan.engine in ("zero3", "fsdp2"):
                raise
        # Only here, without the error, is what it held on to free.
        logger.warning("%s", shortage)
        gc.collect()
        if self._plan.device == "cuda":
            torch.cuda.empty_cache()
        self._agree(shortage)
        raise InternalError("no process has run out of memory")

    def _agree(self, shortage: str | None) -> None:
        path = self._folder.stop_request
        # A wish to finish was granted by the end of training.
        stops = path.exists() and not StopRequest.model_validate_json(path.read_bytes()).finish
        stopped, is_short = find_maximum([int(stops), int(shortage is not None)], self._plan)
        if stopped:
            raise _StoppedError
        if is_short:
            raise _ShortageError

    def _note(self, problem: str) -> None:
        if self._rank == 0 and problem not in self._found.problems:
            logger.warning("%s", problem)
        problems = dict.fromkeys([*self._found.problems, problem])
        self._found = self._found.model_copy(update={"problems": list(problems)})
        self._write()

    def _write(self) -> None:
        if self._rank == 0:
            write_whole(self._folder.evaluation, self._found.model_dump_json(indent=1) + "\n")


def _name_figures(change: LossChange) -> dict[str, float]:
    """Return what the run's metrics say of the held-out loss."""
    return {
        "eval_loss_base": change.loss_base,
        "eval_loss": change.loss,
        "perplexity_base": change.perplexity_base,
        "perplexity": change.perplexity,
        "eval_loss_change_low": change.change_low,
        "eval_loss_change_high": change.change_high,
    }
