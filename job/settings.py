"""Every SFT_* variable, as one frozen Settings with a group for each part of the job; nothing else reads them.

`SFT_LORA__R=16` sets a field, `SFT_LORA='{"r": 16}'` a whole group; a field's own variable wins over its group's JSON.
`load_settings` reports all problems at once, and `sft-job schema` prints what stands here as JSON Schema.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from job.errors import ConfigError
from job.settings_problems import DELIMITER, PREFIX, broken_groups, describe, unknown_names


def _refuse_credentials(uri: str) -> str:
    # The value is kept out of the message by whoever prints it: see `_describe`. A secret key may hold slashes, so the
    # @ may stand anywhere.
    rest = uri.split("://", 1)[1] if "://" in uri else ""
    if ":" in rest.split("/", 1)[0] and "@" in rest:
        raise ValueError("credentials don't belong in a URI; use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return uri


def _require_scheme(uri: str) -> str:
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme not in ("", "s3", "hf"):
        raise ValueError(f"no store is known for {scheme}://; use s3://bucket/key, hf://datasets/org/name or a path")
    return uri


def _require_output_place(uri: str) -> str:
    if uri.startswith("hf://"):
        raise ValueError("publishing to the Hub is not served yet; use s3://bucket/prefix or a path")
    if any(character in uri for character in "*?["):
        raise ValueError("an output is one place; it can't hold wildcards")
    return uri


def _parse_target_modules(value: object) -> object:
    if value in ("all-linear", ["all-linear"]):
        return "all-linear"
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not (isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)):
        raise ValueError("must be all-linear, or names of modules such as q_proj,v_proj")
    return sorted(set(value))


def _require_whole_steps(warmup: float) -> float:
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError("must be a ratio below 1 or a whole number of steps")
    return warmup


def _unit(unit: str) -> dict[str, Any]:
    return {"unit": unit}


Auto = Literal["auto"]
Uri = Annotated[str, Field(min_length=1), AfterValidator(_refuse_credentials), AfterValidator(_require_scheme)]


class Group(BaseModel):
    """A group of settings: frozen, strict about names, silent about values in its own errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class ModelSettings(Group):
    """The base model."""

    id: Uri = Field(description="Base model: a Hub id, a folder, or an s3:// prefix")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a Hub model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of weights and arithmetic; auto: by the device"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto: sdpa"
    )


class DataSettings(Group):
    """What is learned from."""

    uri: Uri = Field(description="Training rows: s3://bucket/key, a prefix or a glob; hf://datasets/org/name; a path")
    eval_uri: Uri | None = Field(None, description="Held-out rows, of the same forms; else they are split off")
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] | Auto = Field(
        "auto",
        description="Share of the rows held out; auto: a tenth from 50 rows on, at most 500 rows",
        json_schema_extra=_unit("share of rows"),
    )
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = Field(
        "auto",
        description="Longest sequence; auto: what 99 % of the rows need, rounded up to 64",
        json_schema_extra=_unit("tokens"),
    )
    truncation: Literal["drop", "keep_start"] = Field("drop", description="What happens to rows beyond max_length")
    loss_on: Literal["auto", "completion", "assistant", "all"] = Field(
        "auto",
        description="Supervised part: the last answer, every assistant turn, or all; auto: by the shape of the rows",
    )


class LoraSettings(Group):
    """The adapter."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter", json_schema_extra=_unit("dimensions"))
    alpha: Annotated[int, Field(ge=1, le=8192)] | Auto = Field(
        "auto", description="Scale of the adapter (alpha / r); auto: 2r", json_schema_extra=_unit("none")
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the adapter's input", json_schema_extra=_unit("probability")
    )
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_parse_target_modules)] = Field(
        "all-linear", description="Modules that get an adapter: all-linear, or names separated by commas"
    )


class TrainSettings(Group):
    """How it is learned."""

    epochs: float = Field(
        3.0, gt=0, le=1000, description="Passes over the training rows", json_schema_extra=_unit("epochs")
    )
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs", json_schema_extra=_unit("steps")
    )
    learning_rate: float = Field(
        2e-4, gt=0, le=1, description="Peak learning rate", json_schema_extra=_unit("per step")
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="Course of the learning rate after warmup"
    )
    warmup: Annotated[float, AfterValidator(_require_whole_steps)] = Field(
        0.03,
        ge=0,
        le=1_000_000,
        description="Length of the learning rate's rise: a ratio below 1, or a number of steps",
        json_schema_extra=_unit("ratio or steps"),
    )
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto",
        description="Sequences per optimizer step, over all processes; auto: 8, or the next that processes can share",
        json_schema_extra=_unit("sequences"),
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=100_000)] | Auto = Field(
        "auto",
        description="Sequences per process in one forward pass; auto: up to 8 within 4,096 tokens",
        json_schema_extra=_unit("sequences"),
    )
    packing: bool | Auto = Field(
        "auto",
        description="Join the rows of a micro batch into one sequence without padding, attention kept apart; "
        "auto: where the architecture is known to keep it apart",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e6, description="Gradients are clipped to this norm", json_schema_extra=_unit("L2 norm")
    )
    gradient_checkpointing: bool | Auto = Field(
        "auto", description="Recompute activations to save memory; auto: on a GPU"
    )
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="Seed of the split, the order and dropout", json_schema_extra=_unit("none")
    )
    logging_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto",
        description="Interval of the logged metrics; auto: about 100 lines a run",
        json_schema_extra=_unit("steps"),
    )


class ParallelSettings(Group):
    """On how many processors."""

    engine: Literal["auto", "ddp"] = Field("auto", description="Distributed engine; auto: ddp")
    processes: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        "auto", description="Worker processes; auto: one per GPU, one on a CPU", json_schema_extra=_unit("processes")
    )


class OutputSettings(Group):
    """Where the adapter goes."""

    uri: Annotated[Uri, AfterValidator(_require_output_place)] = Field(
        description="The slot of one run: s3://bucket/prefix or a folder; {run_id} is filled in"
    )
    overwrite: bool = Field(False, description="Replace another run's adapter in the slot")


class RuntimeSettings(Group):
    """Where and how the job itself runs."""

    work_dir: Path = Field(
        Path(tempfile.gettempdir()) / "sft-job",
        description="Folder for downloads and intermediate files; one job at a time",
    )
    log_format: Literal["auto", "text", "json"] = Field("auto", description="Log lines as text or JSON; auto: text")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is logged")
    termination_log: Path = Field(
        Path("/dev/termination-log"),
        description="File for the outcome as JSON; the default is written only if it exists",
    )


class Settings(BaseSettings):
    """All settings of one run."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        title="sft-job settings",
    )

    model: ModelSettings
    data: DataSettings
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
    output: OutputSettings
    runtime: RuntimeSettings = RuntimeSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment only, without the groups whose JSON is broken: `load_settings` reports those itself,
        where the library would stop at the first."""
        environment = cast(EnvSettingsSource, env_settings)
        broken = {name.lower() for name in broken_groups(os.environ, settings_groups())}
        environment.env_vars = {name: value for name, value in environment.env_vars.items() if name not in broken}
        return (environment,)


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises ConfigError with every problem found, one a line, each with the variable, its value and the remedy.
    """
    groups = settings_groups()
    problems = unknown_names(os.environ, groups)
    problems += [f"{name}: {reason}" for name, reason in broken_groups(os.environ, groups).items()]
    settings = None
    try:
        settings = Settings()
    except ValidationError as error:
        problems += describe(error, os.environ, groups)
    if settings is not None:
        problems += _contradictions(settings)
    if settings is None or problems:
        raise ConfigError(
            "; ".join(problems)
            if len(problems) == 1
            else f"{len(problems)} settings are wrong:\n  " + "\n  ".join(problems),
            hint="`sft-job schema` lists every setting",
        )
    return settings


def _contradictions(settings: Settings) -> list[str]:
    """Return the pairs of settings of which one would be ignored."""
    problems = []
    if settings.data.eval_uri is not None and "eval_fraction" in settings.data.model_fields_set:
        problems.append("SFT_DATA__EVAL_FRACTION: SFT_DATA__EVAL_URI names the held-out rows already; set one of them")
    if settings.train.max_steps is not None and "epochs" in settings.train.model_fields_set:
        problems.append("SFT_TRAIN__EPOCHS: SFT_TRAIN__MAX_STEPS says how long to train already; set one of them")
    return problems


def load_runtime_settings() -> RuntimeSettings:
    """Return the runtime group alone, with the default for each field that is wrong: that is still to be logged."""

    class RuntimeOnly(BaseSettings):
        model_config = Settings.model_config
        runtime: RuntimeSettings = RuntimeSettings()

    try:
        given = EnvSettingsSource(RuntimeOnly)().get("runtime", {})
        try:
            return RuntimeSettings.model_validate(given)
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors()}
            return RuntimeSettings.model_validate({name: value for name, value in given.items() if name not in wrong})
    except SettingsError:  # the group's JSON is broken
        return RuntimeSettings()


def settings_groups() -> dict[str, type[Group]]:
    """Return the groups by name."""
    hints = get_type_hints(Settings)
    return {name: hints[name] for name in Settings.model_fields}
