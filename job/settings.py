"""Every SFT_* variable, as one frozen Settings with a group for each part of the job; nothing else reads them.

`SFT_LORA__R=16` sets a field, `SFT_LORA='{"r": 16}'` a whole group; a field's own variable wins over its group's JSON.
`load_settings` reports all problems at once, and `sft-job schema` prints what stands here as JSON Schema.
"""

import difflib
import json
import os
import tempfile
from collections.abc import Mapping
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

PREFIX = "SFT_"
DELIMITER = "__"


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
    return value


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
        description="Sequences per optimizer step, over all processes; auto: 8 or the next multiple of the processes",
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
        broken = {name.lower() for name, _ in _broken_groups(os.environ)}
        environment.env_vars = {name: value for name, value in environment.env_vars.items() if name not in broken}
        return (environment,)


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises ConfigError with every problem found, one a line, each with the variable, its value and the remedy.
    """
    problems = _unknown_names(os.environ) + [f"{name}: {reason}" for name, reason in _broken_groups(os.environ)]
    settings = None
    try:
        settings = Settings()
    except ValidationError as error:
        problems += _describe(error)
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
    """Return the runtime group alone, or its defaults where it is wrong: an error in the settings is logged too."""

    class RuntimeOnly(BaseSettings):
        model_config = Settings.model_config | SettingsConfigDict(extra="ignore")
        runtime: RuntimeSettings = RuntimeSettings()

    try:
        return RuntimeOnly().runtime
    except (ValidationError, SettingsError):
        return RuntimeSettings()


def known_names() -> list[str]:
    """Return the variables of all groups and fields, `SFT_LORA`, `SFT_LORA__R` ..."""
    names = []
    for group, group_class in _groups().items():
        names.append(_variable(group))
        names += [_variable(group, field) for field in group_class.model_fields]
    return names


def _groups() -> dict[str, type[Group]]:
    hints: dict[str, type[Group]] = {name: get_type_hints(Settings)[name] for name in Settings.model_fields}
    return hints


def _variable(*parts: str) -> str:
    return PREFIX + DELIMITER.join(parts).upper()


def _nearest(name: str) -> str:
    """Return ", did you mean ...?" for a misspelt variable, or nothing; a forgotten group counts as a misspelling."""
    known = known_names()
    by_field = {other.split(DELIMITER)[-1]: other for other in reversed(known) if DELIMITER in other}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    last = name.removeprefix(PREFIX).split(DELIMITER)[-1]
    near_field = [by_field[field] for field in difflib.get_close_matches(last, by_field, n=1, cutoff=0.7)]
    candidates = near_field + near if DELIMITER not in name else near + near_field
    return f", did you mean {candidates[0]}?" if candidates else ""


def _unknown_names(environment: Mapping[str, str]) -> list[str]:
    # Values are not shown: a misspelt name may well be a misplaced secret.
    known = set(known_names())
    names = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    return [f"{name}: unknown setting{_nearest(name.upper())}" for name in names]


def _broken_groups(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    groups = {_variable(group) for group in Settings.model_fields}
    broken = []
    for name, value in environment.items():
        if name.upper() not in groups or not value:
            continue
        try:
            tree = json.loads(value)
        except json.JSONDecodeError as error:
            broken.append((name, f"must be one JSON object: {error.msg} at column {error.colno}"))
            continue
        if not isinstance(tree, dict):
            broken.append((name, f'must be one JSON object, such as {{"field": value}}, not {type(tree).__name__}'))
    return broken


def _describe(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into lines `SFT_LORA__R=0: must be at least 1`, one for each variable."""
    reasons: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        name = _variable(*location[:2])
        kind = problem["type"]
        if kind == "missing":  # a field, or a group of which nothing is set
            group = _groups()[location[0]]
            fields = location[1:] or [field for field, info in group.model_fields.items() if info.is_required()]
            for field in fields:
                reasons[_variable(location[0], field)] = [f"must be set ({group.model_fields[field].description})"]
        elif kind == "extra_forbidden":
            if not _is_set(name) and not _is_set_below(name):  # else `_unknown_names` has said so
                reasons[name] = [f"unknown setting{_nearest(name)}"]
        elif not (isinstance(problem["input"], dict) and _is_set_below(name)):  # SFT_LORA__R__X: likewise
            shown = _show(problem["input"], problem["msg"])
            reasons.setdefault(name + shown, []).append(_reason(kind, problem["msg"], problem.get("ctx", {})))
    return [f"{name}: {_join_reasons(why)}" for name, why in reasons.items()]


def _is_set(name: str) -> bool:
    return any(other.upper() == name for other in os.environ)


def _is_set_below(name: str) -> bool:
    return any(other.upper().startswith(name + DELIMITER) for other in os.environ)


def _show(value: object, message: str) -> str:
    """Return "=value", without what may be secret: a query string is where presigned URLs have their signature."""
    if "credentials" in message or isinstance(value, dict):
        return ""
    text = str(value)
    return f"={text.split('?', 1)[0]}?..." if "://" in text and "?" in text else f"={text}"


def _join_reasons(reasons: list[str]) -> str:
    """Join what the members of a union ask for: `must be at least 1 or auto`."""
    first, *others = sorted(reasons)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _format_number(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _reason(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """Say what a value must be, in words that fit behind the variable's name."""
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {_format_number(context[key])}"
    if kind == "literal_error":
        return f"must be {context['expected']}".replace("'", "")
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return "must be a whole number"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return "must be a number"
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    return message.removeprefix("Value error, ")
