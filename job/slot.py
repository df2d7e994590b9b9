"""The slot of a run: where it is, and what lies there already."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.checkpoints.stored import CHECKPOINTS, CheckpointStore
from job.errors import ConfigError
from job.handover import MERGED
from job.manifest import MANIFEST_NAME
from job.storage import Store, open_store

OUTPUT_SETTING = "SFT_OUTPUT__URI"
_PLACEHOLDER = "{run_id}"
_BAD_ROWS = "bad_rows.jsonl"  # of a run that ended because of them


def open_slot(uri: str, run_id: str) -> Store:
    """Open the slot that an output URI names for a run."""
    return open_store(uri.replace(_PLACEHOLDER, run_id), setting=OUTPUT_SETTING)


def open_checkpoints(uri: str | None, slot: Store, run_id: str) -> CheckpointStore:
    """Open the place of a run's checkpoints, by default a folder in its slot."""
    beside = f"{slot.uri.rstrip('/')}/{CHECKPOINTS}"
    return CheckpointStore(
        open_store(beside if uri is None else uri.replace(_PLACEHOLDER, run_id), setting="SFT_CHECKPOINT__URI")
    )


def check_slot(uri: str) -> None:
    """Prove, before any download, that the output can be reached and, unless a run is finished there, written.

    Raises the store's errors, naming the setting.
    """
    # The run's id isn't known yet: what stands before it in the URI is as good for the proof.
    slot = open_store(uri.split(_PLACEHOLDER, maxsplit=1)[0], setting=OUTPUT_SETTING)
    if read_published(slot) is None:
        slot.check_writable()


def read_published(slot: Store) -> dict[str, Any] | None:
    """Return the manifest in the slot, or None for a slot that holds no finished run.

    Raises ConfigError for a file of that name that is no manifest.
    """
    content = slot.read(MANIFEST_NAME)
    if content is None:
        return None
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if not is_manifest(manifest):
        raise ConfigError(
            f"SFT_OUTPUT__URI={slot.uri}: the {MANIFEST_NAME} there was not written by this job",
            hint="publish to another place",
        )
    published: dict[str, Any] = manifest
    return published


def is_manifest(content: object) -> bool:
    """Say whether a file of that name was written by this job."""
    if not isinstance(content, dict) or "run_id" not in content or not isinstance(content.get("files"), list):
        return False
    return all(isinstance(file, dict) and "path" in file for file in content["files"])


def is_already_published(slot: Store, run_id: str, *, overwrite: bool, merge: bool) -> bool:
    """Say whether this very run lies finished in the slot, with its merged model if `merge` asks for that.

    Raises ConfigError when another run does, or this one without its merged model, and it may not be overwritten.
    """
    published = read_published(slot)
    if published is None:
        return False
    if published["run_id"] == run_id:
        if not merge or has_merged(file["path"] for file in published["files"]):
            return True
        if not overwrite:
            raise ConfigError(
                f"SFT_OUTPUT__MERGE=true: this run is published at {slot.uri} already, without a merged model",
                hint="publish elsewhere, or set SFT_OUTPUT__OVERWRITE=true to train again and replace it",
            )
        return False
    if not overwrite:
        raise ConfigError(
            f"SFT_OUTPUT__URI={slot.uri}: run {published['run_id']} is published there, and this is run {run_id}",
            hint="publish elsewhere ({run_id} in the URI is filled in for each run), or set SFT_OUTPUT__OVERWRITE=true",
        )
    return False


def has_merged(names: Iterable[str]) -> bool:
    """Say whether a merged model is among files, by their names in the slot."""
    return any(name.startswith(f"{MERGED}/") for name in names)


def keep_bad_rows(slot: Store, path: Path) -> str:
    """Put the list of the rows that ended the job into the slot, where it outlives this machine; return its URI."""
    slot.put(path, _BAD_ROWS)
    return f"{slot.uri.rstrip('/')}/{_BAD_ROWS}"
