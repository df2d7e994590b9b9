"""The memory that a run was planned with, and what it took, are in what it publishes and in its log."""

import json
import re
from pathlib import Path

import pytest
from job_cli import SHOP, job_environment, run_job


def test_the_estimate_and_the_peak_are_told(tiny_model: Path, tmp_path: Path) -> None:
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__MAX_LENGTH=64,
        DATA__TRUNCATION="keep_start",  # all rows are longer, so every micro batch is the largest
        OUTPUT__URI=tmp_path / "slot",
        PARALLEL__PROCESSES=2,
        TRAIN__GLOBAL_BATCH_SIZE=32,
        TRAIN__MICRO_BATCH_SIZE=16,
        TRAIN__LOSS="full",  # of chunks, the estimate counts whole ones, and few tokens are supervised here
        TRAIN__MAX_STEPS=2,
    )
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    manifest = json.loads((tmp_path / "slot" / "manifest.json").read_text())
    memory, peak = manifest["plan"]["memory"], manifest["metrics"]["peak_memory_bytes"]
    assert memory == json.loads((tmp_path / "slot" / "plan.json").read_text())["memory"]
    assert memory["logits_bytes"] > memory["weights_bytes"]  # two small layers under a vocabulary of 49k
    assert 0.9 < memory["total_bytes"] / peak < 1.25
    assert re.search(r"\n  total +\S+ GiB +of \S+ GiB\n", ended.output)
    (line,) = re.findall(r"peak memory of a process: \S+ GiB, \S+ GiB estimated .* \(([+-]\d+) %\)", ended.output)
    assert int(line) == pytest.approx(100 * (memory["total_bytes"] / peak - 1), abs=1)
