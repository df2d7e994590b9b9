"""A merged model through the command line: with new tokens, on a quantised base model, to S3, and asked for later."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bare_model import TEXTS, save_bare_model
from job_cli import job_environment, run_job
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


def read_slot(s3_client: "S3Client", bucket: str, folder: Path) -> dict[str, Any]:
    """Download what is published, and return the manifest."""
    names = [item["Key"] for item in s3_client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]]
    for name in names:
        path = folder / name.removeprefix("out/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3_client.download_file(bucket, name, str(path))
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    listed = {file["path"] for file in manifest["files"]}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *listed,
        "manifest.json",
    }
    return manifest


def check_verify(environment: dict[str, str], s3_client: "S3Client", bucket: str) -> None:
    """Verify what is published, with new tokens on a base model that is at hand, and then with one byte changed."""
    variables = {name: value for name, value in environment.items() if not name.startswith(("SFT_MODEL", "SFT_DATA"))}
    slot = f"s3://{bucket}/out"
    whole = run_job(variables, "verify", slot)
    assert whole.code == 0, whole.output
    assert "  every file is there, with the sha256 that the manifest lists\n" in whole.output
    assert f"  it loads onto {environment['SFT_MODEL__ID']}\n" in whole.output

    name = "out/adapter_model.safetensors"
    content = s3_client.get_object(Bucket=bucket, Key=name)["Body"].read()
    s3_client.put_object(Bucket=bucket, Key=name, Body=content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    damaged = run_job(variables, "verify", slot)
    assert damaged.code == 65, damaged.output
    assert damaged.outcome["message"] == (f"{slot}: 1 of what was published is damaged: adapter_model.safetensors")
    assert "  adapter_model.safetensors: has sha256 " in damaged.output
    s3_client.put_object(Bucket=bucket, Key=name, Body=content)
    nothing = run_job(variables, "verify", f"s3://{bucket}/elsewhere")
    assert nothing.code == 66, nothing.output


def test_merged_later_and_loaded_without_peft(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    environment = seaweed.environment() | job_environment(
        tmp_path,
        MODEL__ID=save_bare_model(tmp_path / "base", tied=True),
        MODEL__CHAT_TEMPLATE="chatml",
        MODEL__DTYPE="float32",
        DATA__URI=TEXTS,
        DATA__EVAL_FRACTION=0.2,
        OUTPUT__URI=f"s3://{bucket}/out",
        QUANTIZATION="nf4",
        LORA__DORA="true",
        TRAIN__MAX_STEPS=4,
        TRAIN__LEARNING_RATE=1e-2,
    )
    first = run_job(environment)
    assert first.code == 0, first.output
    assert "merging" not in first.output

    asked = environment | {"SFT_OUTPUT__MERGE": "true"}
    refused = run_job(asked)
    assert refused.code == 78, refused.output
    assert "SFT_OUTPUT__MERGE=true: this run is published at" in refused.outcome["message"]
    assert "SFT_OUTPUT__OVERWRITE=true" in refused.outcome["hint"]

    second = run_job(asked | {"SFT_OUTPUT__OVERWRITE": "true"})
    assert second.code == 0, second.output
    assert second.outcome["run_id"] == first.outcome["run_id"]
    manifest = read_slot(s3_client, bucket, tmp_path / "slot")
    merged = tmp_path / "slot" / "merged"
    assert {file["path"] for file in manifest["files"]} >= {
        "adapter_model.safetensors",
        *(f"merged/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")),
    }
    accepted = manifest["acceptance"]
    assert accepted["loss"] == pytest.approx(accepted["loss_trained"], rel=accepted["tolerance"])
    assert (accepted["rows"], accepted["skipped"]) == (5, None)
    takes = {verdict["engine"]: verdict["takes"] for verdict in manifest["serving"]["engines"]}
    assert (takes["Transformers with PEFT"], takes["vLLM"]) == (True, False)  # DoRA, and rows for new tokens
    assert "vllm serve out/merged" in manifest["serving"]["vllm"]
    metrics = manifest["metrics"]
    assert metrics["eval_loss_merged"] < metrics["eval_loss_base"]
    assert abs(metrics["eval_loss_merged"] - metrics["eval_loss"]) < 0.05
    card = (tmp_path / "slot" / "README.md").read_text()
    assert "dropout 0.05, DoRA |" in card
    assert f"| held-out loss of the merged model | {metrics['eval_loss_merged']:.4f} |" in card

    code = card.split("```python\n")
    for_adapter, for_merged = (part.split("```")[0].replace("this-folder", str(tmp_path / "slot")) for part in code[1:])
    loaded: dict[str, Any] = {}
    exec(for_adapter, loaded)
    adapted = loaded["model"].eval()
    exec(for_merged, loaded)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    known = len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert len(tokenizer) == model.config.vocab_size == known + 2
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in model.generation_config.eos_token_id
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    assert stop in ids
    assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not list(merged.glob("adapter*"))

    check_verify(environment, s3_client, bucket)

    third = run_job(asked)
    assert third.code == 0, third.output
    assert "already published" in third.output
    assert run_job(environment).code == 0  # with a merged model is as good as without
