"""Files on the Hugging Face Hub, for reading: the modules hub*.py are the only ones that import huggingface_hub.

A revision is resolved to its commit once, in `find`; everything is then downloaded at that commit, into the Hub's own
cache (HF_HOME), and verified against the git or LFS hash that the Hub lists.
"""

import threading
from functools import partial
from pathlib import Path

from huggingface_hub.hf_api import RepoSibling

from job.errors import NotFoundError
from job.storage import Arrived, Progress, StoredFile
from job.storage.hub_repository import Bar, HubRepository, etag_of
from job.storage.paths import compile_pattern, is_pattern, pattern_folder
from job.storage.transfer import Task, run_tasks


class HubStore:
    """`hf://org/name[@revision]`, a model, or `hf://datasets/org/name[@revision][/path or glob]`; for reading only."""

    def __init__(self, uri: str, *, setting: str) -> None:
        self.uri = uri
        self._repository = HubRepository(uri, setting=setting)

    def find(self) -> list[StoredFile]:
        """List the files at the commit that the revision names now; those whose name starts with a dot are left out."""
        repository = self._repository
        info = repository.info(repository.revision)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        chosen = _choose(list(siblings), repository.path)
        if not chosen:
            raise NotFoundError(
                f"{repository.label}: none of the repository's {len(siblings)} files is meant",
                hint="check the path or glob; '*' stays within one folder, '**' crosses folders",
            )
        place = f"{repository.base}@{info.sha}"
        files = [_describe(siblings[name], path, f"{place}/{name}") for name, path in chosen.items()]
        return sorted(files, key=lambda file: file.path)

    def fetch(
        self, files: list[StoredFile], folder: Path, progress: Progress, arrived: Arrived | None = None
    ) -> list[Path]:
        """Download the files at their commit into the Hub's cache, unless they are there, and return their paths."""
        stop = threading.Event()
        paths: dict[str, Path] = {}

        def fetch_one(file: StoredFile) -> list[Task]:
            commit, name = self._commit_and_name(file)
            bar = Bar(progress, stop)
            paths[file.uri] = self._repository.download(name, commit, file.etag, bar=bar, stop=stop)
            progress(file.size_bytes - bar.counted_bytes)  # a cached file was not counted
            return []

        run_tasks([partial(fetch_one, file) for file in files], stop)
        return [paths[file.uri] for file in files]

    def revision(self, files: list[StoredFile]) -> str:
        """Return the commit that the files were listed at."""
        commit, _ = self._commit_and_name(files[0])
        return commit

    def read(self, path: str) -> bytes | None:
        """Return a small file below the path, at the commit that the revision names now, or None where there is none.

        Raises NotFoundError where there is no such repository or revision.
        """
        folder = self._repository.path
        return self._repository.read(self._repository.revision, f"{folder}/{path}" if folder else path)

    def _commit_and_name(self, file: StoredFile) -> tuple[str, str]:
        commit, _, name = file.uri.removeprefix(f"{self._repository.base}@").partition("/")
        return commit, name


def _choose(names: list[str], wanted: str) -> dict[str, str]:
    """Return {name in the repository: path relative to the place that was opened}."""
    if wanted in names:
        return {wanted: wanted.rsplit("/", 1)[-1]}
    if is_pattern(wanted):
        folder = pattern_folder(wanted)
        pattern = compile_pattern(wanted)
        return {name: name.removeprefix(folder) for name in names if pattern.fullmatch(name)}
    folder = f"{wanted}/" if wanted else ""
    below = {name: name.removeprefix(folder) for name in names if name.startswith(folder)}
    return {name: path for name, path in below.items() if not any(part[0] == "." for part in path.split("/"))}


def _describe(sibling: RepoSibling, path: str, uri: str) -> StoredFile:
    return StoredFile(uri=uri, path=path, size_bytes=sibling.size or 0, etag=etag_of(sibling))
