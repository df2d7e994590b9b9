"""What the job makes of data, through its command line: sources and weights, bad rows, cuts, retries, the X-ray."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from job_cli import Ended, job_environment, run_job
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

ANSWER = "as white as chalk in the sun"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, topic: str) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {topic} {number}?", "answer": f"{topic} {ANSWER} {number}"} for number in range(count)
    ]


def run(command: str, tmp_path: Path, tiny_model: Path, **settings: object) -> Ended:
    defaults = {"MODEL__ID": tiny_model, "OUTPUT__URI": tmp_path / "out"}
    return run_job(job_environment(tmp_path, **(defaults | settings)), command)


def read_xray(tmp_path: Path) -> dict[str, Any]:
    xray: dict[str, Any] = json.loads((tmp_path / "work" / "run" / "xray.json").read_bytes())
    return xray


def test_sources_of_several_kinds_are_mixed_by_weight(tmp_path: Path, tiny_model: Path) -> None:
    twice = write_rows(tmp_path / "twice" / "a.jsonl", pairs(10, "salt"))
    half = tmp_path / "half.csv"
    half.write_text("prompt,completion\n" + "".join(f"Say {n},word {n}\n" for n in range(20)))
    uris = json.dumps([{"uri": f"{twice.parent}/*.jsonl", "weight": 2}, {"uri": str(half), "weight": 0.5}])
    ended = run("check", tmp_path, tiny_model, DATA__URI=uris, DATA__EVAL_FRACTION=0.2)
    assert ended.code == 0, ended.output
    xray = read_xray(tmp_path)
    assert [(file["rows"], file["weight"]) for file in xray["files"]] == [(10, 2), (20, 0.5)]
    assert (xray["kept"], xray["held_out"]) == (30, 6)
    plan = json.loads((tmp_path / "work" / "run" / "plan.json").read_bytes())
    assert xray["train"] == plan["train_rows"]
    assert "question/answer, from the columns `question` and `answer`" in ended.output
    assert "weight 0.5" in ended.output

    again = run("check", tmp_path, tiny_model, DATA__URI=uris, DATA__EVAL_FRACTION=0.2)
    assert "tokenized before: reusing" in again.output
    assert read_xray(tmp_path) == xray  # the mix follows from the seed
    other = run("check", tmp_path, tiny_model, DATA__URI=uris.replace("0.5", "1"), DATA__EVAL_FRACTION=0.2)
    assert other.outcome["run_id"] != again.outcome["run_id"] == ended.outcome["run_id"]


def test_bad_rows_end_the_job_and_all_of_them_are_kept(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*pairs(30, "salt"), *({"question": "?"} for _ in range(25))])
    ended = run("run", tmp_path, tiny_model, DATA__URI=rows)
    assert ended.code == 65
    assert "25 of 55 rows can't be trained on" in ended.output
    assert f"{rows}:31: column `answer` is missing" in ended.output
    assert f"{rows}:51:" not in ended.output  # the first 20
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in listed] == [(str(rows), line) for line in range(31, 56)]
    assert str(tmp_path / "out" / "bad_rows.jsonl") in ended.outcome["hint"]


def test_bad_rows_are_skipped_and_published_in_quarantine(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(30, "salt"))
    with rows.open("a") as file:
        file.write('{"question": "broken\n{"question": "q", "answer": null}\n')
    ended = run("run", tmp_path, tiny_model, DATA__URI=rows, DATA__BAD_ROWS="skip", TRAIN__MAX_STEPS=2)
    assert ended.code == 0, ended.output
    assert "2 of 32 rows can't be trained on, and are set aside in quarantine.jsonl" in ended.output
    quarantine = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in quarantine] == [31, 32]
    assert quarantine[0]["row"] == '{"question": "broken'
    assert quarantine[1]["row"] == {"question": "q", "answer": None}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert {"quarantine.jsonl", "xray.json"} < {file["path"] for file in manifest["files"]}
    xray = json.loads((tmp_path / "out" / "xray.json").read_bytes())
    assert (xray["read"], xray["kept"], sum(xray["skipped"].values())) == (32, 30, 2)

    too_many = run(
        "check",
        tmp_path,
        tiny_model,
        DATA__URI=rows,
        DATA__BAD_ROWS="skip",
        DATA__MAX_BAD_FRACTION=0.05,
        OUTPUT__URI=tmp_path / "2",
    )
    assert too_many.code == 65
    assert "SFT_DATA__MAX_BAD_FRACTION=0.05 allows no more than 5.0%" in too_many.output


@pytest.mark.parametrize("truncation", ["drop", "split", "keep_start"])
def test_rows_beyond_the_maximum_are_never_cut_in_silence(tmp_path: Path, tiny_model: Path, truncation: str) -> None:
    rows = [{"text": f"short row {number}"} for number in range(9)] + [{"text": "a long row of many words " * 20}]
    uri = write_rows(tmp_path / "rows.jsonl", rows)
    # What is cut is trained on; the rest is arithmetic, and shown without training.
    command = "run" if truncation == "split" else "check"
    settings = {"DATA__MAX_LENGTH": 32, "DATA__TRUNCATION": truncation, "TRAIN__MAX_STEPS": 1}
    ended = run(command, tmp_path, tiny_model, DATA__URI=uri, **settings)
    assert ended.code == 0, ended.output
    assert "1 of 10 rows are longer than 32 tokens: 1 " in ended.output
    xray = read_xray(tmp_path)
    too_long = xray["too_long"]
    if truncation == "drop":
        assert (xray["train"], too_long["left_out"]) == (9, 1)
    elif truncation == "keep_start":
        assert (xray["train"], too_long["cut"]) == (10, 1)
    else:
        assert (too_long["split"], too_long["lost_tokens"]) == (1, 0)
        segments = np.load(tmp_path / "work" / "run" / "train_rows.npy")
        assert Counter(segments[:, 0].tolist())[9] == xray["train"] - 9 > 2
        assert (segments[:, 2] - segments[:, 1]).max() == 32


def test_too_many_rows_beyond_the_maximum_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    uri = write_rows(tmp_path / "rows.jsonl", [{"text": "word " * (10 + number)} for number in range(20)])
    ended = run("check", tmp_path, tiny_model, DATA__URI=uri, DATA__MAX_LENGTH=16)
    assert ended.code == 65
    assert "of 20 rows" in ended.output
    assert "SFT_DATA__MAX_DROPPED_FRACTION=0.1 allows no more than 10.0% to be left out" in ended.output


def test_a_retry_fetches_and_tokenizes_nothing_again(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(20, "salt"))
    s3_client.upload_file(str(rows), bucket, "rows/a.jsonl")
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), bucket, f"tiny/{file.name}")
    environment = job_environment(
        tmp_path, MODEL__ID=f"s3://{bucket}/tiny", DATA__URI=f"s3://{bucket}/rows/", OUTPUT__URI=f"s3://{bucket}/out"
    )
    environment |= seaweed.environment()
    first, second = run_job(environment, "check"), run_job(environment, "check")
    assert first.code == second.code == 0, first.output + second.output
    assert "before" not in first.output
    for words in ("data: 1 of 1 files", "base model's configuration: ", "tokenized before: reusing"):
        assert words in second.output


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(20, "salt") * 2)
    held_out = write_rows(tmp_path / "eval.jsonl", pairs(5, "salt") + pairs(5, "pepper"))
    ended = run("check", tmp_path, tiny_model, DATA__URI=train, DATA__EVAL_URI=held_out)
    assert ended.code == 0, ended.output
    assert "5 of 10 held-out rows are trained on as well" in ended.output
    assert "20 of 40 rows repeat another row" in ended.output
    assert any("5 of 10" in warning for warning in read_xray(tmp_path)["warnings"])
