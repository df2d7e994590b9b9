"""The Hub as a run's slot: the real huggingface_hub against a stand-in, in a process (HF_ENDPOINT is read at import).

Each program opens the slot of a run, does one thing there and prints what came of it; what the stand-in holds then is
looked at from this side.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hub_stand_in import OWNER, HubStandIn
from huggingface_hub.errors import HfHubHTTPError

from job.errors import UnavailableError
from job.storage.hub_errors import describe_hub_error

ROOT = Path(__file__).parents[2]
SETTING = "SFT_OUTPUT__URI"
TOKEN = "hf_secretsecretsecret"
PROGRAM = """
import json, sys
from pathlib import Path
import job.patience
from job.commit import publish_in_one_commit
from job.errors import JobError
from job.manifest import hash_file
from job.storage.hub_output import HubSlot


def act(wish):
    job.patience.FIRST_PAUSE_S, job.patience.PATIENCE_S = 0.02, wish["patience_s"]
    options = {"run_id": "0123456789abcdef", "private": True, "pull_request": False, "license_name": None}
    options |= wish.get("options", {})
    slot = HubSlot(wish["uri"], setting="SFT_OUTPUT__URI", **options)

    def complete(here):
        files = sorted(path for path in here.rglob("*") if path.is_file())
        listed = [{"path": str(path.relative_to(here)), "sha256": hash_file(path), "bytes": 1} for path in files]
        base = {"id": "org/base"}
        return {"run_id": options["run_id"], "base_model": base, "files": listed, "start": wish.get("start")}

    if wish["act"] == "check":
        slot.check_writable()
    elif wish["act"] == "read":
        content = slot.read("manifest.json")
        return {"run_id": None if content is None else json.loads(content)["run_id"]}
    else:
        publish_in_one_commit(
            slot,
            Path(wish["folder"]),
            complete,
            run_id=options["run_id"],
            overwrite=wish.get("overwrite", False),
            check_lease=lambda: None,
        )
    return {}


for line in sys.stdin:
    try:
        answer = act(json.loads(line))
    except JobError as error:
        code = error.exit_code.code
        answer = {"error": type(error).__name__, "code": code, "message": error.message, "hint": error.hint}
    print(json.dumps(answer), flush=True)
"""
RUN = "0123456789abcdef"
WEIGHTS = os.urandom(50_000)
ADAPTER = {
    "adapter_model.safetensors": WEIGHTS,
    "adapter_config.json": b"{}",
    "README.md": b"# card\n",
    "a/b.txt": b"b",
}


class Publisher:
    """A process that acts on slots, one wish after the other."""

    def __init__(self, hub: HubStandIn, folder: Path, **environment: str) -> None:
        self.log = folder / "stderr"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        paths = {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env=clean | paths | hub.environment(folder / "cache") | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __call__(self, wish: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        assert TOKEN not in line + self.log.read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.communicate()


class Slot:
    """Wishes of one test, with files of its own."""

    def __init__(self, publisher: Publisher, folder: Path) -> None:
        self._publisher = publisher
        self._folders = (folder / f"adapter-{number}" for number in itertools.count())
        self._log_start = publisher.log.stat().st_size

    @property
    def log(self) -> str:
        return self._publisher.log.read_text()[self._log_start :]

    def __call__(
        self, act: str, uri: str, *, files: dict[str, bytes] | None = None, patience_s: float = 20, **wish: Any
    ) -> dict[str, Any]:
        folder = next(self._folders)
        for name, content in (ADAPTER if files is None else files).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self._publisher({"act": act, "uri": uri, "folder": str(folder), "patience_s": patience_s, **wish})


@pytest.fixture(scope="module")
def publisher(hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    process = Publisher(hub, tmp_path_factory.mktemp("publisher"))
    yield process
    process.close()


@pytest.fixture
def slot(hub: HubStandIn, publisher: Publisher, tmp_path: Path) -> Slot:
    hub.reset()
    hub.repositories.clear()
    hub.lfs.clear()
    return Slot(publisher, tmp_path)


def files_of(hub: HubStandIn, repo: str, revision: str = "main") -> dict[str, bytes]:
    """Return what lies there, without the repository's own first file."""
    return {name: blob.content for name, blob in hub.head(repo, revision).files.items() if name != ".gitattributes"}


def titles(hub: HubStandIn, repo: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.head(repo, revision).history()][::-1]


# -- a publication -----------------------------------------------------------------------------------------------------


def test_everything_comes_in_one_commit_into_a_private_repository(slot: Slot, hub: HubStandIn) -> None:
    assert slot("read", "hf://org/new") == {"run_id": None}
    assert hub.repositories == {}  # looking creates nothing
    assert slot("publish", "hf://org/new") == {}
    assert hub.repository("org/new").is_private
    assert titles(hub, "org/new") == ["initial commit", f"Run {RUN} of sft-job: LoRA adapter of base"]
    published = files_of(hub, "org/new")
    manifest = json.loads(published.pop("manifest.json"))
    assert published == ADAPTER
    assert {file["path"] for file in manifest["files"]} == ADAPTER.keys()
    assert hub.token_seen  # so that the check for it in the output can fail
    assert slot("read", "hf://org/new") == {"run_id": RUN}


def test_a_second_start_adds_nothing(slot: Slot, hub: HubStandIn) -> None:
    slot("publish", "hf://org/new", options={"private": False})
    assert not hub.repository("org/new").is_private
    before = hub.head("org/new").oid
    assert slot("publish", "hf://org/new", start=2) == {}
    assert hub.head("org/new").oid == before


def test_another_run_is_replaced_only_if_it_may_be(slot: Slot, hub: HubStandIn) -> None:
    slot("publish", "hf://org/new", files=ADAPTER | {"merged/model.safetensors": b"m"}, options={"run_id": "f" * 16})
    hub.add("models", "org/new", {"photo.png": b"the user's own"})
    before = hub.head("org/new").oid
    refused = slot("publish", "hf://org/new")
    assert (refused["code"], hub.head("org/new").oid) == (78, before)
    assert f"run {'f' * 16} is published there, and this is run {RUN}" in refused["message"]
    assert slot("publish", "hf://org/new", overwrite=True) == {}
    published = files_of(hub, "org/new")
    assert published.keys() == {*ADAPTER, "manifest.json", "photo.png"}
    assert json.loads(published["manifest.json"])["run_id"] == RUN
    assert hub.head("org/new").parent == hub.repository("org/new").find(before)  # deleted in the same commit


def test_a_branch_is_made_from_main(slot: Slot, hub: HubStandIn) -> None:
    slot("publish", "hf://org/new", files={**ADAPTER, "old.txt": b"old"}, options={"run_id": "f" * 16})
    main = hub.head("org/new").oid
    # Made by a start that was killed then: what is there is main's, so it is no other run's place.
    hub.repository("org/new").refs["v2"] = hub.head("org/new")
    assert slot("read", "hf://org/new@v2") == {"run_id": None}
    for branch in ("v2", "v3"):
        assert slot("publish", f"hf://org/new@{branch}") == {}
        assert files_of(hub, "org/new", branch).keys() == {*ADAPTER, "manifest.json"}
        assert slot("read", f"hf://org/new@{branch}") == {"run_id": RUN}
    assert hub.head("org/new").oid == main
    assert slot("publish", "hf://org/new@v2", options={"run_id": "e" * 16})["code"] == 78


def test_a_pull_request_is_opened_once(slot: Slot, hub: HubStandIn) -> None:
    hub.add("models", "org/theirs", {"README.md": b"theirs"})
    hub.read_only.add("org/theirs")  # whoever may read may propose
    options = {"pull_request": True}
    before = hub.head("org/theirs").oid
    for _ in range(12):
        hub.repository("org/theirs").add_pull_request("another's", hub.head("org/theirs"))  # more than a page of them
    assert slot("check", "hf://org/theirs", options=options) == {}
    assert slot("read", "hf://org/theirs", options=options) == {"run_id": None}
    assert slot("publish", "hf://org/theirs", options=options) == {}
    assert hub.head("org/theirs").oid == before
    assert files_of(hub, "org/theirs", "refs/pr/13").keys() == {*ADAPTER, "manifest.json"}
    assert slot("read", "hf://org/theirs", options=options) == {"run_id": RUN}
    assert slot("publish", "hf://org/theirs", options=options, start=2) == {}
    assert len(hub.repository("org/theirs").pull_requests) == 13


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull_request", [False, True])
@pytest.mark.parametrize(
    "fault", ["fail_next", "busy_next", "fail_card_next", "fail_commit_next", "lose_commit_next", "flip_next"]
)
def test_a_fault_is_repaired(slot: Slot, hub: HubStandIn, fault: str, pull_request: bool) -> None:
    hub.add("models", "org/new", {"x": b"x"})
    vars(hub)[fault] = 1
    assert slot("publish", "hf://org/new", options={"pull_request": pull_request}) == {}
    assert vars(hub)[fault] == 0
    assert len(hub.repository("org/new").pull_requests) == pull_request
    revision = "refs/pr/1" if pull_request else "main"
    assert titles(hub, "org/new", revision)[2:] == [f"Run {RUN} of sft-job: LoRA adapter of base"]
    assert files_of(hub, "org/new", revision).keys() == {*ADAPTER, "manifest.json", "x"}


def test_somebody_who_commits_in_between_is_noticed(slot: Slot, hub: HubStandIn) -> None:
    hub.add("models", "org/new", {"x": b"x"})
    hub.overtake_next = [{"x": b"theirs"}]
    assert slot("publish", "hf://org/new") == {}
    assert files_of(hub, "org/new")["x"] == b"theirs"
    assert "another writer was faster" in slot.log
    # Another run, published just then, is not replaced.
    manifest = {"run_id": "f" * 16, "files": []}
    hub.add("models", "org/other", {"x": b"x"})
    hub.overtake_next = [{"manifest.json": json.dumps(manifest).encode()}]
    assert slot("publish", "hf://org/other")["code"] == 78
    assert files_of(hub, "org/other").keys() == {"x", "manifest.json"}


@pytest.mark.parametrize("pull_request", [False, True])
def test_what_reads_back_damaged_is_withdrawn_and_committed_again(
    slot: Slot, hub: HubStandIn, pull_request: bool
) -> None:
    hub.damage_next = 1
    assert slot("publish", "hf://org/new", options={"pull_request": pull_request}) == {}
    revision = "refs/pr/1" if pull_request else "main"
    assert [title.split(":")[0] for title in titles(hub, "org/new", revision)[1:]] == [
        f"Run {RUN} of sft-job",
        f"Run {RUN} of sft-job withdrawn",
        f"Run {RUN} of sft-job",
    ]
    assert {name: files_of(hub, "org/new", revision)[name] for name in ADAPTER} == ADAPTER
    assert len(hub.repository("org/new").pull_requests) == pull_request


def test_what_is_always_damaged_is_not_published(slot: Slot, hub: HubStandIn) -> None:
    hub.damage_next = 1000
    ended = slot("publish", "hf://org/new", files={"a.txt": b"a"})
    assert ended["code"] == 69
    assert "reads back differently from what was written, 3 times over" in ended["message"]
    assert files_of(hub, "org/new") == {}
    assert len(titles(hub, "org/new")) == 1 + 2 * 3


def test_a_start_that_was_killed_before_it_read_back(slot: Slot, hub: HubStandIn) -> None:
    hub.damage_next = 1
    slot("publish", "hf://org/new")
    damaged = hub.head("org/new").parent.parent
    hub.repository("org/new").refs["main"] = damaged
    hub.lfs.clear()
    assert slot("publish", "hf://org/new", start=2) == {}
    assert {name: files_of(hub, "org/new")[name] for name in ADAPTER} == ADAPTER


def test_how_long_a_hub_that_limits_requests_asks_to_wait() -> None:
    for headers, wait_s in (
        ({"retry-after": "7"}, 7),
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, 0),
        ({}, 0),
    ):
        answer = cast(Any, SimpleNamespace(status_code=429, headers=headers, request=None))
        error = describe_hub_error(HfHubHTTPError("busy", response=answer), "label", "model", "hint")
        assert isinstance(error, UnavailableError)
        assert error.retry_after_s == wait_s


def test_a_hub_that_stays_away(slot: Slot, hub: HubStandIn) -> None:
    hub.fail_commit_next = 1000
    ended = slot("publish", "hf://org/new", patience_s=1)
    assert ended["code"] == 69
    assert f"{SETTING}=hf://org/new: the Hub can't answer now (HTTP 500" in ended["message"]
    assert files_of(hub, "org/new") == {}


def test_a_hub_without_the_storage_that_the_library_prefers(hub: HubStandIn, slot: Slot, tmp_path: Path) -> None:
    publisher = Publisher(hub, tmp_path, HF_HUB_DISABLE_XET="0")
    ended = Slot(publisher, tmp_path)("publish", "hf://org/new", patience_s=0)
    publisher.close()
    assert ended["code"] == 69
    assert "HF_HUB_DISABLE_XET=1" in ended["hint"]


# -- rights ------------------------------------------------------------------------------------------------------------


def fine_grained(name: str, *permissions: str, everywhere: tuple[str, ...] = ()) -> dict[str, Any]:
    scoped = [{"entity": {"type": "org", "name": name}, "permissions": list(permissions)}]
    token = {"role": "fineGrained", "fineGrained": {"global": list(everywhere), "scoped": scoped}}
    return OWNER | {"orgs": [], "auth": {"accessToken": token}}


READER = OWNER | {"auth": {"accessToken": {"role": "read"}}}


@pytest.mark.parametrize(
    ("uri", "who", "what"),
    [
        ("hf://org/new", OWNER, None),
        ("hf://camellia/new", OWNER, None),
        ("hf://Org/new", OWNER, None),
        ("hf://org/there", OWNER, None),
        ("hf://org/there@new-branch", OWNER, None),
        ("hf://org/there@v1", OWNER, (78, "v1 is a tag")),
        (f"hf://org/there@{'a' * 40}", OWNER, (78, "is a commit")),
        ("hf://org/there@refs/pr/1", OWNER, (66, "no such revision")),
        ("hf://readers/new", OWNER, (77, "the role in the organization readers is read")),
        ("hf://strangers/new", OWNER, (77, "camellia is no member of strangers")),
        ("hf://strangers/there", OWNER, (77, "HTTP 403")),
        ("hf://camellia/new", READER, (77, "may only read")),
        ("hf://org/new", fine_grained("org", "repo.content.read", "repo.write"), None),
        ("hf://org/new", fine_grained("org", "repo.content.read"), (77, "fine-grained")),
        ("hf://org/new", fine_grained("other", "repo.write"), (77, "fine-grained")),
        ("hf://org/new", {}, (77, "HTTP 401")),
    ],
)
def test_rights_are_proved_without_leaving_anything(
    slot: Slot, hub: HubStandIn, uri: str, who: dict[str, Any], what: tuple[int, str] | None
) -> None:
    hub.add("models", "org/there", {"x": b"x"})
    hub.add("models", "strangers/there", {"x": b"x"})
    hub.repository("org/there").tags["v1"] = hub.head("org/there")
    hub.read_only.add("strangers/there")
    hub.who = who
    before = {name: dict(stored.refs) for name, stored in hub.repositories.items()}
    answer = slot("check", uri)
    assert {name: stored.refs for name, stored in hub.repositories.items()} == before
    if what is None:
        assert answer == {}
    else:
        assert answer["code"] == what[0], answer
        assert what[1] in answer["message"]
        assert uri in answer["message"]
        assert answer["hint"]


@pytest.mark.parametrize(
    ("who", "code"),
    [
        (READER, 77),
        (fine_grained("org", "repo.content.read"), 77),
        (fine_grained("org", "repo.content.read", everywhere=("discussion.write",)), None),
    ],
)
def test_rights_to_propose(slot: Slot, hub: HubStandIn, who: dict[str, Any], code: int | None) -> None:
    hub.add("models", "org/there", {"x": b"x"})
    hub.who = who
    assert slot("check", "hf://org/there", options={"pull_request": True}).get("code") == code


def test_a_hub_that_does_not_say_what_a_token_may(slot: Slot, hub: HubStandIn) -> None:
    hub.add("models", "org/there", {"x": b"x"})
    hub.knows_write_check = False
    assert slot("check", "hf://org/there") == {}
    hub.who = READER
    assert slot("check", "hf://org/there")["code"] == 77


@pytest.mark.parametrize(
    ("environment", "code", "what"),
    [({"HF_TOKEN": ""}, 77, "needs a token"), ({"HF_HUB_OFFLINE": "1"}, 78, "HF_HUB_OFFLINE is set")],
)
def test_an_environment_without(
    hub: HubStandIn, tmp_path: Path, environment: dict[str, str], code: int, what: str
) -> None:
    publisher = Publisher(hub, tmp_path, **environment)
    answer = Slot(publisher, tmp_path)("check", "hf://org/new")
    publisher.close()
    assert answer["code"] == code
    assert what in answer["message"]
    assert answer["hint"]


def test_what_can_not_be_published_to(slot: Slot, hub: HubStandIn) -> None:
    assert slot("check", "hf://org/bad--name..")["code"] == 78
    hub.bad_licenses.add("apache")
    refused = slot("check", "hf://org/new", options={"license_name": "apache"})
    assert (refused["code"], "SFT_OUTPUT__LICENSE=apache" in refused["message"]) == (78, True)
    assert slot("check", "hf://org/new", options={"license_name": "apache-2.0"}) == {}


def test_a_repository_that_everyone_sees(slot: Slot, hub: HubStandIn) -> None:
    hub.add("models", "org/there", {"x": b"x"})
    assert slot("check", "hf://org/there") == {}
    assert slot.log.count("is public, so everyone will see") == 1
