"""The slot of a run: where it is, and what lies there already. And its workplace: where lease, checkpoints and the like
are while it isn't published, which is the slot itself unless that takes whole commits only."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from job.checkpoints.stored import CHECKPOINTS, CheckpointStore
from job.errors import ConfigError
from job.handover import MERGED
from job.log import logger
from job.manifest import MANIFEST_NAME
from job.settings_groups import OutputSettings
from job.storage import ReadableStore, Slot, Store, open_folder

OUTPUT_SETTING = "SFT_OUTPUT__URI"
_CHECKPOINT_SETTING = "SFT_CHECKPOINT__URI"
_PLACEHOLDER = "{run_id}"
_ANY_RUN = "0" * 16
_BAD_ROWS = "bad_rows.jsonl"  # of a run that ended because of them


def open_slot(output: OutputSettings, run_id: str) -> Slot:
    """Open the slot that the settings name for a run.

    Raises ConfigError for one that can't be.
    """
    uri = output.uri.replace(_PLACEHOLDER, run_id)
    if not uri.startswith("hf://"):
        return open_folder(uri, setting=OUTPUT_SETTING)
    from job.storage.hub_output import HubSlot

    return HubSlot(
        uri,
        setting=OUTPUT_SETTING,
        run_id=run_id,
        private=output.private,
        pull_request=output.pull_request,
        license_name=output.license,
    )


def open_workplace(slot: Slot, checkpoint_uri: str | None, run_id: str, work_dir: Path) -> Store:
    """Open the place of what changes while a run goes on: the slot, or for one that takes whole commits only the place
    of the checkpoints, or else a folder for this slot in the work folder."""
    if not slot.takes_commits:
        return slot
    if checkpoint_uri is not None:
        return open_folder(checkpoint_uri.replace(_PLACEHOLDER, run_id), setting=_CHECKPOINT_SETTING)
    folder = work_dir / "slots" / quote(slot.uri.removeprefix("hf://"), safe="")
    return open_folder(str(folder), setting="SFT_RUNTIME__WORK_DIR")


def open_checkpoints(uri: str | None, workplace: Store, run_id: str) -> CheckpointStore:
    """Open the place of a run's checkpoints, by default a folder in its workplace."""
    beside = f"{workplace.uri.rstrip('/')}/{CHECKPOINTS}"
    return CheckpointStore(
        open_folder(beside if uri is None else uri.replace(_PLACEHOLDER, run_id), setting=_CHECKPOINT_SETTING)
    )


def check_slot(output: OutputSettings) -> None:
    """Prove, before any download, that the output can be reached and, unless a run is finished there, written.

    Raises the store's errors, naming the setting.
    """
    # The run's id isn't known yet: what stands before it in the URI is as good for the proof, and on the Hub any id is.
    if output.uri.startswith("hf://"):
        slot = open_slot(output, _ANY_RUN)
    else:
        slot = open_folder(output.uri.split(_PLACEHOLDER, maxsplit=1)[0], setting=OUTPUT_SETTING)
    if read_published(slot) is None:
        slot.check_writable()


def read_published(slot: ReadableStore | Slot) -> dict[str, Any] | None:
    """Return the manifest in the slot, or None for a slot that holds no finished run.

    Raises ConfigError for a file of that name that is no manifest.
    """
    return parse_manifest(slot.read(MANIFEST_NAME), slot.uri)


def parse_manifest(content: bytes | None, uri: str) -> dict[str, Any] | None:
    """Return what a manifest at an output's URI says, None where there is none; raises as `read_published` does."""
    if content is None:
        return None
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if not is_manifest(manifest):
        raise ConfigError(
            f"{OUTPUT_SETTING}={uri}: the {MANIFEST_NAME} there was not written by this job",
            hint="publish to another place",
        )
    published: dict[str, Any] = manifest
    return published


def is_manifest(content: object) -> bool:
    """Say whether a file of that name was written by this job."""
    if not isinstance(content, dict) or "run_id" not in content or not isinstance(content.get("files"), list):
        return False
    return all(isinstance(file, dict) and "path" in file for file in content["files"])


def is_finished(slot: Slot, checkpoints: CheckpointStore, run_id: str, output: OutputSettings, *, nodes: int) -> bool:
    """Say whether this very run lies finished in the slot, as `is_already_published` does, and was read back.

    Where all is committed at once, that comes after, and what was trained is kept among the checkpoints until then. Of
    several nodes, only the first may see it there, so they don't ask.
    """
    if not is_already_published(slot, run_id, overwrite=output.overwrite, merge=output.merge):
        return False
    if not slot.takes_commits or nodes > 1 or not checkpoints.has_finished(run_id):
        return True
    logger.warning("%s: published by a start that was killed before it could read it back", slot.uri)
    return False


def is_already_published(slot: Slot, run_id: str, *, overwrite: bool, merge: bool) -> bool:
    """Say whether this very run lies finished in the slot, with its merged model if `merge` asks for that.

    Raises ConfigError when another run does, or this one without its merged model, and it may not be overwritten.
    """
    published = read_published(slot)
    return published is not None and is_same_run(published, slot.uri, run_id, overwrite=overwrite, merge=merge)


def is_same_run(published: dict[str, Any], uri: str, run_id: str, *, overwrite: bool, merge: bool) -> bool:
    """Say whether a manifest at a URI is that of a run, as `is_already_published` does."""
    if published["run_id"] == run_id:
        if not merge or has_merged(file["path"] for file in published["files"]):
            return True
        if not overwrite:
            raise ConfigError(
                f"SFT_OUTPUT__MERGE=true: this run is published at {uri} already, without a merged model",
                hint="publish elsewhere, or set SFT_OUTPUT__OVERWRITE=true to train again and replace it",
            )
        return False
    if not overwrite:
        raise ConfigError(
            f"{OUTPUT_SETTING}={uri}: run {published['run_id']} is published there, and this is run {run_id}",
            hint="publish elsewhere ({run_id} in the URI is filled in for each run), or set SFT_OUTPUT__OVERWRITE=true",
        )
    return False


def has_merged(names: Iterable[str]) -> bool:
    """Say whether a merged model is among files, by their names in the slot."""
    return any(name.startswith(f"{MERGED}/") for name in names)


def keep_bad_rows(workplace: Store, path: Path) -> str:
    """Put the list of the rows that ended the job where it outlives this start; return its URI."""
    workplace.put(path, _BAD_ROWS)
    return f"{workplace.uri.rstrip('/')}/{_BAD_ROWS}"
