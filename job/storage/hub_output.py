"""A repository on the Hugging Face Hub as a run's slot: everything arrives in one commit, on a branch or as a pull
request, so nothing partial is ever visible there.

The Hub has no place for what changes while a run goes on: lease and checkpoints are kept elsewhere.
"""

import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from job.errors import ConfigError, DamagedError, NotFoundError, UnavailableError
from job.log import format_bytes, logger
from job.storage import Head
from job.storage.hub_errors import WRITE_HINT, UnreadableError
from job.storage.hub_repository import HubRepository, etag_of
from job.storage.hub_rights import require_creating, require_pull_requests, require_token, require_writing
from job.storage.transfer import Task, run_tasks

_MAIN = "main"


class HubSlot:
    """`hf://org/name[@branch]`, where a run is published by `commit`.

    A repository that isn't there is created, `private` or not, and a branch made from main. With `pull_request`, the
    commit is one to merge into main; `run_id` in its title tells it from others'. `license_name` is the model card's.
    """

    takes_commits: Literal[True] = True

    def __init__(
        self, uri: str, *, setting: str, run_id: str, private: bool, pull_request: bool, license_name: str | None
    ) -> None:
        self.uri = uri
        self._repository = HubRepository(uri, setting=setting, hint=WRITE_HINT)
        if self._repository.path or self._repository.repo_type != "model":
            raise ConfigError(
                f"{self._repository.label}: the output is a whole repository of a model", hint="write hf://org/name"
            )
        self._run_id = run_id
        self._private = private
        self._pull_request = pull_request
        self._license = license_name
        self._branch = self._repository.revision or _MAIN
        disable_progress_bars()

    def check_writable(self) -> None:
        """Prove that the token may publish here, without leaving anything.

        Raises DeniedError where it may not, and ConfigError for a revision that takes no commits, for no connection at
        all, and for a license that the Hub doesn't know.
        """
        label = self._repository.label
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"{label}: HF_HUB_OFFLINE is set, so nothing can be published", hint="unset it")
        require_token(self._repository)
        info = self._find(_MAIN)
        if info is None:
            require_creating(self._repository)
        elif self._pull_request:
            require_pull_requests(self._repository)
        else:
            require_writing(self._repository)
            self._require_branch()
        if info is not None and self._private and not info.private:
            logger.warning(
                "%s: the repository exists and is public, so everyone will see what is published there; "
                "SFT_OUTPUT__PRIVATE is for one that the job creates",
                label,
            )
        if self._license is not None:
            self._require_license(self._license)

    def make_room(self) -> None:
        """Create the repository and the branch, where there is none.

        Raises DeniedError where the token may not.
        """
        if self._find(self._branch) is not None:
            return
        repository = self._repository
        if self._find(_MAIN) is None:
            with repository.errors():
                repository.api.create_repo(
                    repository.repo, repo_type=repository.repo_type, private=self._private, exist_ok=True
                )
            logger.info("created %s, %s", repository.base, "private" if self._private else "public")
        if self._branch != _MAIN:
            with repository.errors():
                repository.api.create_branch(
                    repository.repo, repo_type=repository.repo_type, branch=self._branch, revision=_MAIN, exist_ok=True
                )

    def look(self) -> Head:
        """Return what is to be replaced: the branch's newest commit, or that of this run's own pull request."""
        if self._pull_request:
            own = self._find_pull_request()
            if own is not None:
                return own
        info = self._find(self._branch)
        if info is None:
            return Head(self._branch, None, frozenset())
        if self._branch != _MAIN:
            main = self._find(_MAIN)
            if main is not None and main.sha == info.sha:
                # Nothing was committed to the branch since it was made: what is there is main's.
                return Head(self._branch, info.sha, _names(info), is_fresh=True)
        return Head(self._branch, info.sha, _names(info))

    def read_at(self, head: Head, path: str) -> bytes | None:
        """Return a small file as it was when `look` looked, or None where there was none."""
        if head.commit is None or path not in head.names:
            return None
        return self._repository.read(head.commit, path)

    def read(self, path: str) -> bytes | None:
        """Return a small file of the slot, or None where there is none; a branch that is no more than main's holds
        none of its own."""
        head = self.look()
        return None if head.is_fresh else self.read_at(head, path)

    def commit(self, head: Head, folder: Path, names: Sequence[str], stale: Sequence[str], message: str) -> Head:
        """Add files of a folder, and delete the stale ones, in one commit on top of what `look` saw; return what is
        there then.

        Raises UnavailableError when somebody else has committed meanwhile, and where it isn't known whether the commit
        was made: `look` tells. What makes this no place to publish is what `check_writable` raises.
        """
        if head.commit is None:
            raise UnavailableError(f"{self._repository.label}: no such repository or branch yet", hint="start again")
        size_bytes = sum((folder / name).stat().st_size for name in names)
        logger.info("uploading %d files, %s, to %s", len(names), format_bytes(size_bytes), self.uri)
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
        opens = self._pull_request and head.revision == _MAIN
        info = self._send([*additions, *deletions], head, message, create_pr=opens)
        revision = head.revision if not opens else str(info.pr_revision)
        logger.info("committed to %s", info.pr_url if opens else self.uri)
        return Head(revision, info.oid, (head.names | set(names)) - set(stale))

    def withdraw(self, head: Head, names: Sequence[str], message: str) -> None:
        """Delete files again, of what `commit` returned, by another commit."""
        there = [name for name in names if name in head.names]
        self._send([CommitOperationDelete(name, is_folder=False) for name in there], head, message, create_pr=False)

    def find_damaged(self, head: Head, sha256_by_name: Mapping[str, str], scratch: Path) -> list[str]:
        """Download the files of a commit, one after the other for the disk's sake; return those that are missing or not
        what they should be.

        Raises UnavailableError where the commit can't be seen yet.
        """
        try:
            info = self._repository.info(head.commit)
            etags = {sibling.rfilename: etag_of(sibling) for sibling in info.siblings or []}
            return [
                name
                for name, sha256 in sha256_by_name.items()
                if name not in etags or not self._reads_back(str(info.sha), name, etags[name], sha256, scratch)
            ]
        except NotFoundError as error:
            raise UnavailableError(f"{error.message}, though it was just committed", hint="start again") from error

    def _reads_back(self, commit: str, name: str, etag: str, sha256: str, scratch: Path) -> bool:
        if len(etag) == len(sha256) and etag != sha256:
            return False
        with tempfile.TemporaryDirectory(prefix="read-back-", dir=scratch) as folder:
            try:
                return _hash(self._repository.download(name, commit, etag, cache=Path(folder))) == sha256
            except DamagedError:
                return False

    def _find(self, revision: str) -> ModelInfo | DatasetInfo | None:
        try:
            return self._repository.info(revision)
        except NotFoundError:
            return None

    def _find_pull_request(self) -> Head | None:
        """Return the newest state of this run's own pull request, if one is open."""
        repository = self._repository
        with repository.errors():
            try:
                discussions = list(
                    repository.api.get_repo_discussions(
                        repository.repo, repo_type=repository.repo_type, discussion_type="pull_request"
                    )
                )
            except HfHubHTTPError as error:
                if error.response.status_code in (401, 404):  # no such repository
                    return None
                raise
        for found in discussions:
            if found.is_pull_request and found.status in ("open", "draft") and self._run_id in found.title.split():
                revision = f"refs/pr/{found.num}"
                info = repository.info(revision)
                return Head(revision, info.sha, _names(info))
        return None

    def _require_branch(self) -> None:
        repository = self._repository
        if self._branch.startswith("refs/pr/"):
            repository.info(self._branch)
        if self._branch == _MAIN or self._branch.startswith("refs/pr/"):
            return
        with repository.errors():
            refs = repository.api.list_repo_refs(repository.repo, repo_type=repository.repo_type)
        is_tag = any(tag.name == self._branch for tag in refs.tags)
        if is_tag or constants.REGEX_COMMIT_OID.fullmatch(self._branch):
            raise ConfigError(
                f"{repository.label}: {self._branch} is a {'tag' if is_tag else 'commit'}, which takes no new commits",
                hint="name a branch, which may be a new one",
            )

    def _require_license(self, name: str) -> None:
        """Ask the Hub, which refuses a model card with an unknown license."""
        # By hand, for before version 2 the library asks huggingface.co, whatever HF_ENDPOINT is.
        card = {"repoType": "model", "content": f"---\nlicense: {name}\n---\n"}
        with self._repository.errors():
            answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=card)
            if answer.status_code != HTTPStatus.BAD_REQUEST:
                hf_raise_for_status(answer)
                return
        raise ConfigError(
            f"SFT_OUTPUT__LICENSE={name}: not a license that the Hub knows",
            hint="use an identifier of https://huggingface.co/docs/hub/repositories-licenses, or other",
        )

    def _send(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        head: Head,
        message: str,
        *,
        create_pr: bool,
    ) -> CommitInfo:
        repository, made = self._repository, []

        def send() -> list[Task]:
            try:
                with repository.errors():
                    info = repository.api.create_commit(
                        repository.repo,
                        operations,
                        commit_message=message,
                        repo_type=repository.repo_type,
                        revision=head.revision,
                        create_pr=create_pr,
                        parent_commit=head.commit,
                    )
            except UnreadableError as error:  # the library reads some answers before it looks whether they are errors
                raise UnavailableError(error.message, hint=error.hint) from None
            made.append(info)
            return []

        # On another thread, so that a signal ends the wait for an upload at once.
        run_tasks([send], threading.Event())
        return made[0]


def _names(info: ModelInfo | DatasetInfo) -> frozenset[str]:
    return frozenset(sibling.rfilename for sibling in info.siblings or [])


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
