"""The chart's files that follow from the code: the schema of its values, the exit codes, and its README's tables.

`python tests/chart_files.py` writes them anew; tests/unit/test_chart_files.py fails where that would change anything.
The schema has two parts: `settings`, from the job's own, and the rest, from tests/chart_schema.yaml. Its descriptions
are the comments in values.yaml.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from docs import ROOT, fill, settings_rows, table

from job.errors import EXIT_CODES, KUBERNETES_ACTION, RetryPolicy
from job.settings import Settings

CHART = ROOT / "charts" / "sft-job"
VALUES = CHART / "values.yaml"

# What the chart, or a pod's own name, decides: a user who set it would be overruled, or would break the run.
OWN_SETTINGS = {
    "parallel": {"node_rank", "host"},
    "runtime": {"work_dir", "termination_log", "grace_seconds"},
}
_NULL = {"type": "null"}

Schema = dict[str, Any]


def generated_files() -> dict[Path, str]:
    """Return the text of each generated file."""
    readme = CHART / "README.md"
    return {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=2, ensure_ascii=False) + "\n",
        CHART / "templates" / "_exit_codes.tpl": exit_codes_template(),
        readme: fill(
            readme.read_text(encoding="utf-8"), {"values": values_table(), "settings": chart_settings_table()}
        ),
    }


def exit_codes_template() -> str:
    """Return the named templates of `job.errors.EXIT_CODES`: the codes by policy, and the table for the notes."""

    def codes(retry: RetryPolicy) -> str:
        return ", ".join(str(code.code) for code in EXIT_CODES if code.retry == retry)

    rows = [f"{code.code:<2}  {KUBERNETES_ACTION[code.retry]:<18}  {code.name}: {code.when}" for code in EXIT_CODES]
    named = {
        "fail": codes("fail"),
        "retryUncounted": codes("retry_uncounted"),
        "table": "\n".join(rows),
    }
    parts = [f'{{{{- define "sft-job.exitCodes.{name}" -}}}}\n{text}\n{{{{- end -}}}}' for name, text in named.items()]
    return "\n\n".join(["{{/* Written by `make docs` from job/errors.py. */}}", *parts]) + "\n"


def values_schema() -> Schema:
    """Return the JSON Schema of the chart's values, without references, so that a refusal names the value's path."""
    own = yaml.safe_load((ROOT / "tests" / "chart_schema.yaml").read_text(encoding="utf-8"))["values"]
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    schema = _close({"properties": own}, values, "")
    _describe(schema, dict(documented_values()), "")
    schema["properties"] |= {
        "settings": settings_schema(),
        "global": {"type": "object", "description": "Set by a chart of which this one is a part; not read here"},
    }
    schema["required"] = sorted([*schema["required"], "settings"])
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart sft-job", **schema}


def settings_schema() -> Schema:
    """Return the part of the schema that the job's settings are."""
    schema = Settings.model_json_schema()
    tree = _inline(schema, schema["$defs"])
    for group, fields in OWN_SETTINGS.items():
        for field in fields:
            del tree["properties"][group]["properties"][field]
    tree.pop("$defs")
    for group in tree["properties"].values():
        _allow_null(group)
    _allow_null(tree)
    return {**tree, "description": "The settings of the run"}


def _inline(part: Any, definitions: Schema) -> Any:
    """Put what a reference means in its place; leave out what no reader of the schema needs."""
    if isinstance(part, list):
        return [_inline(member, definitions) for member in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:  # the default of a group says the same as those of its fields
        part = definitions[part["$ref"].rsplit("/", 1)[-1]]
    kept = {key: value for key, value in part.items() if not (key in ("title", "unit") and isinstance(value, str))}
    return {key: _inline(value, definitions) for key, value in kept.items()}


def _allow_null(group: Schema) -> None:
    """Let what isn't required also be null: to Helm, that is a value taken back."""
    for name, about in group.get("properties", {}).items():
        if name in group.get("required", ()):
            continue
        if "anyOf" in about:
            about["anyOf"] += [] if _NULL in about["anyOf"] else [_NULL]
            continue
        about["type"] = [about["type"], "null"]
        if "enum" in about:
            about["enum"].append(None)


def _close(schema: Schema, values: Any, path: str) -> Schema:
    """Refuse unknown names in every object whose properties are listed, and the loss of those that have a default."""
    if "items" in schema:
        schema["items"] = _close(schema["items"], None, f"{path}[]")
    if "properties" not in schema:
        return schema
    defaults = values if isinstance(values, dict) else {}
    required = schema.get("required", []) + [
        name for name, value in defaults.items() if name in schema["properties"] and value is not None
    ]
    properties = {
        name: _close(dict(part), defaults.get(name), f"{path}.{name}") for name, part in schema["properties"].items()
    }
    closed = {"type": "object", "additionalProperties": False, **schema, "properties": properties}
    return closed | ({"required": sorted(required)} if required else {})


def _describe(schema: Schema, comments: dict[str, str], path: str) -> None:
    for name, part in schema.get("properties", {}).items():
        _describe(part, comments, f"{path}{name}.")
        if f"{path}{name}" in comments:
            schema["properties"][name] = {"description": comments[f"{path}{name}"], **part}


def documented_values() -> Iterator[tuple[str, str]]:
    """Yield the path of each value in values.yaml that has a comment `# --`, and the comment."""
    text = VALUES.read_text(encoding="utf-8")
    lines = text.splitlines()
    for path, node in _keys(yaml.compose(text)):
        comment: list[str] = []
        line = node.start_mark.line - 1
        while line >= 0 and lines[line].lstrip().startswith("#"):
            comment.insert(0, lines[line].lstrip().removeprefix("#").strip())
            line -= 1
        if comment and comment[0].startswith("-- "):
            yield path, " ".join(comment).removeprefix("-- ")


def _keys(node: yaml.Node, path: str = "") -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{path}{key.value}", key
            yield from _keys(value, f"{path}{key.value}.")


def values_table() -> str:
    """Return the table of values.yaml."""
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    rows = []
    for path, comment in documented_values():
        default: Any = values
        for name in path.split("."):
            default = default[name]
        rows.append([f"`{path}`", f"`{json.dumps(default)}`", comment])
    return table(["value", "default", "what it is"], rows)


def chart_settings_table() -> str:
    """Return the table of the settings that the chart takes, by their path in the values."""
    rows = []
    for row in settings_rows():
        if row.field not in OWN_SETTINGS.get(row.group, ()):
            path = f"settings.{row.group}" if row.field is None else f"settings.{row.group}.{row.field}"
            rows.append([f"`{path}`", row.default, row.unit, row.meaning])
    return table(["value", "default", "unit", "what it is"], rows)


if __name__ == "__main__":
    for path, text in generated_files().items():
        path.write_text(text, encoding="utf-8")
