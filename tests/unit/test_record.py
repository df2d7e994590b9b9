"""One record of a run, and the manifest that is made of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from job.record import PAGES, RunRecord, list_files, make_manifest
from job.report.pages import write_pages

RecordFor = Callable[..., RunRecord]


def test_a_manifest_says_what_ran_and_lists_files_and_pages(record_for: RecordFor, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "adapter.bin").write_bytes(b"weights")
    record = record_for(changes={"files": list_files(tmp_path)})
    manifest = make_manifest(record, write_pages(record, tmp_path))
    digest = hashlib.sha256(b"weights").hexdigest()
    assert manifest["files"][-1] == {"path": "sub/adapter.bin", "sha256": digest, "bytes": 7}
    assert [file["path"] for file in manifest["files"]] == [*PAGES, "sub/adapter.bin"]
    for file in manifest["files"]:
        assert hashlib.sha256((tmp_path / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    assert manifest["base_model"] == {"id": "org/model", "revision": "abc123"}
    assert manifest["data"][0]["sha256"] == "5a" * 32
    assert manifest["settings"]["lora"]["r"] == 16
    assert manifest["packages"]["torch"] == "2.13.0"
    assert manifest["metrics"] == record.metrics


def test_a_manifest_has_the_proofs_and_the_doubts(record_for: RecordFor) -> None:
    manifest = json.loads(json.dumps(make_manifest(record_for(), [])))
    assert manifest["evaluation"]["change_high"] == -1.52
    assert manifest["acceptance"]["loss"] == 1.3391
    assert manifest["serving"]["engines"][0] == {"engine": "vLLM", "takes": True, "reason": ""}
    assert manifest["serving"]["vllm"].startswith("vllm serve")
    assert manifest["warnings"] == ["3 rows repeat another"]
    nothing = {"evaluation": None, "acceptance": None, "engines": [], "serve_command": None, "warnings": []}
    bare = make_manifest(record_for(changes=nothing), [])
    assert bare["evaluation"] is bare["acceptance"] is None
    assert bare["serving"] == {"engines": [], "vllm": None}
    assert bare.keys() == manifest.keys()
