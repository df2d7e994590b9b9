"""The adapter goes to its slot: every file read back and compared, the manifest last, so that its presence means that
all it lists is there and whole."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import job
from job.errors import ConfigError, UnavailableError
from job.handover import MERGED, RunFolder
from job.log import format_bytes, logger
from job.manifest import MANIFEST_NAME, hash_file, make_manifest
from job.memory.found import forget_memory_found
from job.prepared import Prepared
from job.report import format_model_card
from job.storage import Store, open_store

_SETTING = "SFT_OUTPUT__URI"
_PLACEHOLDER = "{run_id}"
_BAD_ROWS = "bad_rows.jsonl"  # of a run that ended because of them
_QUARANTINE = "quarantine.jsonl"  # of a run that skipped them


def open_slot(uri: str, run_id: str) -> Store:
    """Open the slot that an output URI names for a run."""
    return open_store(uri.replace(_PLACEHOLDER, run_id), setting=_SETTING)


def check_slot(uri: str) -> None:
    """Prove, before any download, that the output can be reached and, unless a run is finished there, written.

    Raises the store's errors, naming the setting.
    """
    # The run's id isn't known yet: what stands before it in the URI is as good for the proof.
    slot = open_store(uri.split(_PLACEHOLDER, maxsplit=1)[0], setting=_SETTING)
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
    if not _is_manifest(manifest):
        raise ConfigError(
            f"SFT_OUTPUT__URI={slot.uri}: the {MANIFEST_NAME} there was not written by this job",
            hint="publish to another place",
        )
    published: dict[str, Any] = manifest
    return published


def _is_manifest(content: object) -> bool:
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
        if not merge or _has_merged(published):
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


def _has_merged(manifest: Mapping[str, Any]) -> bool:
    return any(file["path"].startswith(f"{MERGED}/") for file in manifest["files"])


def publish_run(prepared: Prepared, folder: RunFolder) -> None:
    """Lay everything that belongs to the trained adapter beside it, and publish it to the run's slot."""
    plan, inputs, metrics = prepared.plan, prepared.inputs, folder.read_result()
    _name_base_model(folder.adapter, plan.model_id, inputs.base_model.hub_revision)
    prepared.dataset.tokenizer.save_pretrained(folder.adapter)
    card = format_model_card(
        plan,
        run_id=inputs.run_id,
        job_version=job.__version__,
        metrics=metrics,
        is_on_hub=inputs.base_model.hub_revision is not None,
    )
    (folder.adapter / "README.md").write_text(card, encoding="utf-8")
    for source in (folder.plan, folder.xray, folder.metrics):
        shutil.copy(source, folder.adapter)
    _set_aside(prepared.dataset.bad_row_files(), folder.adapter / _QUARANTINE)
    manifest = make_manifest(
        run_id=inputs.run_id,
        settings=prepared.settings,
        plan=plan,
        hardware=prepared.hardware,
        data=prepared.dataset.files,
        metrics=metrics,
        files=sorted(path for path in folder.adapter.rglob("*") if path.is_file()),
        folder=folder.adapter,
    )
    publish(prepared.slot, folder.adapter, manifest, overwrite=prepared.settings.output.overwrite)
    forget_memory_found(prepared.slot)


def _set_aside(sources: list[Path], target: Path) -> None:
    """Write the rows that were skipped, if any were, into one file that is published with the adapter."""
    if not sources:
        return
    with target.open("wb") as writer:
        for source in sources:
            with source.open("rb") as reader:
                shutil.copyfileobj(reader, writer)


def keep_bad_rows(slot: Store, path: Path) -> str:
    """Put the list of the rows that ended the job into the slot, where it outlives this machine; return its URI."""
    slot.put(path, _BAD_ROWS)
    return f"{slot.uri.rstrip('/')}/{_BAD_ROWS}"


def _name_base_model(adapter_folder: Path, model_id: str, hub_revision: str | None) -> None:
    """Name the base model in adapter_config.json as the user did, in place of the local path it was loaded from."""
    path = adapter_folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["base_model_name_or_path"] = model_id
    config["revision"] = hub_revision
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(slot: Store, folder: Path, manifest: dict[str, Any], *, overwrite: bool) -> None:
    """Place the files that the manifest lists, from `folder`, then the manifest.

    Raises ConfigError when another run was published there since this one began, and UnavailableError when a file reads
    back differently. Up to the last moment the slot has no manifest, so a publication that breaks off is none.
    """
    if is_already_published(slot, manifest["run_id"], overwrite=overwrite, merge=_has_merged(manifest)):
        logger.warning("another start of this run was faster: it is published at %s", slot.uri)
        return
    names = [file["path"] for file in manifest["files"]]
    replaced = read_published(slot)
    if replaced is not None:
        slot.delete(MANIFEST_NAME)
        for stale in {file["path"] for file in replaced["files"]} - set(names):
            slot.delete(stale)
    for name in names:
        slot.put(folder / name, name)
    _read_back(slot, {file["path"]: file["sha256"] for file in manifest["files"]}, folder.parent)
    manifest_path = folder / MANIFEST_NAME
    manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    slot.put(manifest_path, MANIFEST_NAME)
    if slot.read(MANIFEST_NAME) != manifest_path.read_bytes():
        slot.delete(MANIFEST_NAME)
        raise UnavailableError(f"{slot.uri}: the manifest reads back differently from what was written")
    total_bytes = sum(file["bytes"] for file in manifest["files"])
    logger.info("published %d files, %s, at %s", len(names) + 1, format_bytes(total_bytes), slot.uri)


def _read_back(slot: Store, expected_sha256: dict[str, str], scratch: Path) -> None:
    stored = [file for file in slot.find() if file.path in expected_sha256]
    missing = set(expected_sha256) - {file.path for file in stored}
    if missing:
        raise UnavailableError(f"{slot.uri}: {min(missing)} was written, and isn't there")
    for file in stored:  # one at a time, for the disk may not have room for a whole model once more
        with tempfile.TemporaryDirectory(prefix="read-back-", dir=scratch) as folder:
            [path] = slot.fetch([file], Path(folder), lambda _: None)
            if hash_file(path) != expected_sha256[file.path]:
                raise UnavailableError(f"{file.uri}: reads back differently from what was written")
