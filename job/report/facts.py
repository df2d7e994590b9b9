"""What a run cost, and how its adapter is served: the facts that the page, the card and the text at the end share."""

from typing import NamedTuple

from job.log import format_bytes
from job.record import RunRecord
from job.report.numbers import as_number, format_duration


class Fact(NamedTuple):
    """A name and what there is to say under it."""

    name: str
    value: str


def list_costs(record: RunRecord) -> list[Fact]:
    """Return what the training took: time, devices, tokens and memory, as far as they were measured."""
    return [
        fact
        for fact in (
            _time(record),
            Fact("Ran on", describe_devices(record)),
            _tokens(record),
            _speed(record),
            _memory(record),
        )
        if fact is not None
    ]


def describe_devices(record: RunRecord) -> str:
    """Name the processors that trained: `8 x NVIDIA H100 80GB HBM3 on 2 nodes`."""
    plan, hardware = record.plan, record.hardware
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    if plan.device == "cuda":
        return f"{plan.world_size} x {hardware.gpus[0].name if hardware.gpus else 'GPU'}{nodes}"
    processes = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''}{nodes}"
    threads = f"{plan.threads_per_process} thread{'s' if plan.threads_per_process > 1 else ''}"
    cpu = "CPU" if hardware.cpu_name == "unknown" else hardware.cpu_name
    return f"{cpu}, {processes} of {threads}"


def estimated_peak_bytes(record: RunRecord) -> int:
    """Return the plan's estimate of what `peak_memory_bytes` measures: on a GPU, what PyTorch's tensors take."""
    memory = record.plan.memory
    return memory.total_bytes - (memory.overhead_bytes if record.plan.device == "cuda" else 0)


def describe_acceptance(record: RunRecord) -> str:
    """Say whether the published adapter was loaded back, and what came of it."""
    if record.acceptance is None:
        return "The published files were not loaded back."
    text = record.acceptance.describe()
    return f"{text[0].upper()}{text[1:]}."


def describe_serving(record: RunRecord) -> str:
    """Say which engines take the adapter, in a sentence."""
    taking = [verdict.engine for verdict in record.engines if verdict.takes]
    refusing = [verdict.engine for verdict in record.engines if verdict.takes is False]
    if not record.engines:
        return "Which engines take it was not looked at."
    if not taking:
        return f"No engine that was looked at takes it: {', '.join(refusing)}." if refusing else "Not known."
    return f"Yes, by {_join(taking)}{f'; not by {_join(refusing)}' if refusing else ''}."


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _time(record: RunRecord) -> Fact | None:
    seconds = as_number(record.metrics.get("train_seconds"))
    if seconds is None:
        return None
    plan = record.plan
    devices = plan.world_size * (1 if plan.device == "cuda" else plan.threads_per_process)
    hours = devices * seconds / 3600
    unit = "GPU hours" if plan.device == "cuda" else "core hours"
    return Fact("Training time", f"{format_duration(seconds)}, {hours:,.3g} {unit}")


def _tokens(record: RunRecord) -> Fact | None:
    tokens = as_number(record.metrics.get("tokens"))
    if tokens is None:
        return None
    steps = as_number(record.metrics.get("steps"))
    return Fact("Learned from", f"{tokens:,.0f} tokens" + ("" if steps is None else f" in {steps:,.0f} steps"))


def _speed(record: RunRecord) -> Fact | None:
    speed = as_number(record.metrics.get("tokens_per_second"))
    return None if speed is None else Fact("Speed", f"{speed:,.0f} tokens/s")


def _memory(record: RunRecord) -> Fact | None:
    peak = as_number(record.metrics.get("peak_memory_bytes"))
    if peak is None or peak <= 0:
        return None
    estimate = estimated_peak_bytes(record)
    return Fact(
        "Peak memory",
        f"{format_bytes(peak)} a process; {format_bytes(estimate)} estimated",
    )
