"""The run's state for Prometheus, where SFT_RUNTIME__METRICS_PORT asks for it.

Each scrape reads what the run writes down anyway, so that training never waits for anyone who watches.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from job import __version__
from job.errors import ConfigError
from job.handover import RunFolder
from job.log import logger
from job.outcome import Progress

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# From a line of metrics.jsonl: name there -> name and help here. https://prometheus.io/docs/practices/naming/
_OF_A_STEP = {
    "step": ("sft_job_step", "Optimizer step that was logged last"),
    "epoch": ("sft_job_epoch", "Passes over the training rows until that step"),
    "loss": ("sft_job_loss", "Training loss: mean over the steps since the one that was logged before"),
    "grad_norm": ("sft_job_grad_norm", "L2 norm of the gradient before clipping"),
    "learning_rate": ("sft_job_learning_rate", "Learning rate of that step"),
    "elapsed_s": ("sft_job_train_seconds", "Time from the first step to that one, without interruptions"),
    "tokens_per_second": ("sft_job_tokens_per_second", "Throughput since the step that was logged before"),
    "step_s": ("sft_job_step_seconds", "Time of a step: mean since the one that was logged before"),
    "data_wait_s": ("sft_job_data_wait_seconds", "Part of it in which the first worker waited for rows"),
    "memory_bytes": (
        "sft_job_peak_memory_bytes",
        "Most memory of the first worker so far: PyTorch's tensors on a GPU, else resident",
    ),
    "eval_loss": ("sft_job_eval_loss", "Loss on the held-out rows, at the last evaluation"),
}


@contextmanager
def serve_metrics(port: int | None, progress: Progress, folder: RunFolder) -> Iterator[None]:
    """Answer GET /metrics on all interfaces while the block runs; without a port, do nothing.

    Raises ConfigError when the port can't be had.
    """
    if port is None:
        yield
        return
    from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(PROCESS_COLLECTOR)
    registry.register(GC_COLLECTOR)
    registry.register(_RunCollector(progress, folder))
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"SFT_RUNTIME__METRICS_PORT={port}: {error.strerror}", hint="choose a port that nothing listens at"
        ) from error
    logger.info("metrics for Prometheus are at port %d, /metrics", port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RunCollector:
    """Reads the metrics of a run at each scrape."""

    def __init__(self, progress: Progress, folder: RunFolder) -> None:
        self._progress = progress
        self._folder = folder

    def describe(self) -> list["Metric"]:
        """Return nothing, so that nothing is read before the first scrape."""
        return []

    def collect(self) -> Iterator["Metric"]:
        """Return what is known by now."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        progress = self._progress
        about = {"version": __version__, "run_id": progress.run_id or "", "output": progress.output or ""}
        yield InfoMetricFamily("sft_job", "Which run this is", value=about)
        phase = GaugeMetricFamily("sft_job_phase", "What the run is at: 1 for the phase it is in", labels=["phase"])
        phase.add_metric([progress.phase], 1)
        yield phase
        if progress.total_steps is None:  # what an earlier run has left in the folder is still there
            return
        yield GaugeMetricFamily("sft_job_planned_steps", "Optimizer steps of the plan", progress.total_steps)
        yield from self._collect_training(progress.total_steps)
        if progress.checkpoint_step is not None and progress.checkpoint_s is not None:
            yield GaugeMetricFamily(
                "sft_job_checkpoint_step", "Step of the newest checkpoint in the store", progress.checkpoint_step
            )
            yield GaugeMetricFamily(
                "sft_job_checkpoint_age_seconds", "Time since it came there", time.time() - progress.checkpoint_s
            )

    def _collect_training(self, total_steps: int) -> Iterator["Metric"]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        newest = {name: value for line in self._folder.read_metrics() for name, value in line.items()}
        with suppress(FileNotFoundError):  # no row is held out, or training has not begun
            loss = json.loads(self._folder.eval_loss_base.read_bytes())
            yield GaugeMetricFamily("sft_job_eval_loss_base", "The same of the base model, before training", loss)
        with suppress(FileNotFoundError):  # training goes on
            result = self._folder.read_result()
            newest |= {name: result[name] for name in result.keys() & {"eval_loss"}}
        for name, (metric, about_it) in _OF_A_STEP.items():
            if name in newest:
                yield GaugeMetricFamily(metric, about_it, float(newest[name]))
        if "tokens" in newest:
            left_s = float(newest["elapsed_s"]) * (total_steps / newest["step"] - 1)
            yield CounterMetricFamily("sft_job_tokens", "Tokens learned from, without padding", float(newest["tokens"]))
            yield GaugeMetricFamily("sft_job_eta_seconds", "Time left to the last step, by the mean so far", left_s)
