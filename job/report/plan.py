"""The plan as a table for people: every value with where it came from."""

import textwrap

from job.log import format_bytes
from job.memory.estimate import MemoryEstimate
from job.plan import TrainPlan

PLAN_SECTIONS = {
    "Base model": ("model_id", "model_revision", "dtype", "quantization", "attn_implementation", "chat_template"),
    "Adapter": (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_rslora",
        "lora_dora",
        "target_modules",
        "modules_to_save",
        "new_tokens",
    ),
    "Data": (
        "train_rows",
        "eval_rows",
        "train_tokens",
        "supervised_tokens",
        "max_length_tokens",
        "truncation",
        "packing",
    ),
    "Parallel": ("device", "engine", "offload", "nodes", "processes", "threads_per_process"),
    "Batch": ("micro_batch_size", "micro_batch_tokens", "gradient_accumulation_steps", "global_batch_size"),
    "Schedule": (
        "steps",
        "epochs",
        "warmup_steps",
        "learning_rate",
        "scheduler",
        "optimizer",
        "max_grad_norm",
        "gradient_checkpointing",
        "loss",
        "early_stopping_patience",
        "eval_interval_steps",
        "seed",
        "logging_steps",
    ),
    "Checkpoints": ("checkpoint_every_minutes", "checkpoint_every_steps"),
}
_NAME_WIDTH = max(len(name) for names in PLAN_SECTIONS.values() for name in names)
_MIN_WIDTH = 80  # columns; on a narrower screen, the lines run on
_VALUE_WIDTHS = (19, 40)  # columns, at least and at most: "the tokenizer's own" and a commit's hash are shown whole
_SOURCE_WIDTH = len("SFT_TRAIN__EARLY_STOPPING_PATIENCE")  # the longest; sources get that much before values get more


def format_plan(plan: TrainPlan, *, width: int = 120) -> str:
    """Return the plan as a table for people, `width` columns wide: name, value, where the value came from.

    A value that is too long is cut in its middle, a source goes on in the next line.
    """
    values = plan.model_dump()
    room = max(width, _MIN_WIDTH) - _NAME_WIDTH - 6  # two columns before each cell
    limit = min(max(room - _SOURCE_WIDTH, _VALUE_WIDTHS[0]), _VALUE_WIDTHS[1])
    shown = {name: _shorten(write_value(values[name]), limit) for names in PLAN_SECTIONS.values() for name in names}
    value_width = max(map(len, shown.values()))
    lines = []
    for label, names in PLAN_SECTIONS.items():
        lines.append(label)
        for name in names:
            first, *rest = _wrap(plan.sources[name], room - value_width)
            lines.append(f"  {name:<{_NAME_WIDTH}}  {shown[name]:<{value_width}}  {first}")
            lines += [f"{'':{_NAME_WIDTH + value_width + 6}}{line}" for line in rest]
    return "\n".join([*lines, *_format_memory(plan.memory, value_width)])


def _format_memory(memory: MemoryEstimate, value_width: int) -> list[str]:
    """Return the estimate as a section of the plan's table, with each part's share."""
    lines = ["Memory of each process, estimated"]
    if memory.is_partial:
        lines[0] += " in part: the architecture is not known, so only the weights are counted well"
    for name, size in memory.parts().items():
        lines.append(f"  {name:<{_NAME_WIDTH}}  {format_bytes(size):<{value_width}}  {size / memory.total_bytes:.0%}")
    total, room = format_bytes(memory.total_bytes), format_bytes(memory.available_bytes)
    return [*lines, f"  {'total':<{_NAME_WIDTH}}  {total:<{value_width}}  of {room}"]


def _wrap(text: str, width: int) -> list[str]:
    """Break a text between words only: a variable's name that is too long stays whole, to be copied and searched."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def write_value(value: object) -> str:
    """Write a value of the plan for people."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shorten(text: str, limit: int) -> str:
    """Cut a text's middle out: a path and a model's name differ at their ends."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    tail = limit - 3 - head
    return f"{text[:head]}...{text[-tail:]}"
