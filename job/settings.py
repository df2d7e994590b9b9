"""Every SFT_* variable, as one frozen Settings with a group for each part of the job; nothing else reads them.

`SFT_LORA__R=16` sets a field, `SFT_LORA='{"r": 16}'` a whole group; a field's own variable wins over its group's JSON.
`load_settings` reports all problems at once, and `sft-job schema` prints what stands here as JSON Schema.
"""

import os
from typing import Literal, cast, get_type_hints

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from job.errors import ConfigError
from job.settings_fields import Group
from job.settings_groups import (
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    LoraSettings,
    ModelSettings,
    OutputSettings,
    ParallelSettings,
    TrainSettings,
)
from job.settings_problems import DELIMITER, PREFIX, broken_groups, describe, unknown_names
from job.settings_runtime import RuntimeSettings


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
    quantization: Literal["none", "nf4", "int8", "fp8"] = Field(
        "none",
        description="How the frozen base model is held while training: as it is, in 4 bits (NF4, double quantisation), "
        "in 8 (LLM.int8), or in FP8, in which it is multiplied, too (GPUs from Ada and Hopper on)",
    )
    train: TrainSettings = TrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    parallel: ParallelSettings = ParallelSettings()
    eval: EvalSettings = EvalSettings()
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
    output = settings.output
    if output.pull_request and not output.uri.startswith("hf://"):
        problems.append(
            "SFT_OUTPUT__PULL_REQUEST: there are pull requests on the Hub alone, hf://org/name; leave it out"
        )
    elif output.pull_request and "@" in output.uri:
        problems.append(
            "SFT_OUTPUT__PULL_REQUEST: it is one to merge into main; leave the revision out of SFT_OUTPUT__URI"
        )
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


def settings_groups() -> dict[str, type[Group] | None]:
    """Return the groups by name, with None for a setting that stands alone."""
    hints = get_type_hints(Settings)
    return {name: hints[name] if isinstance(hints[name], type) else None for name in Settings.model_fields}
