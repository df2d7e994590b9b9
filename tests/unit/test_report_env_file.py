"""The env file of the report starts the same run again, whether docker or a shell reads it."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from test_manifest import CHANGES, KEEPS, NEEDED

from job.record import RunRecord
from job.report.env_file import SHELL_LOADER, list_credentials, make_env_lines
from job.settings import Settings

RecordFor = Callable[..., RunRecord]
Load = Callable[..., Settings]

AWKWARD: dict[str, object] = {
    "DATA__URI": '["s3://b/a.jsonl", {"uri": "s3://b/c d/*.jsonl", "weight": 0.5}]',
    "DATA__TEMPLATE": "Q: {{ q }}\nA: {% generation %}'{{ a }}' \"$HOME\" `id` \\n{% endgeneration %} # 好",
    "DATA__COLUMNS": '{"review": "text"}',
    "LORA__TARGET_MODULES": "q_proj,v_proj",
    "LORA__RSLORA": "true",
    "TRAIN__LEARNING_RATE": "1e-5",
    "TRAIN__PACKING": "false",
    "TRAIN__WARMUP": "5",
    "QUANTIZATION": "nf4",
    "RUNTIME__WORK_DIR": "/some where/$x",
    "EVAL__PROMPTS": '["Is it free, and why?", [{"role": "user", "content": "幾點\\n開門"}]]',
    "OUTPUT__URI": "s3://bucket/{run_id}",
}
# one of each setting that there is
SINGLE = [{name: value} | NEEDED.get(name, {}) for name, value in (CHANGES | KEEPS).items()]


def read_by_docker(lines: list[str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("variables", [{}, AWKWARD, {"EVAL__PROMPTS": "s3://b/prompts.jsonl"}, *SINGLE], ids=str)
def test_docker_reads_the_same_settings(record_for: RecordFor, load: Load, variables: dict[str, Any]) -> None:
    expected = load(**variables)
    record = record_for(changes={"given": expected.model_dump(mode="json", exclude_unset=True)})
    lines = make_env_lines(record)
    assert all("\n" not in line for line in lines)
    names = {name.removeprefix("SFT_"): value for name, value in read_by_docker(lines).items()}
    assert load(**dict.fromkeys(("MODEL__ID", "DATA__URI", "OUTPUT__URI")) | names) == expected


def test_a_shell_reads_what_docker_reads(record_for: RecordFor, tmp_path: Any) -> None:
    lines = make_env_lines(record_for(**AWKWARD))
    (tmp_path / "run.env").write_text("# a comment\n" + "\n".join(lines) + "\n", encoding="utf-8")
    ended = subprocess.run(
        ["sh", "-c", f"{SHELL_LOADER}\nenv -0"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True
    )
    seen = dict(entry.split("=", 1) for entry in ended.stdout.decode().split("\0") if entry.startswith("SFT_"))
    assert seen == read_by_docker(lines)


def test_only_what_was_given_is_there_and_a_hub_model_is_pinned(record_for: RecordFor) -> None:
    record = record_for(LORA__R=16, changes={"hub_revision": "c0ffee"})  # the default's value, but given
    assert make_env_lines(record) == [
        "SFT_MODEL__ID=org/model",
        "SFT_MODEL__REVISION=c0ffee",
        "SFT_DATA__URI=/data/train.jsonl",
        "SFT_LORA__R=16",
        "SFT_OUTPUT__URI=/out",
    ]


def test_a_hub_model_that_was_named_with_its_revision_is_named_without(record_for: RecordFor) -> None:
    commit = "c0ffee0000" * 4
    data, changes = {"model_revision": commit}, {"hub_revision": commit}
    record = record_for(data=data, changes=changes, MODEL__ID="hf://org/model@main")
    assert make_env_lines(record)[:2] == ["SFT_MODEL__ID=org/model", f"SFT_MODEL__REVISION={commit}"]


def test_the_credentials_that_it_needs_are_named(record_for: RecordFor) -> None:
    assert list_credentials(record_for()) == []
    [s3] = list_credentials(record_for(DATA__URI="s3://bucket/rows"))
    assert "AWS_ACCESS_KEY_ID" in s3
    [hub] = list_credentials(record_for(changes={"hub_revision": "c0ffee"}))
    assert "HF_TOKEN" in hub
