"""A run goes to its slot in one commit, manifest and all, where the slot takes commits: on the Hub. What is there is
judged and replaced as one, for another writer makes the commit fail; only then can it be read back."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from job.errors import UnavailableError
from job.log import event, logger
from job.manifest import MANIFEST_NAME, hash_file
from job.patience import insist
from job.phases import enter_phase
from job.slot import OUTPUT_SETTING, has_merged, is_same_run, parse_manifest
from job.storage import CommitSlot, Head

_TRIES = 3


@dataclass(frozen=True)
class _Publication:
    """What is to be committed: files of a folder by name, the manifest among them with its content, and the sha256 of
    each."""

    folder: Path
    manifest: bytes
    sha256_by_name: Mapping[str, str]
    run_id: str
    message: str


def publish_in_one_commit(
    slot: CommitSlot,
    folder: Path,
    complete: Callable[[Path], dict[str, Any]],
    *,
    run_id: str,
    overwrite: bool,
    check_lease: Callable[[], None],
) -> None:
    """Commit the files of a folder that a manifest lists, and the manifest.

    `complete` is given the folder, adds what is missing there, and returns the manifest, unless it finds that this is
    not to be published. Where the slot is out of
    reach it waits for minutes; a commit whose answer was lost is looked for before it is made again. When the files
    read back differently, the commit's files are withdrawn by another one, and it is made anew.

    Raises ConfigError when another run was published there since this one began, UnavailableError when a file reads
    back differently every time, and what `complete` raises, and `check_lease`, which is called before each write.
    """
    publication = _lay_out(folder, complete(folder), run_id)
    for _ in range(_TRIES):
        enter_phase("uploading")
        head, sha256_by_name = insist(partial(_commit, slot, publication, overwrite=overwrite, check_lease=check_lease))
        enter_phase("reading back")
        damaged = insist(partial(slot.find_damaged, head, sha256_by_name, folder.parent))
        if not damaged:
            total_bytes = sum((folder / name).stat().st_size for name in sha256_by_name if name != MANIFEST_NAME)
            fields = event("published", uri=slot.uri, files=len(sha256_by_name), size_bytes=total_bytes)
            logger.info("published %d files at %s", len(sha256_by_name), slot.uri, extra=fields)
            return
        logger.warning("%s: %s read back differently from what was written", slot.uri, ", ".join(damaged))
        check_lease()
        insist(partial(_withdraw, slot, head, sorted({*sha256_by_name, MANIFEST_NAME}), run_id))
    raise UnavailableError(
        f"{OUTPUT_SETTING}={slot.uri}: {damaged[0]} reads back differently from what was written, {_TRIES} times over",
        hint="the Hub, or what stands before it, damages what it is given: publish elsewhere, or start again",
    )


def _lay_out(folder: Path, manifest: dict[str, Any], run_id: str) -> _Publication:
    content = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
    path = folder / MANIFEST_NAME
    path.write_bytes(content)
    message = f"Run {run_id} of sft-job: LoRA adapter of {Path(manifest['base_model']['id']).name}"
    return _Publication(folder, content, _list_sha256(manifest) | {MANIFEST_NAME: hash_file(path)}, run_id, message)


def _list_sha256(manifest: dict[str, Any]) -> dict[str, str]:
    return {file["path"]: file["sha256"] for file in manifest["files"]}


def _commit(
    slot: CommitSlot, publication: _Publication, *, overwrite: bool, check_lease: Callable[[], None]
) -> tuple[Head, Mapping[str, str]]:
    """Commit on top of what may be replaced; return what is there then, and the sha256 that its files must have.

    That may be the work of another start of this run, which may have been killed before it could read it back.
    """
    check_lease()
    slot.make_room()
    head = slot.look()
    found = slot.read_at(head, MANIFEST_NAME)
    if found == publication.manifest:
        logger.info("%s: the commit was made, only the answer was lost", slot.uri)
        return head, publication.sha256_by_name
    names = publication.sha256_by_name.keys()
    replaced = parse_manifest(found, slot.uri)
    if replaced is not None and not head.is_fresh:
        merge = has_merged(names)
        if is_same_run(replaced, slot.uri, publication.run_id, overwrite=overwrite, merge=merge):
            logger.warning("%s: another start of this run has published it", slot.uri)
            return head, _list_sha256(replaced)
    others = set() if replaced is None else _list_sha256(replaced).keys()
    stale = sorted((others - names) & head.names)
    return slot.commit(head, publication.folder, list(names), stale, publication.message), publication.sha256_by_name


def _withdraw(slot: CommitSlot, damaged: Head, names: Sequence[str], run_id: str) -> None:
    """Delete the files of a commit, unless that is done, or somebody else has replaced it."""
    head = slot.look()
    if head.commit == damaged.commit:
        slot.withdraw(head, names, f"Run {run_id} of sft-job withdrawn: it read back damaged")
