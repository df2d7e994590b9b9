"""`sft-job check` and `sft-job schema`, and inputs from the Hub's stand-in, all through the command line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_stand_in import OWNER, HubStandIn
from job_cli import SHOP, job_environment, run_job
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

BOUNDS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def read_plan(output: str) -> dict[str, list[str]]:
    """Read the printed table: {name: [value, source]}."""
    rows = [line.split(maxsplit=2) for line in output.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in rows if len(row) == 3}


def test_check_for_gpus_that_are_elsewhere(tiny_model: Path, tmp_path: Path) -> None:
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        TRAIN__OPTIMIZER="paged_adamw_8bit",
        PARALLEL__ENGINE="fsdp2",
    )
    here = run_job(environment, "check")
    assert (here.code, "it needs a GPU" in here.outcome["message"]) == (78, True), here.output
    there = run_job(environment, "check", "--gpus", "4x80")
    assert there.code == 0, there.output
    plan = read_plan(there.output)
    assert plan["device"] == ["cuda", "found 4 x GPU with 80 GiB, assumed"]
    assert (plan["processes"][0], plan["dtype"][0], plan["engine"][0]) == ("4", "bfloat16", "fsdp2")
    assert "run out of memory" not in there.output
    tight = run_job(environment | {"SFT_PARALLEL__ENGINE": "ddp"}, "check", "--gpus", "1x0")
    assert "training may run out of memory" in tight.output
    for arguments in (("check", "--gpus", "four"), ("run", "--gpus", "4x80")):
        assert run_job(environment, *arguments).code == 78


def test_check_prints_the_plan_and_leaves_no_trace(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    s3_client.upload_file(str(SHOP / "train.jsonl"), bucket, "data/train.jsonl")
    environment = seaweed.environment() | job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=f"s3://{bucket}/data/train.jsonl",
        OUTPUT__URI=f"s3://{bucket}/out/{{run_id}}",
        LORA='{"r": 4}',
        TRAIN__LEARNING_RATE=1e-3,
        TRAIN__MAX_STEPS=7,
    )
    ended = run_job(environment, "check")
    assert ended.code == 0, ended.output
    assert (ended.outcome["code"], ended.outcome["name"]) == (0, "ok")
    assert ended.outcome["total_steps"] == 7
    assert ended.outcome["output"] == f"s3://{bucket}/out/{ended.outcome['run_id']}"
    plan = read_plan(ended.output)
    assert plan["steps"] == ["7", "SFT_TRAIN__MAX_STEPS"]
    assert plan["learning_rate"] == ["0.001", "SFT_TRAIN__LEARNING_RATE"]
    assert plan["lora_r"] == ["4", "SFT_LORA__R"]
    assert plan["lora_alpha"] == ["8", "auto: 2r"]
    assert plan["seed"] == ["42", "default"]
    assert plan["train_rows"] == ["72", "data"]
    assert plan["eval_rows"] == ["8", "data"]
    assert plan["packing"] == ["True", "auto: llama keeps joined rows apart"]
    assert ended.outcome["message"] == "is ready to train"
    assert "== training" not in ended.output
    assert "== fetching the base model" not in ended.output
    assert sorted(path.name for path in (tmp_path / "work" / "run").iterdir()) == ["plan.json", "xray.json"]
    keys = [item["Key"] for item in s3_client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert keys == ["data/train.jsonl"]


def test_a_base_model_whose_weights_are_quantised_in_another_way_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    configuration = json.loads((model / "config.json").read_text())
    configuration["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(configuration))
    environment = job_environment(
        tmp_path, MODEL__ID=model, DATA__URI=SHOP / "train.jsonl", OUTPUT__URI=tmp_path / "slot"
    )
    ended = run_job(environment, "check")
    assert ended.code == 78, ended.output
    assert f"SFT_MODEL__ID={model}: its weights are stored quantised (gptq)" in ended.outcome["message"]


@pytest.fixture(scope="module")
def hub_run(hub: HubStandIn, tiny_model: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The tiny model and the shop's rows on the stand-in: settings that name them, and their commits."""
    hub.reset()
    model = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    commits = {
        "model": hub.add("models", "camellia/tiny-llama", model | {".gitattributes": b"*.safetensors filter=lfs\n"}),
        "data": hub.add("datasets", "camellia/shop", {"data/train.jsonl": (SHOP / "train.jsonl").read_bytes()}),
    }
    settings = {
        "SFT_MODEL__ID": "camellia/tiny-llama",
        "SFT_DATA__URI": "hf://datasets/camellia/shop/data/*.jsonl",
        "SFT_DATA__EVAL_FRACTION": "0",
        "SFT_TRAIN__MAX_STEPS": "2",
    }
    return settings, commits


def test_check_reads_the_hub_without_fetching_weights(
    hub: HubStandIn, hub_run: tuple[dict[str, str], dict[str, str]], tmp_path: Path
) -> None:
    settings, commits = hub_run
    environment = job_environment(tmp_path, OUTPUT__URI=tmp_path / "slot") | hub.environment(tmp_path / "hf")
    hub.requests.clear()
    ended = run_job(environment | settings, "check")
    assert ended.code == 0, ended.output
    plan = read_plan(ended.output)
    assert plan["model_id"] == ["camellia/tiny-llama", "SFT_MODEL__ID"]
    assert plan["model_revision"] == [commits["model"], "resolved"]
    assert plan["train_rows"] == ["80", "data"]
    assert any("/config.json" in request for request in hub.requests)
    assert [request for request in hub.requests if ".safetensors" in request] == []
    assert list((tmp_path / "slot").rglob("*")) == []


def test_a_run_from_the_hub_names_the_commit_it_used(
    hub: HubStandIn, hub_run: tuple[dict[str, str], dict[str, str]], tmp_path: Path
) -> None:
    settings, commits = hub_run
    slot = tmp_path / "slot"
    environment = job_environment(tmp_path, OUTPUT__URI=slot) | hub.environment(tmp_path / "hf")
    ended = run_job(environment | settings | {"SFT_MODEL__REVISION": "main"})
    assert ended.code == 0, ended.output
    config = json.loads((slot / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "camellia/tiny-llama"
    assert config["revision"] == commits["model"]
    manifest = json.loads((slot / "manifest.json").read_text())
    assert manifest["base_model"] == {"id": "camellia/tiny-llama", "revision": commits["model"]}
    assert manifest["metrics"]["steps"] == 2
    assert [(data["uri"], data["rows"]) for data in manifest["data"]] == [
        (f"hf://datasets/camellia/shop@{commits['data']}/data/train.jsonl", 80)
    ]


def test_check_of_an_output_on_the_hub_leaves_nothing_there(hub: HubStandIn, tiny_model: Path, tmp_path: Path) -> None:
    hub.reset()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    environment = job_environment(
        tmp_path, MODEL__ID=tiny_model, DATA__URI=rows, OUTPUT__URI="hf://camellia/checked-{run_id}"
    )
    environment |= hub.environment(tmp_path / "hf") | {"HF_TOKEN": "hf_secretsecretsecret"}
    before = set(hub.repositories)
    ended = run_job(environment, "check")
    assert ended.code == 65, ended.output
    [kept] = (tmp_path / "work" / "slots").rglob("bad_rows.jsonl")
    assert str(kept) in ended.outcome["message"] + ended.outcome["hint"]

    hub.who = OWNER | {"auth": {"accessToken": {"role": "read"}}}
    ended = run_job(environment, "check")
    assert ended.code == 77, ended.output
    assert "the token in HF_TOKEN may only read" in ended.outcome["message"]

    # Rights are as needed where another run is to be replaced.
    hub.add("models", "camellia/taken", {"manifest.json": b'{"run_id": "another", "files": []}'})
    before.add(("models", "camellia/taken"))
    hub.who, hub.read_only = OWNER, {"camellia/taken"}
    taken = {"SFT_OUTPUT__URI": "hf://camellia/taken", "SFT_OUTPUT__OVERWRITE": "true", "SFT_DATA__BAD_ROWS": "skip"}
    ended = run_job(environment | taken | {"SFT_DATA__MAX_BAD_FRACTION": "0.9"}, "check")
    assert ended.code == 77, ended.output
    assert environment["HF_TOKEN"] not in ended.output + json.dumps(ended.outcome)
    assert set(hub.repositories) == before


def test_a_revision_that_the_hub_lacks(
    hub: HubStandIn, hub_run: tuple[dict[str, str], dict[str, str]], tmp_path: Path
) -> None:
    settings, _ = hub_run
    environment = job_environment(tmp_path, OUTPUT__URI=tmp_path / "slot") | hub.environment(tmp_path / "hf")
    ended = run_job(environment | settings | {"SFT_MODEL__REVISION": "v9"}, "check")
    assert ended.code == 66, ended.output
    assert "camellia/tiny-llama@v9: no such revision" in ended.outcome["message"]
    assert ended.outcome["hint"]
    assert "Traceback" not in ended.output


def test_schema_describes_every_setting(tmp_path: Path) -> None:
    environment = job_environment(tmp_path)  # no settings are needed to print what they are
    ended = run_job(environment, "schema")
    assert ended.code == 0, ended.output
    schema = json.loads(ended.output)
    leaves = dict(find_leaves(schema))
    assert {"model.id", "train.learning_rate", "runtime.work_dir"} <= set(leaves)
    assert len(leaves) > 30
    wrong = [f"{name}: {fault}" for name, leaf in leaves.items() for fault in find_faults(**leaf)]
    assert wrong == []
    required = {name for name, leaf in leaves.items() if leaf["is_required"]}
    assert required == {"model.id", "data.uri", "output.uri"}
    assert schema["additionalProperties"] is False


def find_leaves(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of each group, and each setting that stands alone, with its schema."""
    for group, reference in schema["properties"].items():
        if "$ref" not in reference:
            yield group, {"leaf": reference, "is_required": group in schema.get("required", [])}
            continue
        definition = schema["$defs"][reference["$ref"].rsplit("/", 1)[1]]
        assert definition["additionalProperties"] is False
        for field, leaf in definition["properties"].items():
            yield f"{group}.{field}", {"leaf": leaf, "is_required": field in definition.get("required", [])}


def find_faults(leaf: dict[str, Any], *, is_required: bool) -> list[str]:
    faults = []
    if len(leaf.get("description", "")) < 10:
        faults.append("no description")
    if ("default" in leaf) == is_required:
        faults.append("required with a default, or neither")
    forms = leaf.get("anyOf", [leaf])
    numbers = [form for form in forms if form.get("type") in ("integer", "number")]
    if numbers and not leaf.get("unit"):
        faults.append("a number without a unit")
    faults += ["a number without bounds" for form in numbers for names in BOUNDS if not set(names) & set(form)]
    return faults
