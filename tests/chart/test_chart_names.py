"""One release is one run: its name changes with what it runs, and with nothing else, and is never too long."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helm_chart import CHART, HELMS, Object, job_spec, of_kind, only, render, run_of, values_with

LONG = "a-release-with-a-name-of-53-characters-as-long-as-any"
LABEL_LIMIT = 63  # of a host name, and of the label by which a Job's pods are found
CRON_JOB_LIMIT = 52  # a CronJob's runs are named after it, with eleven characters more
LAST_INDEX = 1023

CHANGES: list[dict[str, Any]] = [
    {"settings": {"lora": {"r": 8}}},
    {"settings": {"train": {"learning_rate": 0.00002}}},
    {"settings": {"parallel": {"nodes": 2}}},
    {"settings": {"quantization": "nf4"}},
    {"mode": "check"},
    {"image": {"tag": "0.2.0"}},
    {"gpu": {"count": 2}},
    {"env": {"AWS_REGION": "eu-central-1"}},
    {"existingSecret": "s3"},
    {"backoffLimit": 7},
    {"activeDeadlineSeconds": 3600},
    {"terminationGracePeriodSeconds": 300},
    {"resources": {"requests": {"cpu": "8"}}},
    {"podAnnotations": {"a": "b"}},
    {"kueue": {"queueName": "team-a"}},
    {"ttlSecondsAfterFinished": 0},
]


def name_of(found: Object) -> str:
    name: str = found["metadata"]["name"]
    return name


def run_name(values: dict[str, Any] | None = None, **how: Any) -> str:
    return name_of(run_of(render(values or values_with(), **how)))


def test_the_same_values_make_the_same_run_by_either_helm() -> None:
    assert len({run_name(program=helm()) for helm in HELMS.values()} | {run_name()}) == 1


def test_what_changes_the_run_changes_its_name() -> None:
    names = [run_name(), *(run_name(values_with(**change)) for change in CHANGES)]
    assert len(set(names)) == len(names)
    assert len({name.rsplit("-", 1)[0] for name in names}) == 1


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_a_new_version_of_the_chart_alone_changes_nothing_of_the_run(tmp_path: Path, kind: str) -> None:
    newer = shutil.copytree(CHART, tmp_path / "sft-job")
    about = (newer / "Chart.yaml").read_text()
    assert "\nversion: 0.1.0\n" in about
    (newer / "Chart.yaml").write_text(about.replace("\nversion: 0.1.0\n", "\nversion: 0.9.9\n"))
    values = values_with(kind=kind)
    before, after = run_of(render(values)), run_of(render(values, chart=newer))
    assert name_of(before) == name_of(after)
    assert before["spec"] == after["spec"]
    assert before["metadata"]["labels"] != after["metadata"]["labels"]  # else this test compares the chart with itself


def test_notes_on_the_run_leave_it_alone() -> None:
    changes: list[dict[str, Any]] = [{"annotations": {"a": "b"}}, {"labels": {"a": "b"}}]
    assert {run_name(values_with(**change)) for change in changes} == {run_name()}


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"parallel": {"nodes": 1024}}},
        {"kind": "JobSet", "settings": {"parallel": {"nodes": 1024}}},
        {"cron": {"schedule": "0 3 * * 0"}, "settings": {"output": {"overwrite": True}}},
        {"workDir": {"type": "pvc"}, "modelCache": {"type": "pvc"}},
    ],
    ids=["many nodes", "JobSet", "CronJob", "claims"],
)
@pytest.mark.parametrize("naming", [{}, {"nameOverride": "n" * 40}, {"fullnameOverride": "f" * 40}])
def test_names_stay_within_kubernetes_limits(changes: dict[str, Any], naming: dict[str, Any]) -> None:
    assert len(LONG) == 53
    objects = render(values_with(**changes, **naming), release=LONG)
    assert all(len(name_of(found)) <= LABEL_LIMIT for found in objects)
    assert all(len(name_of(found)) <= CRON_JOB_LIMIT for found in of_kind(objects, "CronJob"))
    for found in objects:
        assert all(len(str(value)) <= LABEL_LIMIT for value in found["metadata"].get("labels", {}).values())
    run = run_of(objects)
    within = f"-{run['spec']['replicatedJobs'][0]['name']}-0" if run["kind"] == "JobSet" else ""
    host = f"{name_of(run)}{within}-{LAST_INDEX}"
    assert run["kind"] == "CronJob" or len(host) <= LABEL_LIMIT


def test_releases_whose_names_begin_alike_do_not_meet() -> None:
    values = values_with(settings={"parallel": {"nodes": 2}})
    one, other = (render(values, release=LONG[:-1] + last) for last in "xy")
    assert name_of(only(one, "Service")) != name_of(only(other, "Service"))
    assert only(one, "Service")["spec"]["selector"] != only(other, "Service")["spec"]["selector"]
    assert job_spec(only(one, "Job"))["template"] != job_spec(only(other, "Job"))["template"]
