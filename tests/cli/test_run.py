"""The whole job through its command line: trained, published, read back, and not trained again."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from base_model import get_base_model
from job_cli import SHOP, job_environment, run_job
from seaweed import SeaweedFS

from job.phases import PHASES

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "evaluation.json",
    "manifest.json",
    "metrics.jsonl",
    "plan.json",
    "report.html",
    "xray.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def read_losses(slot: Path) -> list[float]:
    lines = [json.loads(line) for line in (slot / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_evaluation(evaluation: dict[str, Any], metrics: dict[str, float]) -> None:
    """Compare what is published of the evaluation with the manifest's metrics and the held-out rows."""
    assert evaluation["problems"] == []
    assert [row["line"] for row in evaluation["rows"]] == [f"eval.jsonl:{line}" for line in range(1, 13)]
    loss = evaluation["loss"]
    assert (loss["rows"], loss["loss_base"], loss["loss"]) == (12, metrics["eval_loss_base"], metrics["eval_loss"])
    assert (loss["change_low"], loss["change_high"]) == (
        metrics["eval_loss_change_low"],
        metrics["eval_loss_change_high"],
    )
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    held_out = [json.loads(line) for line in (SHOP / "eval.jsonl").read_text().splitlines()]
    assert len(evaluation["samples"]) == 2
    for sample, row in zip(evaluation["samples"], held_out, strict=False):
        assert sample["messages"] == [{"role": "user", "content": row["prompt"]}]
        assert sample["reference"] == row["completion"]
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert None not in (sample["before"], sample["after"])


def check_phases(laid_out: dict[str, float], published: dict[str, float], output: str, *, wall_s: float) -> None:
    """Check that every phase of a run is told of, and that next to nothing of its time belongs to none."""
    after_metrics = {"reading back", "accepting"}
    assert laid_out.keys() == PHASES.keys() - after_metrics - {"merging"}
    assert published.keys() == PHASES.keys() - {"merging"}
    assert all(published[name] >= seconds for name, seconds in laid_out.items())
    [line] = [line for line in output.splitlines() if "where the time went: " in line]
    total_s = float(line.split(": ")[1].split(" s in all")[0])
    assert 0.9 * wall_s < total_s < wall_s + 0.1
    assert 0.8 * total_s < sum(published.values()) <= total_s + 0.1
    assert published["other"] < 0.03 * wall_s
    assert "steps " in line


def test_trains_from_s3_to_s3_and_a_second_start_does_nothing(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), bucket, f"models/tiny/{file.name}")
    for name in ("train", "eval"):
        s3_client.upload_file(str(SHOP / f"{name}.jsonl"), bucket, f"data/{name}/{name}.jsonl")
    environment = job_environment(
        tmp_path,
        MODEL__ID=f"s3://{bucket}/models/tiny",
        DATA__URI=f"s3://{bucket}/data/train/*.jsonl",
        DATA__EVAL_URI=f"s3://{bucket}/data/eval/",
        OUTPUT__URI=f"s3://{bucket}/out/{{run_id}}",
        TRAIN__EPOCHS=1,
        TRAIN__LEARNING_RATE=5e-3,
        EVAL__SAMPLES=2,
        EVAL__MAX_NEW_TOKENS=4,
    )
    environment |= seaweed.environment()

    began_s = time.monotonic()
    first = run_job(environment)
    wall_s = time.monotonic() - began_s
    assert first.code == 0, first.output
    slot = first.outcome["output"]
    assert slot == f"s3://{bucket}/out/{first.outcome['run_id']}"
    prefix = slot.removeprefix(f"s3://{bucket}/") + "/"
    listing = s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert {item["Key"].removeprefix(prefix) for item in listing} == PUBLISHED
    manifest = json.loads(s3_client.get_object(Bucket=bucket, Key=prefix + "manifest.json")["Body"].read())
    assert {file["path"] for file in manifest["files"]} == PUBLISHED - {"manifest.json"}
    assert manifest["run_id"] == first.outcome["run_id"]
    assert manifest["metrics"]["eval_loss"] < manifest["metrics"]["eval_loss_base"]
    assert manifest["metrics"]["steps"] == 10
    assert [(data["uri"], data["rows"]) for data in manifest["data"]] == [
        (f"s3://{bucket}/data/train/train.jsonl", 80),
        (f"s3://{bucket}/data/eval/eval.jsonl", 12),
    ]
    config = json.loads(s3_client.get_object(Bucket=bucket, Key=prefix + "adapter_config.json")["Body"].read())
    assert config["base_model_name_or_path"] == f"s3://{bucket}/models/tiny"
    evaluation = json.loads(s3_client.get_object(Bucket=bucket, Key=prefix + "evaluation.json")["Body"].read())
    check_evaluation(evaluation, manifest["metrics"])
    assert "held-out loss: " in first.output
    metrics = s3_client.get_object(Bucket=bucket, Key=prefix + "metrics.jsonl")["Body"].read().decode().splitlines()
    check_phases(json.loads(metrics[-1])["phases"], manifest["phases"], first.output, wall_s=wall_s)
    report = s3_client.get_object(Bucket=bucket, Key=prefix + "report.html")["Body"].read().decode()
    assert f"{manifest['metrics']['eval_loss']:.3f}</span>" in report
    [weights] = [file for file in manifest["files"] if file["path"] == "adapter_model.safetensors"]
    assert weights["sha256"] in report
    assert "Where the time went" in report
    assert f"Report      {slot}/report.html" in first.output
    everything = first.output + json.dumps(manifest) + report
    assert seaweed.secret_key not in everything
    assert seaweed.access_key not in everything

    second = run_job(environment)
    assert second.code == 0, second.output
    assert "already published" in second.output
    assert "== training" not in second.output
    again = s3_client.get_object(Bucket=bucket, Key=prefix + "manifest.json")["Body"].read()
    assert json.loads(again) == manifest

    compared = run_job(environment, "compare", slot, slot)
    assert compared.code == 0, compared.output
    assert "differ" not in compared.output
    assert f"{manifest['metrics']['eval_loss']:.4f}" in compared.output
    assert run_job(environment, "compare", slot, f"{slot}-other").code == 66
    assert run_job(environment, "compare", slot).code == 78


def test_a_real_model_learns_and_its_adapter_loads_from_the_bucket(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tmp_path: Path
) -> None:
    base_model = get_base_model()
    rows = (SHOP / "eval.jsonl").read_text().splitlines()[::3]
    s3_client.put_object(Bucket=bucket, Key="eval.jsonl", Body="\n".join(rows).encode())
    s3_client.upload_file(str(SHOP / "train.jsonl"), bucket, "train.jsonl")
    environment = job_environment(
        tmp_path,
        MODEL__ID=base_model,
        MODEL__DTYPE="float32",
        DATA__URI=f"s3://{bucket}/train.jsonl",
        DATA__EVAL_URI=f"s3://{bucket}/eval.jsonl",
        OUTPUT__URI=f"s3://{bucket}/out",
        TRAIN__MAX_STEPS=8,
        TRAIN__GLOBAL_BATCH_SIZE=4,
        TRAIN__LEARNING_RATE=1e-3,
    )
    ended = run_job(environment | seaweed.environment())
    assert ended.code == 0, ended.output
    slot = tmp_path / "downloaded"
    slot.mkdir()
    for item in s3_client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]:
        s3_client.download_file(bucket, item["Key"], str(slot / item["Key"].removeprefix("out/")))
    before, after = check_published_losses(slot, base_model, [json.loads(row) for row in rows])
    assert after < before - 0.3


def test_the_published_adapter_gives_the_loss_that_the_manifest_names(tiny_model: Path, tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    ended = run_job(
        job_environment(
            tmp_path,
            MODEL__ID=tiny_model,
            MODEL__DTYPE="float32",
            DATA__URI=SHOP / "train.jsonl",
            DATA__EVAL_URI=SHOP / "eval.jsonl",
            OUTPUT__URI=slot,
            TRAIN__EPOCHS=1,
            TRAIN__LEARNING_RATE=5e-3,
            TRAIN__PACKING="false",  # the real model's rows are joined, these are padded
        )
    )
    assert ended.code == 0, ended.output
    rows = [json.loads(line) for line in (SHOP / "eval.jsonl").read_text().splitlines()]
    before, after = check_published_losses(slot, tiny_model, rows)
    assert after < before


def check_published_losses(slot: Path, base_model: Path, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Load what was published, and compare the losses with and without it to those in its manifest."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = json.loads((slot / "manifest.json").read_text())["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(slot)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype="float32")
    # One row at a time, padded nowhere and joined to nothing: the job's own batching must not change the loss.
    before = answers_loss(base, tokenizer, rows)
    after = answers_loss(PeftModel.from_pretrained(base, slot), tokenizer, rows)
    assert before == pytest.approx(metrics["eval_loss_base"], rel=1e-4)
    assert after == pytest.approx(metrics["eval_loss"], rel=1e-4)
    return before, after


def answers_loss(model: object, tokenizer: object, rows: list[dict[str, str]]) -> float:
    """The mean loss per token of the answers and their end-of-turn tokens, computed independently of the job."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt_ids + answer_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt_ids) :], reduction="sum").item()
        count += len(answer_ids)
    return total / count


def test_two_processes_learn_what_one_learns(tiny_model: Path, tmp_path: Path) -> None:
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        ended = run_job(
            job_environment(
                folder,
                MODEL__ID=tiny_model,
                MODEL__DTYPE="float32",
                DATA__URI=SHOP / "train.jsonl",
                OUTPUT__URI=folder / "slot",
                LORA__DROPOUT=0,  # its random numbers are drawn by each process for itself
                TRAIN__MAX_STEPS=12,
                TRAIN__LEARNING_RATE=5e-3,
                PARALLEL__PROCESSES=processes,
            )
        )
        assert ended.code == 0, ended.output
        manifest = json.loads((folder / "slot" / "manifest.json").read_text())
        assert manifest["plan"]["processes"] == processes
        assert manifest["plan"]["global_batch_size"] == 8
        losses[processes] = [*read_losses(folder / "slot"), manifest["metrics"]["eval_loss"]]
    assert len(losses[1]) == 13
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    compared = run_job(job_environment(tmp_path), "compare", *(str(tmp_path / name / "slot") for name in ("1", "2")))
    differing = compared.output.split("Settings that differ\n")[1].split("Results")[0]
    follows = ("threads_per_process", "micro_batch_tokens")
    assert [line.split() for line in differing.splitlines() if not line.strip().startswith(follows)] == [
        ["SFT_PARALLEL__PROCESSES", "1", "2"],
        ["Plan", "that", "differs"],
        ["micro_batch_size", "8", "4"],
    ]
    assert losses[1][-1] < losses[1][0] - 0.1
