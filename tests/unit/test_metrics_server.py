"""What Prometheus is given for a run in each state, and that dashboard and README ask for nothing else."""

import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from job.handover import RunFolder
from job.metrics_server import serve_metrics
from job.outcome import Progress

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DASHBOARD = ROOT / "charts" / "sft-job" / "dashboards" / "sft-job.json"
STEP = {
    "step": 20,
    "epoch": 0.5,
    "loss": 1.5,
    "grad_norm": 0.5,
    "learning_rate": 1e-4,
    "tokens": 4000,
    "tokens_per_second": 400.0,
    "step_s": 0.5,
    "data_wait_s": 0.01,
    "elapsed_s": 10.0,
    "memory_bytes": 2**30,
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def scrape(progress: Progress, folder: RunFolder) -> dict[str, float]:
    """Return the job's own samples."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serve_metrics(port, progress, folder), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("sft_job_")}


def write(folder: RunFolder, *lines: dict[str, object]) -> None:
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_nothing_of_an_earlier_run_is_told_before_there_is_a_plan(folder: RunFolder) -> None:
    write(folder, STEP)
    assert scrape(Progress(), folder).keys() == {"sft_job_info", "sft_job_phase"}


def test_a_run_that_trains(folder: RunFolder) -> None:
    write(folder, STEP, {"step": 20, "eval_loss": 2.25})
    folder.eval_loss_base.write_text("3.5")
    progress = Progress(total_steps=80, checkpoint_step=16, checkpoint_s=time.time() - 100)
    found = scrape(progress, folder)
    assert 100 <= found.pop("sft_job_checkpoint_age_seconds") < 110
    assert found == {
        "sft_job_info": 1,
        "sft_job_phase": 1,
        "sft_job_planned_steps": 80,
        "sft_job_step": 20,
        "sft_job_epoch": 0.5,
        "sft_job_loss": 1.5,
        "sft_job_grad_norm": 0.5,
        "sft_job_learning_rate": 1e-4,
        "sft_job_tokens_total": 4000,
        "sft_job_tokens_per_second": 400,
        "sft_job_step_seconds": 0.5,
        "sft_job_data_wait_seconds": 0.01,
        "sft_job_train_seconds": 10,
        "sft_job_eta_seconds": 30,
        "sft_job_peak_memory_bytes": 2**30,
        "sft_job_eval_loss": 2.25,
        "sft_job_eval_loss_base": 3.5,
        "sft_job_checkpoint_step": 16,
    }


def test_a_loss_that_is_no_number_and_a_run_without_held_out_rows(folder: RunFolder) -> None:
    write(folder, STEP | {"loss": "nan"})
    folder.result.write_text('{"steps": 20}')
    found = scrape(Progress(total_steps=80), folder)
    assert found["sft_job_loss"] != found["sft_job_loss"]
    assert not [name for name in found if "eval" in name or "checkpoint" in name]


def test_the_held_out_loss_of_a_run_that_has_trained(folder: RunFolder) -> None:
    write(folder, STEP)
    folder.result.write_text('{"steps": 20, "eval_loss": 1.75}')
    assert scrape(Progress(total_steps=20), folder)["sft_job_eval_loss"] == 1.75


def test_dashboard_and_readme_name_what_there_is(folder: RunFolder) -> None:
    write(folder, STEP, {"step": 20, "eval_loss": 2.25})
    folder.eval_loss_base.write_text("3.5")
    served = scrape(Progress(total_steps=80, checkpoint_step=16, checkpoint_s=0.0), folder).keys()
    shown, explained = (set(re.findall(r"\bsft_job_\w+", page.read_text())) for page in (DASHBOARD, README))
    assert shown <= served
    assert explained == served


def test_every_panel_of_the_dashboard_has_a_query_and_a_place_of_its_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24  # Grafana's columns
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["expr"].startswith("sft_job_")
    assert len({panel["id"] for panel in panels}) == len(panels)
