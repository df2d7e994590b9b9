"""What Prometheus finds at SFT_RUNTIME__METRICS_PORT while a job runs, by the parser of its own client library."""

import socket
import urllib.request
from pathlib import Path

from job_cli import SHOP, job_environment, run_job
from prometheus_client.parser import text_string_to_metric_families
from running_job import RunningJob


def scrape(port: int) -> dict[str, float]:
    """Return the job's samples by name; a phase and a run by their label's value, too."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    plain = {sample.name: sample.value for sample in samples}
    return plain | {value: sample.value for sample in samples for value in sample.labels.values()}


def test_metrics_are_there_while_it_trains_and_rise(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        TRAIN__MAX_STEPS=10_000,
        TRAIN__LOGGING_STEPS=1,
        RUNTIME__METRICS_PORT=port,
    )
    with RunningJob(environment) as job:
        job.wait_for("== tokenizing")
        early = scrape(port)
        assert "sft_job_step" not in early
        job.wait_for("step 2/")
        seen = [scrape(port)]
        job.wait_for(f"step {int(seen[0]['sft_job_step']) + 3}/")
        seen.append(scrape(port))
        job.process.terminate()
        job.process.wait(timeout=60)
    for name in ("sft_job_step", "sft_job_epoch", "sft_job_tokens_total", "sft_job_train_seconds"):
        assert 0 < seen[0][name] < seen[1][name]
    assert seen[1]["sft_job_planned_steps"] == 10_000
    assert (early["tokenizing"], seen[1]["training"]) == (1, 1)
    assert seen[1]["sft_job_loss"] > 0
    assert seen[1]["process_resident_memory_bytes"] > 1e6


def test_a_port_that_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_job(
            job_environment(
                tmp_path,
                MODEL__ID=tiny_model,
                DATA__URI=SHOP / "train.jsonl",
                OUTPUT__URI=tmp_path / "slot",
                RUNTIME__METRICS_PORT=port,
            )
        )
    assert ended.code == 78
    assert ended.outcome["message"] == f"SFT_RUNTIME__METRICS_PORT={port}: Address already in use"
