"""The Hub's read side: the real huggingface_hub against a stand-in, in subprocesses (HF_ENDPOINT is read at import)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn

from job.errors import ConfigError
from job.storage import open_store

SETTING = "SFT_DATA__URI"
TOKEN = "hf_secretsecretsecret"
PROGRAM = """
import json, sys
from pathlib import Path
from job.errors import JobError
from job.storage import open_store
count = []
try:
    store = open_store(sys.argv[1], setting="SFT_DATA__URI")
    files = store.find()
    paths = store.fetch(files, Path("unused"), count.append) if sys.argv[2] == "fetch" else []
    answer = {
        "files": [[file.path, file.size_bytes, file.etag] for file in files],
        "contents": [path.read_bytes().hex() for path in paths],
        "revision": store.revision(files),
        "counted": sum(count),
        "unused": Path("unused").exists(),
    }
except JobError as error:
    answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
print(json.dumps(answer))
"""
LFS = os.urandom(300_000)


class Caller:
    def __init__(self, hub: HubStandIn, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.stderr = ""

    def __call__(self, uri: str, act: str = "find", **environment: str) -> dict[str, Any]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_TOKEN": TOKEN}
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, uri, act],
            cwd=self.folder,
            env=clean | paths | self.hub.environment(self.folder / "cache") | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        assert TOKEN not in ran.stdout + ran.stderr
        self.stderr = ran.stderr
        answer: dict[str, Any] = json.loads(ran.stdout)
        return answer


@pytest.fixture
def call(hub: HubStandIn, tmp_path: Path) -> Caller:
    hub.reset()
    return Caller(hub, tmp_path)


@pytest.fixture(scope="module")
def model(hub: HubStandIn) -> str:
    """A model's commit."""
    files = {"config.json": b"{}", "model.safetensors": LFS, ".gitattributes": b"*"}
    return hub.add("models", "org/model", files)


@pytest.fixture(scope="module")
def rows(hub: HubStandIn) -> str:
    """A data set's commit."""
    return hub.add("datasets", "org/rows", {"README.md": b"#", "data/a.jsonl": b"a\n", "data/sub/b.jsonl": b"bb\n"})


def test_model(call: Caller, hub: HubStandIn, model: str) -> None:
    answer = call("hf://org/model", "fetch")
    assert [file[0] for file in answer["files"]] == ["config.json", "model.safetensors"]
    assert answer["contents"] == [b"{}".hex(), LFS.hex()]
    assert answer["revision"] == model
    assert answer["counted"] == 2 + len(LFS)
    assert not answer["unused"]
    assert hub.token_seen  # so that the check for it in the output can fail
    assert call.stderr == ""


def test_the_cache_serves_the_second_time(call: Caller, hub: HubStandIn, model: str) -> None:
    first = call("hf://org/model", "fetch")
    hub.requests.clear()
    assert call("hf://org/model", "fetch") == first
    assert [request for request in hub.requests if "/api/" not in request] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["README.md", "data/a.jsonl", "data/sub/b.jsonl"]),
        ("/data", ["a.jsonl", "sub/b.jsonl"]),
        ("/data/a.jsonl", ["a.jsonl"]),
        ("/data/*.jsonl", ["a.jsonl"]),
        ("/**/*.jsonl", ["data/a.jsonl", "data/sub/b.jsonl"]),
        ("@main/data/sub", ["b.jsonl"]),
    ],
)
def test_data_set(call: Caller, rows: str, path: str, expected: list[str]) -> None:
    answer = call(f"hf://datasets/org/rows{path}", "fetch")
    assert [file[0] for file in answer["files"]] == expected
    assert answer["revision"] == rows
    assert "unused" in answer


def test_a_revision_by_commit(call: Caller, rows: str) -> None:
    assert call(f"hf://datasets/org/rows@{rows}/data/a.jsonl", "fetch")["contents"] == [b"a\n".hex()]


@pytest.mark.parametrize(
    ("uri", "error", "what"),
    [
        ("hf://org/none", "NotFoundError", "no such model"),
        ("hf://datasets/org/model", "NotFoundError", "no such dataset"),
        ("hf://org/model@v9", "NotFoundError", "no such revision"),
        ("hf://datasets/org/rows/x/*.csv", "NotFoundError", "none of the repository's 4 files"),
        ("hf://org/bad--name..", "ConfigError", "not a possible name"),
    ],
)
@pytest.mark.usefixtures("model", "rows")
def test_errors(call: Caller, uri: str, error: str, what: str) -> None:
    answer = call(uri)
    assert answer["error"] == error
    assert f"{SETTING}={uri}" in answer["message"]
    assert what in answer["message"]
    assert answer["hint"]


def test_gated_is_refused_when_listed(call: Caller, hub: HubStandIn) -> None:
    hub.add("models", "org/gated", {"config.json": b"{}"})
    hub.repository("org/gated").is_gated = True
    answer = call("hf://org/gated")
    assert answer["error"] == "DeniedError"
    assert "HF_TOKEN" in answer["hint"]


@pytest.mark.parametrize("fault", ["fail_next", "flip_next", "cut_next"])
def test_a_fault_is_repaired(call: Caller, hub: HubStandIn, model: str, fault: str) -> None:
    vars(hub)[fault] = 1
    answer = call("hf://org/model/model.safetensors", "fetch")
    assert answer["contents"] == [LFS.hex()]
    assert answer["counted"] == len(LFS)
    assert vars(hub)[fault] == 0


def test_unreachable(call: Caller) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    answer = call("hf://org/model", HF_ENDPOINT=f"http://user:hunter2@127.0.0.1:{port}")
    assert answer["error"] == "UnavailableError"
    assert "127.0.0.1 can't be reached" in answer["message"]
    assert "hunter2" not in json.dumps(answer)


def test_offline(call: Caller) -> None:
    answer = call("hf://org/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "UnavailableError"
    assert "HF_HUB_OFFLINE" in answer["hint"]


@pytest.mark.parametrize("uri", ["hf://model", "hf://spaces/org/name", "hf://datasets/rows", "hf://"])
def test_malformed(uri: str) -> None:
    with pytest.raises(ConfigError, match="not a place on the Hub"):
        open_store(uri, setting=SETTING)
