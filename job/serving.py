"""Which serving engines will take the adapter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineVerdict:
    """Whether a serving engine takes the adapter (None: not known), and why."""

    engine: str
    takes: bool | None
    reason: str
