"""The model card, README.md in the slot: what the adapter is, how it was trained, how good it is, how to use it."""

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from job.accept import name_base_model
from job.plan import TrainPlan
from job.record import RunRecord
from job.report.facts import describe_acceptance, describe_serving, list_costs
from job.report.numbers import as_number, format_perplexity
from job.report.verdict import judge_learning

_HELD = {
    "none": "as it is",
    "nf4": "in 4 bits (NF4, double quantisation)",
    "int8": "in 8 bits (LLM.int8)",
    "fp8": "in FP8",
}
_DATASETS = "hf://datasets/"
_MERGED_USE = """
The whole model, with the adapter merged into it, is in `merged/`, and needs no PEFT:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder/merged")
model = AutoModelForCausalLM.from_pretrained("this-folder/merged")
```
"""


def format_model_card(record: RunRecord) -> str:
    """Return the adapter's README.md, with the front matter that the Hub reads."""
    plan = record.plan
    base, _ = name_base_model(plan.model_id, plan.model_revision)
    return f"""{chr(10).join(_front_matter(record))}

# LoRA adapter for {base}

Trained by sft-job {record.job_version}, run `{record.run_id}`, on revision `{plan.model_revision}` of the base model.

{judge_learning(record).sentence}

| | |
|---|---|
{_table(_results(record))}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
base = AutoModelForCausalLM.from_pretrained("{base}")  # or the folder that holds it
{_resize(plan)}model = PeftModel.from_pretrained(base, "this-folder")
```
{_MERGED_USE if "merged_logits_difference" in record.metrics else ""}
Serving engines that take it: {describe_serving(record)[0].lower()}{describe_serving(record)[1:]}
{_serve(record)}
## Training

| | |
|---|---|
{_table(_training(record))}

| data | rows | sha256 |
|---|---|---|
{chr(10).join(f"| {_cell(file.uri)} | {file.rows:,} | `{file.sha256}` |" for file in record.data)}

`report.html` shows the curves, samples and the whole plan; every value is in `plan.json`, every step in
`metrics.jsonl`, and the files' sha256 are in `manifest.json`.
"""


def _front_matter(record: RunRecord) -> Iterator[str]:
    yield "---"
    if record.hub_revision is not None:
        yield f"base_model: {name_base_model(record.plan.model_id, record.plan.model_revision)[0]}"
    yield "library_name: peft"
    if license_name := record.settings["output"].get("license"):
        yield f"license: {json.dumps(license_name)}"  # a JSON string is a YAML string
    if datasets := sorted(set(_find_datasets(record))):
        yield f"datasets: {json.dumps(datasets)}"
    yield "pipeline_tag: text-generation"
    yield "tags: [lora, sft, sft-job]"
    yield "---"


def _find_datasets(record: RunRecord) -> Iterator[str]:
    for file in record.data:
        if file.uri.startswith(_DATASETS):
            name = PurePosixPath(file.uri.removeprefix(_DATASETS)).parts[:2]
            yield "/".join(name).split("@")[0]


def _results(record: RunRecord) -> Iterator[tuple[str, str]]:
    metrics = record.metrics
    for name, label in (
        ("eval_loss_base", "held-out loss of the base model"),
        ("eval_loss", "held-out loss with this adapter"),
        ("eval_loss_merged", "held-out loss of the merged model"),
    ):
        loss = as_number(metrics.get(name))
        if loss is not None:
            yield label, f"{loss:.4f}"
    before, after = as_number(metrics.get("eval_loss_base")), as_number(metrics.get("eval_loss"))
    if before is not None and after is not None:
        yield "perplexity, before and after", f"{format_perplexity(before)}, {format_perplexity(after)}"
    yield "training loss", f"{metrics['train_loss']:.4f}"
    yield "published files", describe_acceptance(record)


def _training(record: RunRecord) -> Iterator[tuple[str, str]]:
    plan, metrics = record.plan, record.metrics
    yield "rows learned from", f"{plan.train_rows:,} ({plan.supervised_tokens:,} supervised tokens)"
    yield "steps", f"{plan.steps:,} of {plan.global_batch_size} sequences ({plan.epochs:g} epochs)"
    yield "learning rate", f"{plan.learning_rate:g}, {plan.scheduler}, {plan.warmup_steps} steps of warmup"
    yield "adapter", _describe_adapter(plan)
    yield "trained parameters", f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}"
    yield "base model while training", f"{_HELD[plan.quantization]}, arithmetic in {plan.dtype}"
    for name, value in list_costs(record):
        yield name.lower(), value


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _describe_adapter(plan: TrainPlan) -> str:
    kinds = ["rank-stabilised LoRA"] * plan.lora_rslora + ["DoRA"] * plan.lora_dora
    return ", ".join([f"r {plan.lora_r}, alpha {plan.lora_alpha}, dropout {plan.lora_dropout:g}", *kinds])


def _resize(plan: TrainPlan) -> str:
    if not plan.new_tokens:
        return ""
    # a model may have more rows than its tokenizer has tokens: those stay
    return f"""rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)
base.resize_token_embeddings(rows)  # the adapter has what belongs there: {", ".join(plan.new_tokens)}
"""


def _serve(record: RunRecord) -> str:
    return "" if record.serve_command is None else f"\n```sh\n{record.serve_command}\n```\n"
