"""charts/train.sh against stand-ins for helm and kubectl: how it reads each end of a run, and what it leaves behind."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_cluster import DONE, GONE, UNREACHABLE, FakeCluster, failed_outcome, pod, scene

CHARTS = Path(__file__).parents[2] / "charts"
COMPLETE = scene(pod("demo-0", code=0, outcome=DONE), condition="Complete")


class Ended(NamedTuple):
    code: int
    out: str
    said: str
    summary: str
    helm: list[str]
    calls: list[str]


Train = Callable[..., Ended]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run train.sh to its end against a cluster that plays these scenes."""

    def run(
        *scenes: Any, arguments: tuple[str, ...] = (), environment: dict[str, str] | None = None, **play: Any
    ) -> Ended:
        cluster = FakeCluster(tmp_path, list(scenes), **play)
        summary = tmp_path / "summary.md"
        where = {"GITHUB_STEP_SUMMARY": str(summary)} | (environment or {})
        with cluster.start(CHARTS, *arguments, **where) as process:
            out, said = process.communicate(timeout=60)
        text = summary.read_text() if summary.exists() else ""
        return Ended(process.returncode, out, said, text, cluster.helm_calls(), cluster.calls())

    return run


def test_a_run_is_checked_installed_followed_and_summarized(train: Train) -> None:
    ended = train(scene(), scene(pod("demo-0")), COMPLETE, logs={"demo-0": ["step 1/20", "no more"]})
    assert ended.code == 0, ended.said
    assert ended.helm == [
        "upgrade demo --dry-run",
        "upgrade demo-check",
        "uninstall demo-check",
        "upgrade demo",
    ]
    assert ended.calls[0].startswith("helm lint --strict")
    [check] = [call for call in ended.calls if call.startswith("helm upgrade --install demo-check")]
    assert check.endswith("--set mode=check,kind=Job,cron.schedule=")
    assert ended.out.splitlines() == ["the log of check-pod", "step 1/20"]  # each once
    for line in (
        "### sft-job demo: done",
        "> run 0123456789abcdef is published",
        "| adapter | s3://bucket/adapter |",
        "| run | 0123456789abcdef |",
        "| steps | 20 of 20 |",
        "| pod | demo-0 |",
    ):
        assert line in ended.summary.splitlines()
    assert "Kubernetes says" not in ended.summary


def test_json_lines_of_the_log_are_shown_as_text(train: Train) -> None:
    begun = {"time": "2026-01-02T03:04:05Z", "level": "info", "event": "step", "message": "step 1/20", "step": 1}
    failed = begun | {"level": "error", "message": "a bug", "traceback": "Traceback ...\nKeyError"}
    lines = [json.dumps(begun), json.dumps(failed), '{"no": "event"}', "[1, 2]", "{ plain  text"]
    ended = train(scene(), scene(pod("demo-0")), COMPLETE, logs={"demo-0": ["\n".join(lines)]})
    assert ended.code == 0, ended.said
    assert ended.out.splitlines()[1:] == [
        "03:04:05 step 1/20",
        "03:04:05 error: a bug ",
        "Traceback ...",
        "KeyError",
        '{"no": "event"}',
        "[1, 2]",
        "{ plain  text",
    ]


def test_values_that_helm_refuses_end_before_the_cluster_is_asked(train: Train) -> None:
    ended = train(COMPLETE, refusals={"lint": "at '/settings/lora': additional properties 'rr' not allowed"})
    assert ended.code == 78
    assert "additional properties 'rr' not allowed" in ended.said
    assert len(ended.calls) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("Error: execution error at (sft-job/templates/job.yaml:3:4): no output", 78),
        ("Error: values don't meet the specifications of the schema(s)", 78),
        ("Error: Kubernetes cluster unreachable", 1),
    ],
)
def test_what_helm_says_to_the_release_decides_the_code(train: Train, words: str, code: int) -> None:
    ended = train(COMPLETE, refusals={"upgrade": words})
    assert ended.code == code
    assert words in ended.said
    assert ended.helm == ["upgrade demo --dry-run"]


def test_what_the_preflight_finds_is_the_end_and_no_gpu_is_asked_for(train: Train) -> None:
    bad = pod("check-0", code=78, outcome=failed_outcome(78, "config"))
    ended = train(COMPLETE, check=[scene(bad, condition="Failed", reason="PodFailurePolicy")])
    assert ended.code == 78
    assert ended.helm == ["upgrade demo --dry-run", "upgrade demo-check", "uninstall demo-check"]
    assert "demo-check failed, config (78): what is wrong: config\ndo this" in ended.said
    assert "### sft-job demo-check: failed, config (78)" in ended.summary
    assert "> do this" in ended.summary


@pytest.mark.parametrize(("code", "name"), [(65, "data"), (69, "unavailable")])
def test_the_script_ends_with_the_jobs_own_code_and_reason(train: Train, code: int, name: str) -> None:
    ended = train(scene(pod("demo-0", code=code, outcome=failed_outcome(code, name)), condition="Failed", reason="Why"))
    assert ended.code == code
    assert f"demo failed, {name} ({code}): what is wrong: {name}" in ended.said
    assert f"### sft-job demo: failed, {name} ({code})" in ended.summary
    assert "| Kubernetes says | Why |" in ended.summary
    assert "uninstall demo" not in ended.helm  # its log and outcome can still be read


def test_restarts_are_followed_and_the_last_pod_tells_the_outcome(train: Train) -> None:
    stopped = pod("demo-a", code=75, outcome=failed_outcome(75, "preempted"))
    unavailable = pod("demo-b", code=69, made=1, outcome=failed_outcome(69, "unavailable"))
    ended = train(
        scene(pod("demo-a")),
        scene(stopped),
        scene(stopped, pod("demo-b", made=1)),
        scene(stopped, unavailable, pod("demo-c", made=2)),
        scene(stopped, unavailable, pod("demo-c", made=2, code=0, outcome=DONE), condition="Complete"),
    )
    assert ended.code == 0, ended.said
    assert ended.out.splitlines()[1:] == ["the log of demo-a", "the log of demo-b", "the log of demo-c"]
    assert "| pod | demo-c |" in ended.summary


def test_only_node_0_is_followed_and_the_one_that_failed_speaks_for_the_run(train: Train) -> None:
    told_to_stop = pod("demo-0", code=75, made=2, outcome=failed_outcome(75, "preempted"))
    wrong = pod("demo-1", code=65, made=1, index=1, outcome=failed_outcome(65, "data"))
    ended = train(scene(told_to_stop, wrong, condition="Failed", reason="PodFailurePolicy"))
    assert ended.code == 65
    assert "the log of demo-0" in ended.out
    assert "the log of demo-1" not in ended.out


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        (scene(pod("demo-0", unschedulable="0/3 nodes have nvidia.com/gpu")), "0/3 nodes have nvidia.com/gpu"),
        (scene(suspend=True), "suspended, as long as its queue says"),
    ],
)
def test_what_never_starts_is_given_up_and_uninstalled(train: Train, waiting: Any, reason: str) -> None:
    ended = train(waiting, environment={"TRAIN_START_MINUTES": "1"})
    assert ended.code == 1
    assert ended.said.count(f"waiting: {'Unschedulable: ' if 'nodes' in reason else ''}{reason}") == 1
    assert f"did not start within 1 minutes: {'Unschedulable: ' if 'nodes' in reason else ''}{reason}" in ended.said
    assert "no node has room" in ended.said  # the events
    assert ended.helm[-1] == "uninstall demo"
    assert "not started" in ended.summary


def test_a_container_that_can_not_be_started_is_given_up_sooner(train: Train) -> None:
    ended = train(scene(pod("demo-0", waiting="ImagePullBackOff")))
    assert ended.code == 1
    assert "could not start: ImagePullBackOff: see there" in ended.said
    assert ended.helm[-1] == "uninstall demo"


def test_a_queue_and_a_slow_image_are_waited_for(train: Train) -> None:
    ended = train(
        scene(suspend=True), scene(pod("demo-0", waiting="ContainerCreating")), scene(pod("demo-0")), COMPLETE
    )
    assert ended.code == 0, ended.said


def test_a_broken_connection_goes_on_from_where_it_broke(train: Train) -> None:
    running = scene(pod("demo-0"))
    ended = train(*[running] * 12, COMPLETE, logs={"demo-0": ["step 1/20 BROKEN", "step 2/20", "step 3/20"]})
    assert ended.code == 0, ended.said
    assert [line.strip() for line in ended.out.splitlines()][1:] == ["step 1/20", "step 2/20"]
    assert sum("--since-time" in call for call in ended.calls) == 1


def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(train: Train) -> None:
    ended = train(scene(pod("demo-0")), UNREACHABLE, UNREACHABLE, COMPLETE)
    assert ended.code == 0, ended.said


def test_a_cluster_out_of_reach_is_left_as_it_is(train: Train) -> None:
    ended = train(scene(pod("demo-0")), UNREACHABLE)
    assert ended.code == 1
    assert "out of reach" in ended.said
    assert "uninstall demo" not in ended.helm


def test_a_run_that_somebody_deletes_is_an_error(train: Train) -> None:
    ended = train(scene(pod("demo-0")), GONE)
    assert ended.code == 1
    assert "Job demo-1234abcd was deleted while it was followed" in ended.said


def test_a_run_that_failed_earlier_is_started_again(train: Train) -> None:
    before = scene(pod("old", code=69), condition="Failed", reason="BackoffLimitExceeded")
    ended = train(before, COMPLETE, installed="demo")
    assert ended.code == 0, ended.said
    deleted = ended.calls.index("kubectl delete Job demo-1234abcd --cascade=foreground")
    [installed] = [
        n
        for n, call in enumerate(ended.calls)
        if call.startswith("helm upgrade --install demo /") and "dry" not in call
    ]
    assert deleted < installed


def test_a_run_that_is_complete_is_left_as_it_is(train: Train) -> None:
    ended = train(COMPLETE, installed="demo")
    assert ended.code == 0, ended.said
    assert not any("delete" in call for call in ended.calls)


def test_a_schedule_is_installed_and_not_waited_for(train: Train) -> None:
    ended = train(scene(kind="CronJob"))
    assert ended.code == 0, ended.said
    assert "scheduled" in ended.said
    assert ended.helm[-1] == "upgrade demo"


def test_a_jobsets_pods_are_found_by_its_own_label(train: Train) -> None:
    done = scene(pod("demo-0", code=0, outcome=DONE), condition="Completed", kind="JobSet")
    ended = train(done)
    assert ended.code == 0, ended.said
    assert any("jobset.sigs.k8s.io/jobset-name=demo-1234abcd" in call for call in ended.calls)


@pytest.mark.parametrize(
    ("number", "code", "send"),
    [
        (signal.SIGTERM, 143, os.kill),
        (signal.SIGINT, 130, os.kill),
        (signal.SIGINT, 130, os.killpg),  # Ctrl-C in a terminal
    ],
)
def test_told_to_stop_it_uninstalls_so_that_the_job_saves_its_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int, send: Callable[[int, int], None]
) -> None:
    cluster = FakeCluster(tmp_path, [scene(pod("demo-0"))])
    with cluster.start(CHARTS) as process:
        deadline_s = time.monotonic() + 30
        while not (tmp_path / "demo-0.count").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        send(process.pid, number)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code, said
    assert cluster.helm_calls()[-1] == "uninstall demo"


def test_ctrl_c_is_for_the_script_and_for_none_of_its_commands(train: Train, tmp_path: Path) -> None:
    # A shell that runs a command leaves SIGINT to it, and may lose it: so it runs none that could take one.
    train(scene(pod("demo-0")), COMPLETE)
    assert not (tmp_path / "interruptible").exists()


@pytest.mark.parametrize(
    "where",
    [("-n", "team"), ("--namespace=team",)],
)
def test_the_namespace_reaches_every_command(train: Train, where: tuple[str, ...]) -> None:
    ended = train(COMPLETE, arguments=(*where, "--kube-context", "prod", "--set", "image.tag=1"))
    assert ended.code == 0, ended.said
    for call in ended.calls:
        assert "team" in call
        assert ("--kube-context prod" if call.startswith("helm") else "--context prod") in call
    assert all("--set image.tag=1" in call for call in ended.calls if call.startswith(("helm upgrade", "helm lint")))


def test_without_a_summary_file_it_goes_to_stdout(train: Train) -> None:
    ended = train(COMPLETE, environment={"GITHUB_STEP_SUMMARY": ""})
    assert "### sft-job demo: done" in ended.out


def test_what_the_log_shows_is_no_command_to_githubs_runner(train: Train) -> None:
    ended = train(COMPLETE, logs={"demo-0": ["::error::a row of the data"]}, environment={"GITHUB_ACTIONS": "true"})
    lines = ended.out.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert len(token) == 32
    assert lines.index("::error::a row of the data") < lines.index(f"::{token}::") == len(lines) - 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "usage: train.sh RELEASE VALUES.yaml"),
        (["demo", "none.yaml"], "none.yaml: there is no such file"),
        (["d" * 48, "none.yaml"], "the name may have 47 characters"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: list[str], reason: str) -> None:
    done = subprocess.run([str(CHARTS / "train.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr
