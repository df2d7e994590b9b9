"""The GitHub workflow that trains: the parts of it that are shell scripts are run, and all are linted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "train.yml").read_text())
JOBS = WORKFLOW["jobs"]
SCRIPTS = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two commits, of which the second changes runs/b.yaml, adds runs/c.yaml and deletes a run."""
    folder = tmp_path / "repository"
    (folder / "runs" / "deep").mkdir(parents=True)
    for name in ("a", "b", "gone"):
        (folder / "runs" / f"{name}.yaml").write_text("old")
    git(folder, "init")
    git(folder, "add", "--all")
    git(folder, "commit", "--message", "one")
    (folder / "runs" / "b.yaml").write_text("new")
    (folder / "runs" / "c d.yaml").write_text("new")
    (folder / "runs" / "deep" / "e.yaml").write_text("new")
    (folder / "README").write_text("new")
    (folder / "runs" / "gone.yaml").unlink()
    git(folder, "add", "--all")
    git(folder, "commit", "--message", "two")
    return folder


def find(repository: Path, **environment: str) -> list[str]:
    """Return the files that the workflow's first job finds."""
    output = repository.parent / "output"
    [script] = [step["run"] for step in JOBS["find"]["steps"] if step.get("id") == "find"]
    given = {"CHOSEN": "", "BEFORE": "", "GITHUB_OUTPUT": str(output)} | environment
    subprocess.run(["bash", "-e", "-c", script], cwd=repository, env=os.environ | given, check=True)
    name, _, value = output.read_text().strip().partition("=")
    assert name == "files"
    files: list[str] = json.loads(value)
    return files


def test_the_files_that_a_push_changed_are_found(repository: Path) -> None:
    assert find(repository, BEFORE=git(repository, "rev-parse", "HEAD^")) == ["runs/b.yaml", "runs/c d.yaml"]


def test_a_push_of_other_files_finds_none(repository: Path) -> None:
    assert find(repository, BEFORE=git(repository, "rev-parse", "HEAD")) == []


@pytest.mark.parametrize("before", ["", "0" * 40])
def test_of_an_unknown_past_every_file_counts(repository: Path, before: str) -> None:
    assert find(repository, BEFORE=before) == ["runs/a.yaml", "runs/b.yaml", "runs/c d.yaml"]


def test_a_chosen_file_is_taken_as_it_is(repository: Path) -> None:
    assert find(repository, CHOSEN="runs/$(touch x)`.yaml") == ["runs/$(touch x)`.yaml"]
    assert not (repository / "x").exists()


def test_nothing_of_an_event_is_pasted_into_a_script() -> None:
    assert not any("${{" in script for script in SCRIPTS)


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_shellcheck_finds_nothing(number: int) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), "--shell=bash", "-"], input=SCRIPTS[number], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_starts_on_its_own_only_for_a_folder_that_users_make() -> None:
    events: dict[str, Any] = WORKFLOW[True]  # `on` is YAML's other word for true
    assert events.keys() == {"push", "workflow_dispatch"}
    assert events["push"]["paths"] == ["runs/*.yaml"]
    assert not (ROOT / "runs").exists()


def test_what_it_calls_is_there_and_replaces_its_shell() -> None:
    train = SCRIPTS[-1]
    assert "\nexec charts/train.sh " in train
    assert os.access(ROOT / "charts" / "train.sh", os.X_OK)
