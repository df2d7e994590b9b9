"""The README's tables are those that the code makes."""

import pytest
from docs import README, events_table, exit_codes_table, settings_table, update

from job.errors import EXIT_CODES
from job.log import EVENTS
from job.settings import settings_groups
from job.settings_problems import setting_names

MARKED = """# Title
<!-- begin: training speed -->
<!-- end: training speed -->
<!-- begin: exit codes -->
replaced-text
<!-- end: exit codes -->
between
<!-- begin: events -->
<!-- end: events -->
<!-- begin: settings -->
<!-- end: settings -->
after
"""


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if "`" in line]


def test_the_readme_is_up_to_date() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == update(readme), "run `make docs`"


def test_every_exit_code_has_its_row() -> None:
    assert [(row[0], row[1]) for row in rows(exit_codes_table())] == [
        (str(code.code), f"`{code.name}`") for code in EXIT_CODES
    ]
    assert ["70", "`internal`", "a bug in the job", "retry, counted"] in rows(exit_codes_table())


def test_every_event_has_its_row_with_all_its_fields() -> None:
    found = {row[0].strip("`"): row[2] for row in rows(events_table())}
    assert found.keys() == EVENTS.keys()
    for name, event in EVENTS.items():
        assert all(f"`{field}` " in found[name] for field in event.fields)


def test_every_setting_has_its_row() -> None:
    names = [row[0].strip("` ") for row in rows(settings_table())]
    assert names == setting_names(settings_groups())


@pytest.mark.parametrize(
    ("variable", "default", "unit", "meaning"),
    [
        ("SFT_MODEL__ID", "required", "", "Base model: a Hub id"),
        ("SFT_MODEL__REVISION", "not set", "", "Hub model"),
        ("SFT_DATA__MAX_LENGTH", "`auto`", "tokens", "(8 to 1,048,576 or `auto`)"),
        ("SFT_DATA__TRUNCATION", "`drop`", "", "(`drop`, `split`, `keep_start`)"),
        ("SFT_LORA__DROPOUT", "`0.05`", "probability", "(at least 0, less than 1)"),
        ("SFT_TRAIN__LEARNING_RATE", "`0.0002`", "per step", "(more than 0, at most 1)"),
        ("SFT_TRAIN__MAX_STEPS", "not set", "steps", "(1 to 10,000,000)"),
        ("SFT_TRAIN__MAX_GRAD_NORM", "`1`", "L2 norm", "(more than 0, at most 1,000,000)"),
        ("SFT_TRAIN__PACKING", "`auto`", "", "(`true`, `false` or `auto`)"),
        ("SFT_OUTPUT__OVERWRITE", "`false`", "", "(`true`, `false`)"),
        ("SFT_RUNTIME__WORK_DIR", "`/tmp/sft-job`", "", "one job at a time"),
    ],
)
def test_a_row_says_what_a_setting_takes(variable: str, default: str, unit: str, meaning: str) -> None:
    (row,) = [row for row in rows(settings_table()) if row[0] == f"`{variable}`"]
    assert [cell.strip() for cell in row[1:3]] == [default, unit]
    assert meaning in row[3]


def test_update_replaces_what_stands_between_the_markers_and_nothing_else() -> None:
    updated = update(MARKED)
    assert "replaced-text" not in updated
    assert exit_codes_table() in updated
    assert events_table() in updated
    assert settings_table() in updated
    for kept in ("# Title\n", "\nbetween\n", "\nafter\n"):
        assert kept in updated
    assert update(updated) == updated


@pytest.mark.parametrize("broken", ["", MARKED.replace("<!-- end: settings -->", ""), MARKED + MARKED])
def test_update_refuses_missing_and_doubled_markers(broken: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        update(broken)
