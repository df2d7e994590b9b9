"""The groups of settings, field by field: defaults, limits and descriptions, of which the README's table is made."""

from typing import Annotated, Literal

from pydantic import Field

from job.settings_fields import (
    Auto,
    CheckpointUri,
    Columns,
    Group,
    License,
    Modules,
    OutputUri,
    Prompts,
    Sources,
    TargetModules,
    Uri,
    Warmup,
    unit_of,
)


class ModelSettings(Group):
    """The base model."""

    id: Uri = Field(description="Base model: a Hub id, a folder, or an s3:// prefix")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a Hub model")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat template: the tokenizer's own; or chatml, gemma, llama3, mistral, phi, qwen; a .jinja file "
        "(path or s3://); or a model (Hub id, folder, s3:// prefix) whose tokenizer has one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of weights and arithmetic; auto: by the device"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="Attention kernel; auto: flash_attention_2 where package and GPU are fit for it; else varlen, "
        "PyTorch's own within each of the joined rows, where rows are joined; else sdpa",
    )


class DataSettings(Group):
    """What is learned from."""

    uri: Sources = Field(
        description="Training rows: s3://bucket/key, a prefix or a glob; hf://datasets/org/name; a path; or a list, "
        'such as ["s3://a/b", {"uri": "s3://c/d", "weight": 2}]: a weight of 2 gives each row twice a pass, '
        "of 0.5 half of the rows"
    )
    eval_uri: Uri | None = Field(None, description="Held-out rows, of the same forms; else they are split off")
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] | Auto = Field(
        "auto",
        description="Share of the rows held out; auto: a tenth from 50 rows on, at most 500 rows",
        json_schema_extra=unit_of("share of rows"),
    )
    columns: Columns = Field(
        {}, description='Columns to rename, as a JSON object: {"review": "text"}; it also settles which shape is meant'
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="Jinja template of a row's columns, such as Q: {{ q }} A: {% generation %}{{ a }}{% endgeneration "
        "%}; the loss is taken between the marks",
    )
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = Field(
        "auto",
        description="Longest sequence; auto: what 99 % of the rows need, rounded up to 64",
        json_schema_extra=unit_of("tokens"),
    )
    truncation: Literal["drop", "split", "keep_start"] = Field(
        "drop", description="Rows beyond max_length: left out, cut into several, or cut off"
    )
    max_dropped_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Refuse to train when more rows than this are too long to be used",
        json_schema_extra=unit_of("share of rows"),
    )
    bad_rows: Literal["fail", "skip"] = Field(
        "fail", description="Rows that can't be used: end the job, or set them aside in quarantine.jsonl"
    )
    max_bad_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="With bad_rows=skip, refuse to train when more rows than this are bad",
        json_schema_extra=unit_of("share of rows"),
    )
    loss_on: Literal["auto", "completion", "assistant", "all"] = Field(
        "auto",
        description="Supervised part: the last answer, every assistant turn, or all; auto: by the shape of the rows",
    )


class LoraSettings(Group):
    """The adapter."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter", json_schema_extra=unit_of("dimensions"))
    alpha: Annotated[int, Field(ge=1, le=8192)] | Auto = Field(
        "auto", description="Scale of the adapter (alpha / r); auto: 2r", json_schema_extra=unit_of("none")
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the adapter's input", json_schema_extra=unit_of("probability")
    )
    target_modules: TargetModules = Field(
        "all-linear", description="Modules that get an adapter: all-linear, or names separated by commas"
    )
    modules_to_save: Modules = Field(
        [], description="Modules trained whole and saved with the adapter, such as embed_tokens,lm_head"
    )
    rslora: bool = Field(False, description="Rank-stabilised LoRA: scale by alpha / sqrt(r)")
    dora: bool = Field(False, description="DoRA: train the magnitude of each weight's columns, too; slower")


class TrainSettings(Group):
    """How it is learned."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | Auto = Field(
        "auto",
        description="Passes over the training rows; auto: 3, on tiny sets up to 10",
        json_schema_extra=unit_of("epochs"),
    )
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs", json_schema_extra=unit_of("steps")
    )
    learning_rate: float = Field(
        2e-4, gt=0, le=1, description="Peak learning rate", json_schema_extra=unit_of("per step")
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="Course of the learning rate after warmup"
    )
    warmup: Warmup = Field(
        0.03,
        ge=0,
        le=1_000_000,
        description="Length of the learning rate's rise: a ratio below 1, or a number of steps",
        json_schema_extra=unit_of("ratio or steps"),
    )
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto",
        description="Sequences per optimizer step, over all processes; auto: 8, or the next that processes can share",
        json_schema_extra=unit_of("sequences"),
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=100_000)] | Auto = Field(
        "auto",
        description="Sequences per process in one forward pass; auto: as many as never have more than 4,096 tokens "
        "(padded ones 8 at most), as far as they fit",
        json_schema_extra=unit_of("sequences"),
    )
    packing: bool | Auto = Field(
        "auto",
        description="Join the rows of a micro batch into one sequence without padding, attention kept apart; "
        "auto: where the architecture is known to keep it apart",
    )
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        "auto", description="Optimizer; auto: adamw, or what the base model's preset names where it can run"
    )
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e6, description="Gradients are clipped to this norm", json_schema_extra=unit_of("L2 norm")
    )
    gradient_checkpointing: bool | Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto",
        description="Recompute activations to save memory, of all layers, none or that share of them; auto: of as few "
        "as the memory allows",
        json_schema_extra=unit_of("share of the layers"),
    )
    loss: Literal["auto", "full", "chunked", "liger"] = Field(
        "auto",
        description="How the loss is computed: over all logits at once, over chunks of the supervised tokens, or by "
        "Liger's fused kernel (GPU); auto: chunked, or full where the model's head is not known to allow it",
    )
    seed: int = Field(
        42,
        ge=0,
        le=2**32 - 1,
        description="Seed of the split, the order and dropout",
        json_schema_extra=unit_of("none"),
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="End when the held-out loss has not fallen for this many evaluations, one a pass; keep the best",
        json_schema_extra=unit_of("evaluations"),
    )
    logging_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto",
        description="Interval of the logged metrics; auto: about 100 lines a run",
        json_schema_extra=unit_of("steps"),
    )

    accept_partial: bool = Field(
        False,
        description="When SFT_RUNTIME__MAX_HOURS is up, publish what was learned by then as the run's result",
    )


class CheckpointSettings(Group):
    """What is kept in the store while training goes on."""

    uri: CheckpointUri | None = Field(
        None,
        description="Where checkpoints go: s3://bucket/prefix or a folder; {run_id} is filled in; "
        "else checkpoint/ in the output, or for one on the Hub a folder in SFT_RUNTIME__WORK_DIR",
    )
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Steps from one checkpoint to the next, instead of minutes",
        json_schema_extra=unit_of("steps"),
    )
    every_minutes: float = Field(
        5, gt=0, le=1440, description="Time from one checkpoint to the next", json_schema_extra=unit_of("minutes")
    )
    keep: int = Field(
        2, ge=1, le=1000, description="Checkpoints that stay in the store", json_schema_extra=unit_of("checkpoints")
    )


class ParallelSettings(Group):
    """On how many processors and machines."""

    engine: Literal["auto", "ddp", "zero2", "zero3", "fsdp2"] = Field(
        "auto", description="Distributed engine: DDP, DeepSpeed ZeRO-2 or ZeRO-3, FSDP2; auto: by what fits in memory"
    )
    offload: bool | Auto = Field(
        "auto",
        description="Keep the base model's weights in host memory, by ZeRO-3; slow; auto: if nothing else fits",
    )
    processes: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        "auto",
        description="Worker processes on each node; auto: one per GPU, one on a CPU",
        json_schema_extra=unit_of("processes"),
    )
    nodes: int = Field(1, ge=1, le=1024, description="Machines that train together", json_schema_extra=unit_of("nodes"))
    node_rank: Annotated[int, Field(ge=0, le=1023)] | Auto = Field(
        "auto",
        description="Which of the nodes this is, from 0 on; auto: JOB_COMPLETION_INDEX of a Kubernetes Indexed Job",
        json_schema_extra=unit_of("none"),
    )
    host: str = Field(
        "auto",
        min_length=1,
        description="Address of node 0; auto: its pod behind the headless service of a Kubernetes Indexed Job",
    )
    port: int = Field(
        29400, ge=1, le=65535, description="Port of node 0 at which the nodes meet", json_schema_extra=unit_of("none")
    )
    wait_minutes: float = Field(
        15, gt=0, le=1440, description="How long nodes wait for each other", json_schema_extra=unit_of("minutes")
    )


class EvalSettings(Group):
    """How what was learned is shown."""

    prompts: Prompts | None = Field(
        None,
        description="Prompts that are answered before and after training: a JSON list of texts, or of lists of "
        "messages; or a file of them, one a line (.txt, .jsonl); else some held-out rows are",
    )
    samples: int = Field(
        4,
        ge=0,
        le=1000,
        description="Held-out rows that are answered before and after training, without prompts",
        json_schema_extra=unit_of("rows"),
    )
    max_new_tokens: int = Field(
        128, ge=1, le=32_768, description="Longest answer to a prompt", json_schema_extra=unit_of("tokens")
    )


class OutputSettings(Group):
    """Where the adapter goes."""

    uri: OutputUri = Field(
        description="The slot of one run: s3://bucket/prefix, hf://org/name[@branch] or a folder; {run_id} is filled in"
    )
    overwrite: bool = Field(False, description="Replace another run's adapter in the slot")
    merge: bool = Field(False, description="Publish the base model with the adapter merged into it, too, in merged/")
    private: bool = Field(True, description="On the Hub: a repository that the job creates is private")
    pull_request: bool = Field(False, description="On the Hub: open a pull request instead of committing to main")
    license: License | None = Field(
        None, description="License of the adapter in its model card, as the Hub names it: apache-2.0, other, ..."
    )
