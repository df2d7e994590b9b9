"""How train.jq reads the end of a run from what the cluster shows: which pod decided it, and what it is called."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import DONE, failed_outcome, pod, scene

CHARTS = Path(__file__).parents[2] / "charts"


def read_outcome(shown: Any) -> tuple[dict[str, Any], str]:
    """Return how a run ended, as train.jq reads it from what the cluster shows, and the summary of it."""
    text = json.dumps(shown["run"]) + json.dumps({"items": shown["pods"]})
    program = ["jq", "-L", str(CHARTS), "-s"]
    [outcome, summary] = json.loads(
        subprocess.run(
            [*program, 'include "train"; read_outcome | [., ([format_summary("demo")] | join("\n"))]'],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    return outcome, summary


def test_a_container_killed_for_memory_is_called_that() -> None:
    killed = pod("demo-0", code=137, reason="OOMKilled")
    outcome, summary = read_outcome(scene(killed, condition="Failed", reason="BackoffLimitExceeded"))
    assert (outcome["code"], outcome["name"]) == (137, "OOMKilled")
    assert "resources.limits.memory" in outcome["hint"]
    assert "### demo: failed, OOMKilled (137)" in summary
    assert "| Kubernetes says | BackoffLimitExceeded, OOMKilled |" in summary


def test_a_worker_killed_for_memory_leaves_the_word_to_the_job() -> None:
    told = pod("demo-0", code=71, reason="OOMKilled", outcome=failed_outcome(71, "resources"))
    outcome, _ = read_outcome(scene(told, condition="Failed", reason="PodFailurePolicy"))
    assert (outcome["code"], outcome["name"]) == (71, "resources")
    assert "resources.limits.memory" in outcome["hint"]
    assert "do this" in outcome["hint"]


@pytest.mark.parametrize("pods", [[], [pod("demo-0", code=75, outcome=failed_outcome(75, "preempted"))]])
def test_a_deadline_is_named_whether_or_not_a_pod_is_left(pods: list[Any]) -> None:
    outcome, summary = read_outcome(scene(*pods, condition="Failed", reason="DeadlineExceeded"))
    assert outcome["code"] == (75 if pods else 1)
    assert "DeadlineExceeded" in summary
    assert "activeDeadlineSeconds" in outcome["hint"]


@pytest.mark.parametrize("message", ["Traceback\nof something", '{"code": 0, "name": "ok", "message": "old"}'])
def test_a_message_that_is_not_this_ends_outcome_is_shown_as_it_is(message: str) -> None:
    crashed = pod("demo-0", code=1, message=message)
    outcome, summary = read_outcome(scene(crashed, condition="Failed", reason="BackoffLimitExceeded"))
    assert (outcome["code"], outcome["name"]) == (1, "BackoffLimitExceeded")
    assert "\n".join(f"> {line}" for line in message.splitlines()) in summary


def test_a_failed_run_is_no_success_although_a_pod_ended_well() -> None:
    ended = pod("demo-0", code=0, outcome=DONE)
    assert read_outcome(scene(ended, condition="Failed", reason="DeadlineExceeded"))[0]["code"] == 1


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_of_several_ends_that_which_decided_is_the_runs(kind: str) -> None:
    stopped = pod("demo-0", code=75, made=3, outcome=failed_outcome(75, "preempted"))
    away = pod("demo-1", code=69, made=1, outcome=failed_outcome(69, "unavailable"))
    wrong = pod("demo-2", code=65, made=2, outcome=failed_outcome(65, "data"))
    for pods, code in (([stopped, away, wrong], 65), ([stopped, away], 69), ([stopped], 75)):
        shown = scene(*pods, condition="Failed", reason="Why", kind=kind)
        shown["run"]["spec"]["podFailurePolicy"]["rules"][1] = {"action": "FailJob", "onExitCodes": {"values": [75]}}
        assert read_outcome(shown)[0]["code"] == code


def test_a_run_whose_pods_are_gone_is_still_done() -> None:
    outcome, summary = read_outcome(scene(condition="Complete"))
    assert (outcome["code"], outcome["name"]) == (0, "ok")
    assert "### demo: done" in summary


def test_the_summarys_table_holds_whatever_the_outcome_says() -> None:
    odd = DONE | {"output": "s3://a|b`c\\d", "message": "<b>first</b>\nsecond"}
    _, summary = read_outcome(scene(pod("demo-0", code=0, outcome=odd), condition="Complete"))
    assert "| adapter | s3://a\\|b\\`c\\\\d |" in summary
    assert "> &lt;b>first&lt;/b>\n> second\n" in summary
