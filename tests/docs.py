"""README tables out of the code, the exit codes, the log's events and the settings, and out of what benchmarks found.

`python tests/docs.py` rewrites what stands between the markers in README.md; tests/unit/test_docs.py fails where that
would change anything.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from job.errors import EXIT_CODES, KUBERNETES_ACTION  # noqa: E402
from job.log import EVENTS  # noqa: E402
from job.settings import Settings  # noqa: E402
from job.settings_problems import DELIMITER, PREFIX  # noqa: E402

README = ROOT / "README.md"
_TRAINING_SPEED = ROOT / "tests" / "bench" / "results" / "training.md"  # `make bench` writes it
_SETTINGS_HEAD = ["variable", "default", "unit", "what it is"]


def exit_codes_table() -> str:
    """Return the table of `job.errors.EXIT_CODES`."""
    rows = [[str(code.code), f"`{code.name}`", code.when, KUBERNETES_ACTION[code.retry]] for code in EXIT_CODES]
    return table(["code", "name", "when", "Kubernetes does"], rows)


def events_table() -> str:
    """Return the table of `job.log.EVENTS`."""
    rows = []
    for name, event in EVENTS.items():
        fields = "; ".join(f"`{field}` {meaning}" for field, meaning in event.fields.items())
        rows.append([f"`{name}`", event.when, fields])
    return table(["event", "when", "fields"], rows)


def settings_table() -> str:
    """Return a table for each group of settings, from their JSON Schema."""
    parts = []
    for name, group in groupby(settings_rows(), key=lambda row: row.group):
        rows = list(group)
        head = f"**{name}**, a setting that stands alone:" if rows[0].field is None else f"**{name}**: {rows[0].about}"
        cells = [[f"`{row.variable}`", row.default, row.unit, row.meaning] for row in rows]
        parts.append(f"{head}\n\n{table(_SETTINGS_HEAD, cells)}")
    return "\n\n".join(parts)


class Row(NamedTuple):
    """One setting as a table shows it; `about` describes its group, and a setting that stands alone has no field."""

    group: str
    field: str | None
    about: str
    default: str
    unit: str
    meaning: str

    @property
    def variable(self) -> str:
        """The setting's own variable."""
        return (PREFIX + (self.group if self.field is None else f"{self.group}{DELIMITER}{self.field}")).upper()


def settings_rows() -> Iterator[Row]:
    """Yield every setting, group by group."""
    schema = Settings.model_json_schema()
    for name, reference in schema["properties"].items():
        if "$ref" not in reference:
            yield Row(name, None, "", *_setting_cells(reference, False))
            continue
        group = schema["$defs"][reference["$ref"].rsplit("/", 1)[-1]]
        for field, about in group["properties"].items():
            yield Row(name, field, group["description"], *_setting_cells(about, field in group.get("required", ())))


def update(readme: str) -> str:
    """Return the README with all tables as the code has them.

    Raises ValueError where a pair of markers is missing or there twice.
    """
    texts = {
        "training speed": _TRAINING_SPEED.read_text(encoding="utf-8").strip(),
        "exit codes": exit_codes_table(),
        "events": events_table(),
        "settings": settings_table(),
    }
    return fill(readme, texts)


def fill(page: str, texts: dict[str, str]) -> str:
    """Return a page with each text between the markers of its name.

    Raises ValueError where a pair of markers is missing or there twice.
    """
    for name, text in texts.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if (page.count(begin), page.count(end)) != (1, 1) or page.index(begin) > page.index(end):
            raise ValueError(f"README.md needs one {begin} and, after it, one {end}")
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str) -> str:
    return re.sub(r"\s+", " ", cell).replace("|", r"\|")


def _setting_cells(about: dict[str, Any], is_required: bool) -> tuple[str, str, str]:
    unit = about.get("unit", "none")
    allowed = _allowed(about)
    meaning = about["description"] + (f" ({allowed})" if allowed else "")
    default = "required" if is_required else _default(about["default"])
    return default, "" if unit == "none" else unit, meaning


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
