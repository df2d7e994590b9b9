"""Of published runs side by side, only what differs is shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.compare import compare
from job.errors import NotFoundError
from job.evaluation import Evaluation
from job.record import RunRecord, make_manifest

RecordFor = Callable[..., RunRecord]


@pytest.fixture
def publish(record_for: RecordFor, tmp_path: Path) -> Callable[..., str]:
    """Lay out the slot of a run with some settings; return its URI."""

    def lay_out(name: str, changes: dict[str, Any], **variables: object) -> str:
        slot = tmp_path / name
        slot.mkdir()
        record = record_for(changes={"run_id": name.ljust(16, "0"), **changes}, OUTPUT__URI=slot, **variables)
        (slot / "manifest.json").write_text(json.dumps(make_manifest(record, [])))
        (slot / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in record.steps))
        if record.evaluation is not None:
            (slot / "evaluation.json").write_text(record.evaluation.model_dump_json())
        return str(slot)

    return lay_out


def rows(output: str) -> dict[str, list[str]]:
    """Return the table's cells by their labels; cells are two blanks apart, at least."""
    found = {}
    for line in output.splitlines():
        label, *cells = [part.strip() for part in line.strip().split("  ") if part.strip()]
        found[label] = cells
    return found


def evaluate_worse(evaluation: Evaluation | None, by: float, answer: str) -> Evaluation:
    assert evaluation is not None
    assert evaluation.loss is not None
    return evaluation.model_copy(
        update={
            "rows": [row.model_copy(update={"loss": row.loss + by}) for row in evaluation.rows],
            "samples": [sample.model_copy(update={"after": answer}) for sample in evaluation.samples],
        }
    )


def test_two_ranks_show_just_what_differs(
    publish: Callable[..., str], record_for: RecordFor, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_for()
    worse = {
        "metrics": record.metrics | {"eval_loss": 1.5, "trainable_parameters": 617},
        "evaluation": evaluate_worse(record.evaluation, 0.1624, "Hello."),
    }
    assert compare([publish("a", {}), publish("b", worse, LORA__R=8)]) == "compared 2 runs"
    shown = rows(capsys.readouterr().out)
    results = [label for label in shown if label not in ("slot", "run", "made")]
    assert results[: results.index("Results") + 1] == [
        "Settings that differ",
        "SFT_LORA__R",
        "Plan that differs",
        "lora_alpha",
        "Results",
    ]
    assert shown["slot"] == ["a", "b"]
    assert shown["SFT_LORA__R"] == ["16", "8"]
    assert shown["lora_alpha"] == ["32", "16"]
    assert shown["held-out loss before"] == ["3.0344", "3.0344"]
    assert shown["held-out loss after"] == ["1.3376", "1.5000"]
    assert shown["change, 95 % interval"][0] == "-1.6968 (-1.860 to -1.520)"
    assert shown["against the first run"] == ["-", "+0.1624 (+0.162 to +0.162)"]
    assert shown["perplexity after"] == ["3.81", "4.48"]
    assert shown["trained parameters"] == ["1,234", "617"]
    assert shown["asked"] == ["請問多久會收到商品"]
    assert shown["before"] == ["I am not sure."]
    assert shown["b"] == ["Hello."]


def test_other_data_packages_and_rows_are_told_apart(
    publish: Callable[..., str], record_for: RecordFor, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_for()
    assert record.evaluation is not None
    [file] = record.data
    other = {
        "data": [file.__class__("s3://elsewhere/rows.jsonl", "etag", "77" * 32, 9, 40, 1.0)],
        "packages": record.packages | {"torch": "2.14.0"},
        "evaluation": record.evaluation.model_copy(update={"rows": record.evaluation.rows[1:], "samples": []}),
    }
    moved = [file.__class__("/copied/train.jsonl", "other", file.sha256, 1000, 100, 1.0)]
    compare([publish("a", {}), publish("b", other), publish("c", {"data": moved, "evaluation": None})])
    output = capsys.readouterr().out
    shown = rows(output)
    assert shown["s3://bucket/train.jsonl"] == ["100 rows, 5a5a5a5a5a5a", "-", "100 rows, 5a5a5a5a5a5a"]
    assert shown["s3://elsewhere/rows.jsonl"] == ["-", "40 rows, 777777777777", "-"]
    assert shown["torch"] == ["2.13.0", "2.14.0", "2.13.0"]
    assert "peft" not in shown
    assert "Settings that differ" not in output
    assert "Not all runs held the same rows out" in output
    assert "Samples" not in output


@pytest.mark.parametrize("content", [None, "[]", "{", '{"run_id": "a"}'])
def test_a_place_without_a_run_is_named(publish: Callable[..., str], tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "manifest.json").write_text(content)
    with pytest.raises(NotFoundError, match=r"other: no run is published there, for there is no manifest\.json"):
        compare([publish("a", {}), str(tmp_path / "other")])


def test_what_other_versions_wrote_is_no_trouble(
    publish: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = publish("a", {}), publish("b", {})
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest |= {"metrics": None, "plan": None, "packages": None, "data": [{"uri": "s3://bucket/old.jsonl"}]}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')  # cut off
    assert compare([first, second]) == "compared 2 runs"
    assert "s3://bucket/old.jsonl" in capsys.readouterr().out
