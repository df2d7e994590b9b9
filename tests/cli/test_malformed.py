"""Malformed inputs through the command line: the right exit code, the place and the remedy, and never a traceback.

The inputs are in tests/malformed_inputs.py. One process checks them all; a few are checked again by `python -m job`.
"""

import json
import subprocess
import sys
from pathlib import Path

import malformed_inputs
import pytest
from bare_model import save_bare_model
from job_cli import TIMEOUT_S, Ended, job_environment, run_job
from malformed_inputs import ACCEPTED, CASES, Case

THROUGH_THE_REAL_COMMAND = ("line-cut-off", "parquet-cut-off", "template-escape-by-attribute", "missing-file")


def make_environment(case: Case, model: Path, folder: Path) -> dict[str, str]:
    """Write a case's files, and return the environment of its job."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content())
    settings = {
        "MODEL__ID": model,
        "MODEL__CHAT_TEMPLATE": "chatml",
        "DATA__URI": folder / next(iter(case.files)),
        "OUTPUT__URI": folder / "slot",
        **{name: value.replace("{folder}", str(folder)) for name, value in case.settings.items()},
    }
    return job_environment(folder, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokenizer loads ten times faster than one of usual size."""
    return save_bare_model(tmp_path_factory.mktemp("bare") / "model", tied=True)


@pytest.fixture(scope="module")
def endings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How the check of each case ended, by its name."""
    root = tmp_path_factory.mktemp("malformed")
    environments = {}
    for case in (*CASES, *ACCEPTED):
        (root / case.name).mkdir()
        environments[case.name] = make_environment(case, model, root / case.name)
    ran = subprocess.run(
        [sys.executable, malformed_inputs.__file__, str(root)],
        env=job_environment(root),
        input=json.dumps(environments),
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ran.returncode == 0
    return {name: read_ending(root, name) for name in environments}


def read_ending(root: Path, name: str) -> Ended:
    output = (root / f"{name}.log").read_text()
    code = int(output.splitlines()[-1].removeprefix("ended with "))
    return Ended(code, output, json.loads((root / name / "termination.json").read_text()))


def assert_refused(case: Case, ended: Ended) -> None:
    assert ended.code == case.code, ended.output
    assert "Traceback" not in ended.output
    said = f"{ended.outcome['message']}\n{ended.outcome['hint']}"
    assert [word for word in case.words if word not in said] == [], said
    assert ended.outcome["hint"], said
    assert ended.outcome["message"].splitlines()[0] in ended.output
    if "bad_rows.jsonl" in ended.outcome["hint"]:
        check_list_of_bad_rows(ended)
    assert ended.outcome["hint"].splitlines()[0] in ended.output


def check_list_of_bad_rows(ended: Ended) -> None:
    """Compare the list of all bad rows, which lies in the output, with what the message counts and shows."""
    counted, *shown = ended.outcome["message"].splitlines()
    rows = [json.loads(line) for line in (Path(ended.outcome["output"]) / "bad_rows.jsonl").read_text().splitlines()]
    assert f" {len(rows)} of " in counted or f"none of the {len(rows)} rows" in counted
    assert [f"  {row['file']}:{row['line']}: {row['reason']}" for row in rows] == shown
    assert all(row["row"] is not None for row in rows if row["reason"] != "a JSON null, not an object")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_refused(case: Case, endings: dict[str, Ended]) -> None:
    assert_refused(case, endings[case.name])


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_is_read_as_it_is_meant(case: Case, endings: dict[str, Ended]) -> None:
    ended = endings[case.name]
    assert ended.code == 0, ended.output
    assert [word for word in case.words if word not in ended.output] == [], ended.output


@pytest.mark.parametrize("name", THROUGH_THE_REAL_COMMAND)
def test_is_refused_by_the_real_command(name: str, model: Path, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    ended = run_job(make_environment(case, model, tmp_path), "check")
    assert_refused(case, ended)


def test_the_names_are_unique() -> None:
    cases = [*CASES, *ACCEPTED]
    assert len({case.name for case in cases}) == len(cases)
