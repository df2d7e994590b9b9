"""The adapter goes to its slot: every file read back and compared, the manifest last, so that its presence means that
all it lists is there and whole."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import job
from job.checkpoints.stored import CHECKPOINTS, CheckpointStore
from job.errors import ConfigError, UnavailableError
from job.handover import MERGED, RunFolder
from job.lease import Lease
from job.log import event, format_bytes, logger
from job.manifest import MANIFEST_NAME, hash_file, make_manifest
from job.memory.found import forget_memory_found
from job.patience import insist
from job.prepared import Prepared
from job.report import format_model_card
from job.storage import Store, open_store

_SETTING = "SFT_OUTPUT__URI"
_PLACEHOLDER = "{run_id}"
_BAD_ROWS = "bad_rows.jsonl"  # of a run that ended because of them
_QUARANTINE = "quarantine.jsonl"  # of a run that skipped them
_UNLISTED = "checkpoint/unlisted.json"  # the names of files that may lie in the slot while no manifest lists them
_NAMES = TypeAdapter(list[str])
_UPLOADS = 3


def open_slot(uri: str, run_id: str) -> Store:
    """Open the slot that an output URI names for a run."""
    return open_store(uri.replace(_PLACEHOLDER, run_id), setting=_SETTING)


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


def publish_run(prepared: Prepared, folder: RunFolder, lease: Lease) -> None:
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
    for source in (folder.plan, folder.xray, folder.metrics, folder.evaluation):
        if source.exists():
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
    publish(
        prepared.slot,
        folder.adapter,
        manifest,
        overwrite=prepared.settings.output.overwrite,
        check_lease=lease.check,
    )
    prepared.checkpoints.clear(inputs.run_id)
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


def publish(
    slot: Store, folder: Path, manifest: dict[str, Any], *, overwrite: bool, check_lease: Callable[[], None]
) -> None:
    """Place the files that the manifest lists, from `folder`, then the manifest.

    Where the slot is out of reach it waits for minutes, and what reads back differently is written again. Up to the
    last moment the slot has no manifest, so a publication that breaks off is none; its files are known to the next one,
    which removes those that it doesn't replace. Raises ConfigError when another run was published there since this one
    began, UnavailableError when a file reads back differently every time, and what `check_lease` raises, which is
    called before each write.
    """
    if insist(lambda: is_already_published(slot, manifest["run_id"], overwrite=overwrite, merge=_has_merged(manifest))):
        logger.warning("another start of this run was faster: it is published at %s", slot.uri)
        return
    sha256_by_name = {file["path"]: file["sha256"] for file in manifest["files"]}
    check_lease()
    _remove_stale(slot, set(sha256_by_name), folder.parent)
    damaged = list(sha256_by_name)
    for _ in range(_UPLOADS):
        for name in damaged:
            check_lease()
            insist(partial(slot.put, folder / name, name))
        damaged = [name for name in damaged if not _reads_back(slot, name, sha256_by_name[name], folder.parent)]
        if not damaged:
            break
        logger.warning("%s: %s read back differently from what was written", slot.uri, ", ".join(damaged))
    else:
        raise _differs(slot, damaged[0])
    manifest_path = folder / MANIFEST_NAME
    manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _put_manifest(slot, manifest_path, check_lease)
    insist(lambda: slot.delete(_UNLISTED))
    total_bytes = sum(file["bytes"] for file in manifest["files"])
    files = len(sha256_by_name) + 1
    fields = event("published", uri=slot.uri, files=files, size_bytes=total_bytes)
    logger.info("published %d files, %s, at %s", files, format_bytes(total_bytes), slot.uri, extra=fields)


def _remove_stale(slot: Store, names: set[str], scratch: Path) -> None:
    """Take the manifest of another run away, and then the files of others that this one doesn't replace.

    Which files may lie there while no manifest lists them is written down first: a kill can come at any moment.
    """
    replaced = insist(lambda: read_published(slot))
    listed = set() if replaced is None else {file["path"] for file in replaced["files"]}
    content = insist(lambda: slot.read(_UNLISTED))
    known = listed | _parse_names(content)
    with tempfile.NamedTemporaryFile("w", dir=scratch, encoding="utf-8") as file:
        file.write(json.dumps(sorted(known | names)) + "\n")
        file.flush()
        insist(lambda: slot.put(Path(file.name), _UNLISTED))
    if replaced is not None:
        insist(lambda: slot.delete(MANIFEST_NAME))
    for stale in sorted(known - names):
        insist(partial(slot.delete, stale))


def _parse_names(content: bytes | None) -> set[str]:
    try:
        return set() if content is None else set(_NAMES.validate_json(content))
    except ValidationError:
        return set()  # not ours: then nothing is known of such files


def _put_manifest(slot: Store, source: Path, check_lease: Callable[[], None]) -> None:
    for _ in range(_UPLOADS):
        check_lease()
        insist(lambda: slot.put(source, MANIFEST_NAME))
        if insist(lambda: slot.read(MANIFEST_NAME)) == source.read_bytes():
            return
        insist(lambda: slot.delete(MANIFEST_NAME))
    raise _differs(slot, MANIFEST_NAME)


def _reads_back(slot: Store, name: str, sha256: str, scratch: Path) -> bool:
    # One file at a time, for the disk may not have room for a whole model once more.
    with tempfile.TemporaryDirectory(prefix="read-back-", dir=scratch) as folder:
        path = insist(lambda: _fetch_back(slot, name, Path(folder)))
        return path is not None and hash_file(path) == sha256


def _fetch_back(slot: Store, name: str, folder: Path) -> Path | None:
    files = [file for file in slot.find() if file.path == name]
    return slot.fetch(files, folder, lambda _: None)[0] if files else None


def _differs(slot: Store, name: str) -> UnavailableError:
    return UnavailableError(
        f"{_SETTING}={slot.uri}: {name} reads back differently from what was written, {_UPLOADS} times over",
        hint="the store, or what stands before it, damages what it is given: publish elsewhere, or start again",
    )
