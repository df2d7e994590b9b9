"""A job that is watched while it runs: by Prometheus at SFT_RUNTIME__METRICS_PORT, read by the parsers of its own
client library, and on a terminal."""

import re
import socket
import sys
import urllib.request
from pathlib import Path

from job_cli import SHOP, job_environment, run_job
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from running_job import RunningJob

IN_TERMINAL = Path(__file__).parents[1] / "in_terminal.py"
COLUMNS = 40
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def fetch(port: int, accept: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith(accept.split(";", maxsplit=1)[0])
        text: str = answer.read().decode()
    return text


def scrape(port: int) -> dict[str, float]:
    """Return the job's samples by name; a phase and a run by their label's value, too."""
    families = list(text_string_to_metric_families(fetch(port, "text/plain")))
    for family in families:
        assert family.documentation, family.name
    # The stricter parser of the newer format refuses what Prometheus would: names twice, units, counters that fall.
    strict = {family.name for family in read_openmetrics(fetch(port, OPENMETRICS))}
    assert "sft_job_phase" in strict
    samples = [sample for family in families for sample in family.samples]
    plain = {sample.name: sample.value for sample in samples}
    return plain | {value: sample.value for sample in samples for value in sample.labels.values()}


def test_a_run_is_watched_by_prometheus_and_on_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        TRAIN__MAX_STEPS=10_000,
        TRAIN__LOGGING_STEPS=1,
        CHECKPOINT__EVERY_STEPS=2,
        RUNTIME__METRICS_PORT=port,
        RUNTIME__LOG_FORMAT="auto",
    )
    with RunningJob(environment, sys.executable, str(IN_TERMINAL), str(COLUMNS)) as job:
        job.wait_for("== tokenizing")
        early = scrape(port)
        assert "sft_job_step" not in early
        job.wait_for("checkpoint of step 2 is in the store")
        seen = [scrape(port)]
        job.wait_for(f"checkpoint of step {int(seen[0]['sft_job_checkpoint_step']) + 2} is in the store")
        job.wait_for(f"step {int(seen[0]['sft_job_step']) + 3}/")
        seen.append(scrape(port))
        job.process.terminate()
        job.process.wait(timeout=60)
    rising = ("sft_job_step", "sft_job_epoch", "sft_job_tokens_total", "sft_job_train_seconds")
    for name in (*rising, "sft_job_checkpoint_step"):
        assert 0 < seen[0][name] < seen[1][name], name
    assert seen[1]["sft_job_planned_steps"] == 10_000
    assert (early["tokenizing"], seen[1]["training"]) == (1, 1)
    now = seen[1]
    assert now["sft_job_loss"] > 0
    assert now["sft_job_eval_loss_base"] > 0
    assert now["process_resident_memory_bytes"] > 1e6
    assert now["sft_job_peak_memory_bytes"] > 1e8  # of the worker, which has torch
    assert 0 < now["sft_job_data_wait_seconds"] < now["sft_job_step_seconds"] < now["sft_job_eta_seconds"]
    assert now["sft_job_tokens_per_second"] > 0
    assert 0 <= now["sft_job_checkpoint_age_seconds"] < 60

    # A lone \r arrives here as a line break: each line, and each state of the progress line, is one of these.
    shown = [line.removeprefix("\x1b[2K") for line in job.output.splitlines() if line.startswith("\x1b[2K")]
    progress = [line for line in shown if re.match(r"step \d+/10000  loss \d", line)]
    assert len(progress) > 3
    assert all(len(line) == COLUMNS - 1 for line in progress), progress  # cut: there is more to say
    assert any(re.match(r"\d\d:\d\d:\d\d step \d+/10000  loss ", line) for line in shown)
    assert not any(line.startswith("{") for line in job.output.splitlines())
    ends = [line for line in job.output.splitlines() if "exit code 75" in line]
    assert len(ends) == 1


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
