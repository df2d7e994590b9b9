"""The plan's values while they are chosen, each with where it came from: environment over preset over default."""

from typing import Any

from job.presets import Preset, is_given
from job.settings_fields import Group


class Choices:
    """Values under the plan's field names, each with its source, and what is to be warned of.

    `preset` None: there is none for the base model, or the rows are too many for it.
    """

    def __init__(self, preset: Preset | None = None) -> None:
        self._preset = preset
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []

    def put(self, name: str, value: object, source: str) -> None:
        """Note a value that isn't a setting's own."""
        self.values[name] = value
        self.sources[name] = source

    def find(self, group: Group, field: str) -> tuple[Any, str]:
        """Return a setting's value and where it came from. The value is "auto" where it is left to the job."""
        if self._preset is not None:
            supplied = self._preset.supplies(group)
            if field in supplied:
                return supplied[field], self._preset.describe()
        return getattr(group, field), setting_source(group, field)

    def take(self, name: str, group: Group, field: str, *, auto: object = None, why: str = "") -> None:
        """Note a setting's value, or `auto` with its reason where it is left to the job."""
        value, source = self.find(group, field)
        if value == "auto":
            value, source = auto, f"auto: {why}"
        self.put(name, value, source)


def setting_name(group: Group, field: str) -> str:
    """Return the variable that gives a setting."""
    return f"SFT_{type(group).__name__.removesuffix('Settings')}__{field}".upper()


def setting_source(group: Group, field: str) -> str:
    """Return the variable that a setting was given by, or "default"."""
    return setting_name(group, field) if is_given(group, field) else "default"
