"""The run's state for Prometheus, where SFT_RUNTIME__METRICS_PORT asks for it.

Each scrape reads what the run writes down anyway, so that training never waits for anyone who watches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        progress = self._progress
        about = {"version": __version__, "run_id": progress.run_id or "", "output": progress.output or ""}
        yield InfoMetricFamily("sft_job", "Which run this is", value=about)
        phase = GaugeMetricFamily("sft_job_phase", "What the run is at: 1 for the phase it is in", labels=["phase"])
        phase.add_metric([progress.phase], 1)
        yield phase
        if progress.total_steps is None:  # what an earlier run has left in the folder is still there
            return
        yield GaugeMetricFamily("sft_job_planned_steps", "Optimizer steps of the plan", progress.total_steps)
        newest = {name: value for line in self._folder.read_metrics() for name, value in line.items()}
        for name, (metric, about_it) in _OF_A_STEP.items():
            if name in newest:
                yield GaugeMetricFamily(metric, about_it, float(newest[name]))
        if "tokens" in newest:
            yield CounterMetricFamily("sft_job_tokens", "Tokens learned from, without padding", float(newest["tokens"]))
