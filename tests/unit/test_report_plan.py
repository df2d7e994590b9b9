"""The plan as people see it: every value with its source, whatever the width of the screen."""

from collections.abc import Callable

import pytest

from job.log import format_bytes
from job.plan import TrainPlan
from job.report.plan import format_plan

PlanFor = Callable[..., TrainPlan]


@pytest.fixture
def plan(plan_for: PlanFor) -> TrainPlan:
    return plan_for(
        data={"train_rows": 78, "model_revision": "7ae557604adf67be50417f59c2c2f167def9a775"},
        MODEL__ID="/a/rather/long/path/to/the/folder/of/Qwen2.5-0.5B-Instruct",
        TRAIN__WARMUP=40,
        TRAIN__EARLY_STOPPING_PATIENCE=5,
    )


def read_sources(table: str) -> dict[str, str]:
    """Put the sources together again, from the lines that they were broken into."""
    lines = table[: table.index("\nMemory")].splitlines()
    column = lines[1].index("SFT_MODEL__ID")
    sources: dict[str, str] = {}
    for line in (line for line in lines if line.startswith("  ")):
        if line[2] != " ":
            name = line.split()[0]
            assert name not in sources
            sources[name] = line[column:]
        else:
            sources[name] += " " + line[column:]
    return sources


@pytest.mark.parametrize("width", [1, 80, 100, 120, 200])
def test_each_value_has_the_whole_of_its_source(width: int, plan: TrainPlan) -> None:
    expected = {name: source for name, source in plan.sources.items() if name != "memory"}  # has a section of its own
    assert read_sources(format_plan(plan, width=width)) == expected


@pytest.mark.parametrize(("width", "longest"), [(80, 86), (90, 90), (120, 120), (200, 200)])
def test_it_keeps_within_the_screen(width: int, longest: int, plan: TrainPlan) -> None:
    """At 80 columns, the longest variable's name stands out by 6: it is kept whole."""
    lines = format_plan(plan, width=width).splitlines()
    assert max(map(len, lines)) <= longest
    assert [line for line in lines if len(line) > width and "SFT_TRAIN__EARLY_STOPPING_PATIENCE" not in line] == []


def test_columns_stand_below_each_other(plan: TrainPlan) -> None:
    table = format_plan(plan, width=80)
    rows = [line for line in table.splitlines() if line.startswith("  ")]
    value, source = (rows[0].index(text) for text in ("/a/rath", "SFT_MODEL__ID"))
    for row in rows:
        assert row[value - 2 : value] == row[source - 2 : source] == "  "
        assert row[source] != " "


def test_long_values_lose_their_middle(plan: TrainPlan) -> None:
    wide, narrow = format_plan(plan, width=120), format_plan(plan, width=80)
    assert "  /a/rather/long/pat...en2.5-0.5B-Instruct  " in wide
    assert "  /a/rathe...Instruct  " in narrow
    assert f"  {plan.model_revision}  " in wide  # just fits
    assert "  7ae55760...def9a775  " in narrow


def test_what_is_not_there_is_none(plan_for: PlanFor) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in format_plan(plan_for()).splitlines()}
    assert rows["new_tokens"] == ["none", "added", "by", "the", "chat", "template"]
    assert rows["modules_to_save"] == rows["early_stopping_patience"] == ["none", "default"]
    assert rows["train_tokens"][0] == "20,000"
    assert rows["packing"][0] == "True"


def test_the_memory_is_shown_in_units_for_people(plan: TrainPlan) -> None:
    table = format_plan(plan)
    memory = plan.memory
    section = [line.split() for line in table[table.index("\nMemory") :].splitlines()[2:]]
    assert section[0][:3] == ["weights", *format_bytes(memory.weights_bytes).split()]
    assert section[-1] == ["total", *format_bytes(memory.total_bytes).split(), "of", "57.1", "GiB"]
    assert [row[0] for row in section[:-1]] == list(memory.parts())
    assert sum(int(row[3].rstrip("%")) for row in section[:-1]) == pytest.approx(100, abs=4)
