"""What a person looks at: the plan as a table, the model card, and the last lines of a run."""

import textwrap
from collections.abc import Mapping
from typing import Any

from job.log import format_bytes
from job.memory.estimate import MemoryEstimate
from job.plan import TrainPlan

_LABELS = {
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
    "Batch": ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"),
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
_HELD = {"none": "as it is", "nf4": "in 4 bits (NF4, double quantisation)", "int8": "in 8 bits (LLM.int8)"}
_NAME_WIDTH = max(len(name) for names in _LABELS.values() for name in names)
_MERGED_USE = """
The whole model, with the adapter merged into it, is in `merged/`, and needs no PEFT:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder/merged")
model = AutoModelForCausalLM.from_pretrained("this-folder/merged")
```
"""
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
    shown = {name: _shorten(_write(values[name]), limit) for names in _LABELS.values() for name in names}
    value_width = max(map(len, shown.values()))
    lines = []
    for label, names in _LABELS.items():
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


def _write(value: object) -> str:
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


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the run's result in one line."""
    parts = [f"train loss {metrics['train_loss']:.4f} over {metrics['steps']} steps"]
    if "eval_loss" in metrics:
        parts.append(f"held-out loss {metrics['eval_loss_base']:.4f} -> {metrics['eval_loss']:.4f}")
    parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def _describe_adapter(plan: TrainPlan) -> str:
    kinds = ["rank-stabilised LoRA"] * plan.lora_rslora + ["DoRA"] * plan.lora_dora
    return ", ".join([f"r {plan.lora_r}, alpha {plan.lora_alpha}, dropout {plan.lora_dropout:g}", *kinds])


def format_model_card(
    plan: TrainPlan,
    *,
    run_id: str,
    job_version: str,
    metrics: Mapping[str, Any],
    is_on_hub: bool,
    license_name: str | None = None,
) -> str:
    """Return the adapter's README.md: what it is, how it was trained and how to use it."""
    front_matter = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [lora, sft, sft-job]"]
    if is_on_hub:
        front_matter.insert(1, f"base_model: {plan.model_id}")
    if license_name is not None:
        front_matter.insert(1, f"license: {license_name}")
    resize = ""
    if plan.new_tokens:  # a model may have more rows than its tokenizer has tokens: those stay
        resize = f"""rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)
base.resize_token_embeddings(rows)  # the adapter has what belongs there: {", ".join(plan.new_tokens)}
"""
    held_out = ""
    if "eval_loss" in metrics:
        held_out = (
            f"| held-out loss of the base model | {metrics['eval_loss_base']:.4f} |\n"
            f"| held-out loss with this adapter | {metrics['eval_loss']:.4f} |\n"
        )
    if "eval_loss_merged" in metrics:
        held_out += f"| held-out loss of the merged model | {metrics['eval_loss_merged']:.4f} |\n"
    return f"""{chr(10).join([*front_matter, "---"])}

# LoRA adapter for {plan.model_id}

Trained by sft-job {job_version}, run `{run_id}`, on revision `{plan.model_revision}` of the base model.

| | |
|---|---|
| rows learned from | {plan.train_rows:,} ({plan.supervised_tokens:,} supervised tokens) |
| steps | {plan.steps:,} of {plan.global_batch_size} sequences ({plan.epochs:g} epochs) |
| learning rate | {plan.learning_rate:g}, {plan.scheduler}, {plan.warmup_steps} steps of warmup |
| adapter | {_describe_adapter(plan)} |
| trained parameters | {metrics["trainable_parameters"]:,} of {metrics["total_parameters"]:,} |
| base model while training | {_HELD[plan.quantization]}, arithmetic in {plan.dtype} |
| training loss | {metrics["train_loss"]:.4f} |
{held_out}
Every value is in `plan.json`, every step in `metrics.jsonl`, and the files' sha256 in `manifest.json`.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
base = AutoModelForCausalLM.from_pretrained("{plan.model_id}")  # or the folder that holds it
{resize}model = PeftModel.from_pretrained(base, "this-folder")
```
{_MERGED_USE if "merged_logits_difference" in metrics else ""}"""
