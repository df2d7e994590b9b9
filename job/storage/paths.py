"""Names and files on a disk, for every store: globs, safe relative paths, atomic writes, and a disk's errors."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from job.errors import DataError, DeniedError, JobError, ResourcesError

TEMPORARY_PREFIX = ".sft-part-"
_FOLDER_TRIES = 10
_WILDCARD = re.compile(r"[*?\[]")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_PATH = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EILSEQ}


def is_pattern(path: str) -> bool:
    """Tell whether a path holds a wildcard."""
    return _WILDCARD.search(path) is not None


def literal_prefix(pattern: str) -> str:
    """Return what stands before the first wildcard: `data/2024-*.jsonl` -> `data/2024-`."""
    match = _WILDCARD.search(pattern)
    return pattern[: match.start()] if match else pattern


def pattern_folder(pattern: str) -> str:
    """Return the folder before the first component with a wildcard: `data/2024-*.jsonl` -> `data/`."""
    literal = literal_prefix(pattern)
    return literal[: literal.rfind("/") + 1]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Translate a glob: `*`, `?` and `[...]` stay within one path component, `**` crosses them."""
    items = re.findall(r"\*\*/|\*+|\?|\[[!^]?\]?[^\]/]*\]|.", pattern, re.DOTALL)
    return re.compile("".join(_translate(item) for item in items), re.DOTALL)


def _translate(item: str) -> str:
    if item == "**/":
        return "(?:[^/]+/)*"
    if item.startswith("**"):
        return ".*"
    if item == "*":
        return "[^/]*"
    if item == "?":
        return "[^/]"
    if item.startswith("[") and len(item) > 1:
        negated = item[1] in "!^"
        members = item[1 + negated : -1].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
        members = members.replace("^", "\\^").replace("&&", "&\\&").replace("||", "|\\|").replace("~~", "~\\~")
        return f"(?!/)[{'^' if negated else ''}{members}]"
    return re.escape(item)


def check_path(path: str, label: str) -> str:
    """Return a relative path that stays inside the folder it is joined to, or raise DataError."""
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise DataError(
            f"{label}: {path!r} can't be the name of a file below a folder",
            hint="rename it: no empty, '.' or '..' components, no leading or trailing slash",
        )
    return path


def disk_error(error: OSError, folder: Path, label: str) -> JobError:
    """Return what a disk's refusal means: ResourcesError when full, DeniedError, or DataError for a bad name."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _REFUSED:
        return DeniedError(
            f"{label}: may not write in {folder} ({reason})", hint="name a folder that the job's user may write to"
        )
    if error.errno in _NOT_A_PATH:
        return DataError(
            f"{label}: can't be written below {folder} ({reason})",
            hint="one name is both a file and a folder, or is too long: rename it in the store",
        )
    if error.errno in _FULL:
        return ResourcesError(
            f"{label}: no space left in {folder} ({reason})", hint="give the folder a larger disk, or free space"
        )
    return ResourcesError(f"{label}: can't write in {folder} ({reason})", hint="check the disk")


@contextmanager
def disk_errors(folder: Path, label: str) -> Iterator[None]:
    """Turn every OSError into what `disk_error` makes of it."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, folder, label) from error


@contextmanager
def atomic_file(target: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside the target, which becomes the target when all went well and vanishes if not.

    Makes the folders. Raises FileExistsError where there is a target that it may not replace.
    """
    temporary = target.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with _open_new(temporary) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            temporary.replace(target)
        else:
            _rename_unless_there(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _rename_unless_there(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, as many network shares are
        target.open("xb").close()
        source.replace(target)
    else:
        source.unlink()


def _open_new(path: Path) -> BinaryIO:
    for _ in range(_FOLDER_TRIES):
        # Another job may remove the folder, empty as it is, between any two of these calls, and within mkdir.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut, unless another job has removed it with the last of them."""
    with contextlib.suppress(FileNotFoundError):
        sync(folder)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
