"""README tables out of the code: the exit codes and the settings.

`python tests/docs.py` rewrites what stands between the markers in README.md; tests/unit/test_docs.py fails where that
would change anything.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from job.errors import EXIT_CODES, KUBERNETES_ACTION  # noqa: E402
from job.settings import Settings  # noqa: E402
from job.settings_problems import DELIMITER, PREFIX  # noqa: E402

README = ROOT / "README.md"
_SETTINGS_HEAD = ["variable", "default", "unit", "what it is"]


def exit_codes_table() -> str:
    """Return the table of `job.errors.EXIT_CODES`."""
    rows = [[str(code.code), f"`{code.name}`", code.when, KUBERNETES_ACTION[code.retry]] for code in EXIT_CODES]
    return _table(["code", "name", "when", "Kubernetes does"], rows)


def settings_table() -> str:
    """Return a table for each group of settings, from their JSON Schema."""
    schema = Settings.model_json_schema()
    parts = []
    for name, reference in schema["properties"].items():
        if "$ref" not in reference:
            table = _table(_SETTINGS_HEAD, [_setting_row(f"{PREFIX}{name}".upper(), reference, False)])
            parts.append(f"**{name}**, a setting that stands alone:\n\n{table}")
            continue
        group = schema["$defs"][reference["$ref"].rsplit("/", 1)[-1]]
        rows = [
            _setting_row(f"{PREFIX}{name}{DELIMITER}{field}".upper(), about, field in group.get("required", ()))
            for field, about in group["properties"].items()
        ]
        table = _table(_SETTINGS_HEAD, rows)
        parts.append(f"**{name}**: {group['description']}\n\n{table}")
    return "\n\n".join(parts)


def update(readme: str) -> str:
    """Return the README with both tables as the code has them.

    Raises ValueError where a pair of markers is missing or there twice.
    """
    for name, text in (("exit codes", exit_codes_table()), ("settings", settings_table())):
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if (readme.count(begin), readme.count(end)) != (1, 1) or readme.index(begin) > readme.index(end):
            raise ValueError(f"README.md needs one {begin} and, after it, one {end}")
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return readme


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str) -> str:
    return re.sub(r"\s+", " ", cell).replace("|", r"\|")


def _setting_row(variable: str, about: dict[str, Any], is_required: bool) -> list[str]:
    unit = about.get("unit", "none")
    allowed = _allowed(about)
    meaning = about["description"] + (f" ({allowed})" if allowed else "")
    default = "required" if is_required else _default(about["default"])
    return [f"`{variable}`", default, "" if unit == "none" else unit, meaning]


def _default(value: object) -> str:
    if value is None or value in ([], {}):
        return "not set"
    if isinstance(value, bool):
        value = str(value).lower()
    # Where temporary files lie is this machine's own affair; in the image it is /tmp.
    text = f"{value:g}" if isinstance(value, float) else str(value).replace(tempfile.gettempdir(), "/tmp", 1)
    return f"`{text}`"


def _allowed(about: dict[str, Any]) -> str:
    """Say which values a field takes, as far as its schema bounds them: `auto`, or 1 to 1,024."""
    members = [member for member in about.get("anyOf", [about]) if member.get("type") != "null"]
    if any(member.get("type") == "array" for member in members):  # a list of any names: the description says of what
        return ""
    words = [_values(member) for member in members]
    shown = sorted((word for word in words if word), key=lambda word: "`" in word)  # numbers first, then auto
    return " or ".join(shown)


def _values(member: dict[str, Any]) -> str:
    if "enum" in member:
        return ", ".join(f"`{value}`" for value in member["enum"])
    if "const" in member:
        return f"`{member['const']}`"
    if member["type"] == "boolean":
        return "`true`, `false`"
    bounds = {key: _number(member[key]) for key in _BOUNDS if key in member}
    if bounds.keys() == {"minimum", "maximum"}:
        return f"{bounds['minimum']} to {bounds['maximum']}"
    return ", ".join(f"{_BOUNDS[key]} {number}" for key, number in bounds.items())


def _number(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


_BOUNDS = {
    "exclusiveMinimum": "more than",
    "minimum": "at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
