"""What a person looks at: the plan as a table, the model card, and the last lines of a run."""

from collections.abc import Mapping
from typing import Any

from job.plan import TrainPlan

_LABELS = {
    "Base model": ("model_id", "model_revision", "dtype", "attn_implementation"),
    "Adapter": ("lora_r", "lora_alpha", "lora_dropout", "target_modules"),
    "Data": ("train_rows", "eval_rows", "train_tokens", "supervised_tokens", "max_length_tokens", "packing"),
    "Parallel": ("device", "engine", "processes", "threads_per_process"),
    "Batch": ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    "Schedule": (
        "steps",
        "epochs",
        "warmup_steps",
        "learning_rate",
        "scheduler",
        "max_grad_norm",
        "gradient_checkpointing",
        "seed",
        "logging_steps",
    ),
}


def format_plan(plan: TrainPlan) -> str:
    """Return the plan as a table for people: name, value, where the value came from."""
    values = plan.model_dump()
    shown = {name: _shorten(values[name]) for names in _LABELS.values() for name in names}
    name_width = max(map(len, shown))
    value_width = max(map(len, shown.values()))
    lines = []
    for label, names in _LABELS.items():
        lines.append(label)
        lines += [f"  {name:<{name_width}}  {shown[name]:<{value_width}}  {plan.sources[name]}" for name in names]
    return "\n".join(lines)


def _shorten(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the run's result in one line."""
    parts = [f"train loss {metrics['train_loss']:.4f} over {metrics['steps']} steps"]
    if "eval_loss" in metrics:
        parts.append(f"held-out loss {metrics['eval_loss_base']:.4f} -> {metrics['eval_loss']:.4f}")
    parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def format_model_card(
    plan: TrainPlan, *, run_id: str, job_version: str, metrics: Mapping[str, Any], is_on_hub: bool
) -> str:
    """Return the adapter's README.md: what it is, how it was trained and how to use it."""
    front_matter = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [lora, sft, sft-job]"]
    if is_on_hub:
        front_matter.insert(1, f"base_model: {plan.model_id}")
    held_out = ""
    if "eval_loss" in metrics:
        held_out = (
            f"| held-out loss of the base model | {metrics['eval_loss_base']:.4f} |\n"
            f"| held-out loss with this adapter | {metrics['eval_loss']:.4f} |\n"
        )
    return f"""{chr(10).join([*front_matter, "---"])}

# LoRA adapter for {plan.model_id}

Trained by sft-job {job_version}, run `{run_id}`, on revision `{plan.model_revision}` of the base model.

| | |
|---|---|
| rows learned from | {plan.train_rows:,} ({plan.supervised_tokens:,} supervised tokens) |
| steps | {plan.steps:,} of {plan.global_batch_size} sequences ({plan.epochs:g} epochs) |
| learning rate | {plan.learning_rate:g}, {plan.scheduler}, {plan.warmup_steps} steps of warmup |
| adapter | r {plan.lora_r}, alpha {plan.lora_alpha}, dropout {plan.lora_dropout:g} |
| training loss | {metrics["train_loss"]:.4f} |
{held_out}
Every value is in `plan.json`, every step in `metrics.jsonl`, and the files' sha256 in `manifest.json`.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{plan.model_id}")  # or the folder that holds it
model = PeftModel.from_pretrained(base, "this-folder")
tokenizer = AutoTokenizer.from_pretrained("this-folder")
```
"""
