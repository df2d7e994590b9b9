"""report.html: one page that needs neither network nor scripts, from `page.html` beside this module.

What stands in rows, answers and names is other people's text: jinja2 escapes all of it, but for the charts, which hold
numbers of ours alone.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from job.data import XRay
from job.evaluation import Sample
from job.log import format_bytes
from job.record import RunRecord
from job.report.charts import Chart, draw_learning, draw_lengths, draw_rows, draw_speed
from job.report.columns import make_visible
from job.report.env_file import SHELL_LOADER, list_credentials, make_env_lines
from job.report.facts import Fact, describe_acceptance, describe_devices, describe_serving, list_costs
from job.report.numbers import as_number, format_duration, format_perplexity
from job.report.plan import PLAN_SECTIONS, write_value
from job.report.verdict import find_change, judge_learning
from job.report.xray import describe_xray

_TEMPLATE = "page.html"


@dataclass(frozen=True)
class HeldOut:
    """The held-out loss before and after as the page shows it."""

    before: str
    after: str
    change: str
    perplexity_before: str
    perplexity_after: str
    rows: str


def format_report(record: RunRecord) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template(_TEMPLATE).render(
        record=record,
        plan=record.plan,
        name=PurePosixPath(record.plan.model_id).name,
        verdict=judge_learning(record),
        created=record.created_at[:16].replace("T", " ") + " UTC",
        held_out=_describe_held_out(record),
        **_describe_course(record),
        samples=[] if record.evaluation is None else [_describe_sample(sample) for sample in record.evaluation.samples],
        costs=list_costs(record),
        **_describe_data(record),
        serving=describe_serving(record),
        acceptance=describe_acceptance(record),
        plan_sections=_describe_plan(record),
        memory=_describe_memory(record),
        duration=format_duration(sum(record.phases.values())),
        phases=_describe_phases(record),
        env_lines=make_env_lines(record),
        shell_loader=SHELL_LOADER,
        credentials=list_credentials(record),
        machine=_describe_machine(record),
        files=[(file.path, format_bytes(file.bytes), file.sha256) for file in record.files],
    )


def _finalize(value: Any) -> Any:
    """Make control characters visible in all that is filled in; markup is ours."""
    return make_visible(value) if type(value) is str else value


def _describe_held_out(record: RunRecord) -> HeldOut | None:
    before, after = (as_number(record.metrics.get(name)) for name in ("eval_loss_base", "eval_loss"))
    if before is None or after is None:
        return None
    change = find_change(record)
    interval = ""
    if change is not None:
        interval = f", 95 % interval {change.change_low:+.3f} to {change.change_high:+.3f}"
    rows = record.plan.eval_rows if change is None else change.rows
    return HeldOut(
        f"{before:.3f}",
        f"{after:.3f}",
        f"{after - before:+.3f}{interval or ', its interval was not measured'}",
        format_perplexity(before),
        format_perplexity(after),
        f"{rows:,} row{'s' * (rows != 1)}",
    )


def _describe_course(record: RunRecord) -> dict[str, Any]:
    row_chart = draw_rows(record)
    speed_charts = draw_speed(record)
    shown = {chart.title for chart in speed_charts}
    missing = [] if "Tokens a second" in shown else ["how fast it went"]
    missing += [] if any(title.startswith("Memory") for title in shown) else ["how much memory it took"]
    return {
        "learning_charts": [_allow_svg(chart) for chart in draw_learning(record)],
        "row_chart": None if row_chart is None else _allow_svg(row_chart),
        "speed_charts": [_allow_svg(chart) for chart in speed_charts],
        "not_by_step": " and ".join(missing),
    }


def _describe_data(record: RunRecord) -> dict[str, Any]:
    fields = {name: value for name, value in record.xray.items() if name != "warnings"}
    xray = TypeAdapter(XRay).validate_python(fields)
    subjects = describe_xray(xray)
    del subjects["Files"]  # which a table has, with their digests
    return {
        "xray": xray,
        "subjects": subjects,
        "supervised_percent": 100 * xray.supervised_tokens / max(1, xray.tokens),
        "length_chart": _allow_svg(draw_lengths(xray.lengths.histogram)),
    }


def _describe_sample(sample: Sample) -> dict[str, Any]:
    turns = [(str(turn.get("role", "")), turn.get("content")) for turn in sample.messages or []]
    if not turns or any(not isinstance(content, str) for _, content in turns):
        turns = [("prompt", sample.prompt)]
    return {"turns": turns, "answers": _pick_answers(sample)}


def _pick_answers(sample: Sample) -> list[tuple[str, str]]:
    found = (("Before", sample.before), ("After", sample.after), ("Reference", sample.reference))
    return [(label, text or "(nothing)") for label, text in found if text is not None]


def _describe_plan(record: RunRecord) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Return sections of rows: name, value, source, and kind of source ("given", "default" or "chosen")."""
    values, sources = record.plan.model_dump(), record.plan.sources
    return [
        (label, [(name, write_value(values[name]), sources[name], _kind_of(sources[name])) for name in names])
        for label, names in PLAN_SECTIONS.items()
    ]


def _kind_of(source: str) -> str:
    if source.startswith("SFT_"):
        return "given"
    return "default" if source.startswith("default") else "chosen"


def _describe_memory(record: RunRecord) -> list[tuple[str, str, float]]:
    """Return the parts of the estimate: name, size, and percentage of the whole."""
    memory = record.plan.memory
    total = max(1, memory.total_bytes)
    rows = [(name, format_bytes(size), 100 * size / total) for name, size in memory.parts().items()]
    return [*rows, ("total", f"{format_bytes(memory.total_bytes)} of {format_bytes(memory.available_bytes)}", 100.0)]


def _describe_phases(record: RunRecord) -> list[tuple[str, str, float]]:
    """Return the phases: name, seconds, and percentage of the whole."""
    total_s = sum(record.phases.values()) or 1.0
    return [(name, f"{seconds:.1f}", 100 * seconds / total_s) for name, seconds in record.phases.items()]


def _describe_machine(record: RunRecord) -> list[Fact]:
    hardware = record.hardware
    gpus = [f"{gpu.name}, {format_bytes(gpu.memory_bytes)}" for gpu in hardware.gpus]
    return [
        Fact("Trained on", describe_devices(record)),
        *(Fact(f"GPU {index}", text) for index, text in enumerate(gpus)),
        Fact("CPU", f"{hardware.cpu_name}, {hardware.cpu_cores} cores"),
        Fact("Host memory", format_bytes(hardware.memory_bytes)),
    ]


def _allow_svg(chart: Chart) -> dict[str, Any]:
    from markupsafe import Markup

    return {"title": chart.title, "keys": chart.keys, "svg": Markup(chart.svg)}  # noqa: S704 - made of numbers by us
