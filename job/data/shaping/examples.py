"""What rows become: plain text or a conversation, with what the loss is taken on; or why they can't be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LossOn = Literal["auto", "completion", "assistant", "all"]


class RowError(Exception):
    """One row can't be used; `reason` says why, without the row's place."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FatalRowError(RowError):
    """One row can't be used, and neither can any other of its kind: the fault is the model's, not the row's."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint

    def __reduce__(self) -> tuple[type["FatalRowError"], tuple[str, str]]:
        # Otherwise it could not come back from another process: an exception is remade from its message alone.
        return FatalRowError, (self.reason, self.hint)


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How the user wants rows to be read: what is supervised, columns to rename, and a template of their columns."""

    loss_on: LossOn = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # found in the file -> wanted
    template: str | None = None


@dataclass(frozen=True, slots=True)
class PlainExample:
    """Text for a model without chat: the loss is taken on half-open character ranges, the last of which reaches the
    end, EOS included. `notes` are oddities that did not make the row unusable."""

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` holds what a template may also want to see: `tool_calls`, `name`, `reasoning_content` ..."""

    role: str
    content: str
    supervised: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation: the loss is taken on the supervised turns, or on every token of it. `tools` are the functions
    that the assistant may call, as JSON schemas; `notes` are oddities that did not make the row unusable."""

    messages: tuple[Message, ...]
    supervise_all: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


Example = PlainExample | ChatExample
