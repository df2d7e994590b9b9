"""The chart's generated files are those that the code makes, and its schema takes what the job takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chart_files import CHART, OWN_SETTINGS, VALUES, documented_values, generated_files, values_schema

import job
from job.errors import ConfigError
from job.settings import load_settings, settings_groups

SCHEMA = values_schema()
GIVEN = {"model": {"id": "m"}, "data": {"uri": "rows"}, "output": {"uri": "out"}}


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value and not name.endswith(("Context", "esources")):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "properties" in schema and "if" not in schema:
            yield schema
        for key, part in schema.items():
            if key not in ("if", "then", "not"):
                yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_a_generated_file_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generated_files()[path], "run `make docs`"


def test_every_value_has_a_comment_and_a_rule() -> None:
    values = read_yaml(VALUES)
    assert set(leaves(values)) == {path for path, _ in documented_values()}
    assert set(SCHEMA["properties"]) == {*values, "global"}


def test_every_listed_object_is_closed() -> None:
    found = list(objects(SCHEMA))
    assert len(found) > 20
    assert [schema for schema in found if "additionalProperties" not in schema] == []
    assert SCHEMA["properties"]["settings"]["properties"]["lora"]["additionalProperties"] is False


def test_the_schema_has_the_jobs_settings_but_for_those_that_the_chart_decides() -> None:
    tree = SCHEMA["properties"]["settings"]["properties"]
    assert set(tree) == set(settings_groups())
    for name, group in settings_groups().items():
        if group is not None:
            assert set(tree[name]["properties"]) == set(group.model_fields) - OWN_SETTINGS.get(name, set())


def test_the_chart_is_that_of_this_version() -> None:
    chart = read_yaml(CHART / "Chart.yaml")
    assert [chart["version"], chart["appVersion"]] == [job.__version__, job.__version__]
    tags = [read_yaml(path).get("image", {}).get("tag") for path in (CHART / "ci").iterdir()]
    assert {tag for tag in tags if tag} == {f"{job.__version__}-cpu"}


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("data", "uri", "s3://b/rows/*.jsonl"),
        ("data", "uri", ["s3://b/a", {"uri": "hf://datasets/o/n", "weight": 0.5}]),
        ("data", "uri", "gs://b/rows"),
        ("data", "uri", "s3://key:secret@b/rows"),
        ("data", "uri", "s3://key@b:9000/rows"),
        ("data", "uri", "s3://b/rows:2/a@b"),
        ("data", "uri", []),
        ("data", "uri", "[broken"),
        ("data", "columns", {"review": "text"}),
        ("data", "columns", {"review": ""}),
        ("output", "uri", "s3://b/{run_id}"),
        ("output", "uri", "hf://o/n"),
        ("output", "uri", "hf://o/n-{run_id}@refs/pr/1"),
        ("output", "uri", "hf://o/n/folder"),
        ("output", "uri", "hf://datasets/o"),
        ("output", "license", "apache-2.0"),
        ("output", "license", "my own"),
        ("checkpoint", "uri", "hf://o/n"),
        ("output", "uri", "s3://b/*"),
        ("checkpoint", "uri", "s3://b/c?"),
        ("lora", "target_modules", "all-linear"),
        ("lora", "target_modules", "q_proj, v_proj"),
        ("lora", "target_modules", ["q_proj"]),
        ("lora", "target_modules", []),
        ("lora", "target_modules", " , "),
        ("lora", "modules_to_save", []),
        ("lora", "modules_to_save", ["embed_tokens", ""]),
        ("lora", "dropout", 1),
        ("train", "warmup", 0.5),
        ("train", "warmup", 100),
        ("train", "warmup", 2.5),
        ("train", "packing", "maybe"),
        ("train", "max_steps", 8.5),
    ],
)
def test_the_schema_takes_what_the_job_takes(
    group: str, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**GIVEN, group: {**GIVEN.get(group, {}), field: value}}
    for name, tree in settings.items():
        monkeypatch.setenv(f"SFT_{name.upper()}", json.dumps(tree))
    try:
        load_settings()
        is_taken = True
    except ConfigError:
        is_taken = False
    rules = jsonschema.Draft7Validator(SCHEMA["properties"]["settings"])
    assert rules.is_valid(settings) == is_taken
