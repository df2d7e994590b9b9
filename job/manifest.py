"""The identity of a run (`run_id`): what of settings, data and base model decides what is learned."""

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from job.presets import find_preset
from job.settings import Settings

MANIFEST_NAME = "manifest.json"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "tokenizers",
    "huggingface_hub",
    "boto3",
    "pyarrow",
)
# How a run is spread, where its files are and how it talks don't change what is learned.
# The base model's revision counts as what it resolved to; data and chat template as their content.
_NOT_TRAINING = {
    "model": {"revision", "chat_template"},
    "data": {"uri", "eval_uri", "bad_rows", "max_bad_fraction", "max_dropped_fraction"},
    "train": {"micro_batch_size", "gradient_checkpointing", "loss", "logging_steps", "accept_partial"},
}
_TRAINING_GROUPS = ("model", "data", "lora", "quantization", "train")


@dataclass(frozen=True)
class DataFile:
    """One data file as it was read."""

    uri: str
    etag: str
    sha256: str
    bytes: int
    rows: int
    weight: float


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def training_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that decide what is learned, by group."""
    tree: dict[str, Any] = settings.model_dump(mode="json", include=set(_TRAINING_GROUPS), exclude=_NOT_TRAINING)
    return tree


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that a run's result may depend on."""
    return {name: metadata.version(name) for name in _PACKAGES}


def make_run_id(
    settings: Settings,
    *,
    train: list[tuple[str, float]],
    evaluation: list[str],
    model_revision: str,
    chat_template: str | None,
) -> str:
    """Return 16 hex digits that name a run: sha256 over the training settings, the data's and base model's versions.

    `train` has each file's sha256 and weight, `evaluation` each file's sha256; `chat_template` is the text of one that
    is not the base model's own. Two starts with the same run_id would learn the same; credentials, places, logging and
    parallelism don't count.
    """
    tree = training_settings(settings)
    preset = find_preset(settings.model.id)
    identity = {
        "settings": tree,
        "preset": None if preset is None else preset.identity(settings, leave_out=_NOT_TRAINING),
        "train": train,
        "eval": evaluation,
        "model_revision": model_revision,
        "chat_template": chat_template,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
