"""Files go into a slot: every one read back and compared, the manifest last, so that its presence means that all it
lists is there and whole."""

import json
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from job.errors import UnavailableError
from job.log import event, format_bytes, logger
from job.manifest import MANIFEST_NAME, hash_file
from job.patience import insist
from job.phases import enter_phase
from job.slot import OUTPUT_SETTING, has_merged, is_already_published, read_published
from job.storage import Store

_UNLISTED = "checkpoint/unlisted.json"  # the names of files that may lie in the slot while no manifest lists them
_NAMES = TypeAdapter(list[str])
_UPLOADS = 3


def publish(
    slot: Store,
    folder: Path,
    names: Collection[str],
    complete: Callable[[Path], dict[str, Any]],
    *,
    run_id: str,
    later: Collection[str],
    overwrite: bool,
    check_lease: Callable[[], None],
) -> None:
    """Place the files `names` of a folder, then what `complete` adds to it (at most `later`), and then the manifest.

    `complete` is given a folder with what was read back, but for the merged model, and returns the manifest, unless it
    finds that this is not to be published. Where the slot is out of reach it waits for minutes, and what reads back
    differently is written again. Up to the last moment the slot has no manifest, so a publication that breaks off is
    none; its files are known to the next one, which removes those that it doesn't replace.

    Raises ConfigError when another run was published there since this one began, UnavailableError when a file reads
    back differently every time, and what `complete` raises, and `check_lease`, which is called before each write.
    """
    enter_phase("uploading")
    if insist(lambda: is_already_published(slot, run_id, overwrite=overwrite, merge=has_merged(names))):
        logger.warning("another start of this run was faster: it is published at %s", slot.uri)
        return
    check_lease()
    _remove_stale(slot, {*names, *later}, folder.parent)
    with tempfile.TemporaryDirectory(prefix="read-back-", dir=folder.parent) as kept:
        placed = _place(slot, folder, [name for name in names if name not in later], Path(kept), check_lease)
        manifest = complete(Path(kept))
        listed = {file["path"]: file["sha256"] for file in manifest["files"]}
        _place(slot, folder, [name for name in listed if listed[name] != placed.get(name)], Path(kept), check_lease)
    manifest_path = folder / MANIFEST_NAME
    enter_phase("uploading")
    manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _put_manifest(slot, manifest_path, check_lease)
    insist(lambda: slot.delete(_UNLISTED))
    total_bytes = sum(file["bytes"] for file in manifest["files"])
    fields = event("published", uri=slot.uri, files=len(listed) + 1, size_bytes=total_bytes)
    logger.info("published %d files, %s, at %s", len(listed) + 1, format_bytes(total_bytes), slot.uri, extra=fields)


def _place(
    slot: Store, folder: Path, names: Collection[str], kept: Path, check_lease: Callable[[], None]
) -> dict[str, str]:
    """Upload files and read them back, those that differ once more, into `kept`; return each one's sha256."""
    sha256_by_name = {name: hash_file(folder / name) for name in names}
    damaged = list(names)
    for _ in range(_UPLOADS):
        enter_phase("uploading")
        for name in damaged:
            check_lease()
            insist(partial(slot.put, folder / name, name))
        enter_phase("reading back")
        damaged = [name for name in damaged if not _reads_back(slot, name, sha256_by_name[name], kept)]
        if not damaged:
            return sha256_by_name
        logger.warning("%s: %s read back differently from what was written", slot.uri, ", ".join(damaged))
    raise _differs(slot, damaged[0])


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


def _reads_back(slot: Store, name: str, sha256: str, kept: Path) -> bool:
    path = insist(lambda: _fetch_back(slot, name, kept))
    if path is None or hash_file(path) != sha256:
        (kept / name).unlink(missing_ok=True)
        return False
    if has_merged([name]):  # the disk may not have room for a whole model once more
        (kept / name).unlink(missing_ok=True)
    elif path != kept / name:  # a store that doesn't fetch into the folder
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).symlink_to(path.resolve())
    return True


def _fetch_back(slot: Store, name: str, folder: Path) -> Path | None:
    files = [file for file in slot.find() if file.path == name]
    return slot.fetch(files, folder, lambda _: None)[0] if files else None


def _differs(slot: Store, name: str) -> UnavailableError:
    return UnavailableError(
        f"{OUTPUT_SETTING}={slot.uri}: {name} reads back differently from what was written, {_UPLOADS} times over",
        hint="the store, or what stands before it, damages what it is given: publish elsewhere, or start again",
    )
