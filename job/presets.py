"""Defaults by base model, out of presets.yaml: what is known to work for it on few rows.

The environment wins over a preset, and a preset over the settings' defaults. Its values are those of the groups of
settings themselves, so whatever a setting refuses, a preset can't hold.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from job.settings import Settings
from job.settings_fields import Group
from job.settings_groups import LoraSettings, TrainSettings

_PATH = Path(__file__).with_name("presets.yaml")


class Preset(Group):
    """One entry of presets.yaml. Of `lora` and `train`, only the fields that are set there count."""

    name: str
    models: Annotated[list[str], Field(min_length=1)]
    max_rows: int = Field(ge=1)
    lora: LoraSettings
    train: TrainSettings

    def matches(self, model_id: str) -> bool:
        """Say whether the preset is made for a base model, by the last part of its id, path or URI alone."""
        last = model_id.rstrip("/").rsplit("/", 1)[-1].lower()
        return any(fnmatchcase(last, pattern.lower()) for pattern in self.models)

    def applies_to(self, train_rows: int) -> bool:
        """Say whether the rows are few enough."""
        return train_rows <= self.max_rows

    def supplies(self, group: Group) -> dict[str, Any]:
        """Return the values for a group of settings, without those that the environment gives."""
        own = next((own for own in (self.lora, self.train) if type(own) is type(group)), None)
        if own is None:
            return {}
        return {field: value for field, value in own if field in own.model_fields_set and not is_given(group, field)}

    def describe(self) -> str:
        """Return what the plan names as a value's source."""
        return f"preset {self.name} (at most {self.max_rows:,} rows)"

    def identity(self, settings: Settings, *, leave_out: Mapping[str, Collection[str]]) -> dict[str, Any]:
        """Return what a run's name depends on: all that the preset supplies where the rows are few enough.

        `leave_out` names, by group, the settings that change nothing of what is learned.
        """
        supplied = {"lora": self.supplies(settings.lora), "train": self.supplies(settings.train)}
        return {"max_rows": self.max_rows} | {
            group: {field: value for field, value in values.items() if field not in leave_out.get(group, ())}
            for group, values in supplied.items()
        }


def is_given(group: Group, field: str) -> bool:
    """Say whether the environment gives a setting; "auto" leaves it to the job, as if nothing were given."""
    return field in group.model_fields_set and getattr(group, field) != "auto"


def find_preset(model_id: str) -> Preset | None:
    """Return the preset that is made for a base model, if there is one. Whether it applies depends on the rows."""
    return next((preset for preset in load_presets() if preset.matches(model_id)), None)


@cache
def load_presets() -> tuple[Preset, ...]:
    """Return all presets, in the order in which they are tried."""
    import yaml

    return TypeAdapter(tuple[Preset, ...]).validate_python(yaml.safe_load(_PATH.read_text(encoding="utf-8")))
