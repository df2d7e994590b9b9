"""A beat of the worker's heart for each micro batch that is trained."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.train.heartbeat import Pulse


class Beats(TrainerCallback):  # type: ignore[misc]
    """Gives a beat at the end of each micro batch, with the number of the step that is to be finished next."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beat after a micro batch that doesn't complete its step."""
        self._beat(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beat after one that does."""
        self._beat(state)

    def _beat(self, state: TrainerState) -> None:
        self._pulse.beat(min(state.global_step + 1, state.max_steps))
