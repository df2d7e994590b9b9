"""Every way the job can refuse, through its command line: the exit code, the termination log, a message that names the
setting or line and the remedy, an output slot left empty, and no secret anywhere."""

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from job_cli import SHOP, TIMEOUT_S, Ended, job_environment, run_job, start_job
from seaweed import READ_ONLY_BUCKET, SeaweedFS

from job.errors import EXIT_CODES

if TYPE_CHECKING:
    import torch
    from types_boto3_s3 import S3Client

NAMES = {ending.code: ending.name for ending in EXIT_CODES}
ROWS = (SHOP / "train.jsonl").read_text().splitlines()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def on_s3(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """A job that would succeed: data and output in S3. Afterwards nothing of an adapter may be in its output slot."""
    put_rows(s3_client, bucket, ROWS)
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=f"s3://{bucket}/data/train.jsonl",
        OUTPUT__URI=f"s3://{bucket}/out",
        TRAIN__MAX_STEPS=2,
    )
    yield environment | seaweed.environment()
    assert list_keys(s3_client, bucket, "out") in ([], ["out/bad_rows.jsonl"])  # the list of what ended the job


@pytest.fixture
def on_disk(tiny_model: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A job that would succeed: all on the disk. Afterwards its output slot must be empty."""
    slot = tmp_path / "slot"
    yield job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=slot,
        TRAIN__MAX_STEPS=10,
    )
    assert list(slot.rglob("*")) == []


def put_rows(s3_client: "S3Client", bucket: str, rows: list[str]) -> None:
    s3_client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=("\n".join(rows) + "\n").encode())


def list_keys(s3_client: "S3Client", bucket: str, prefix: str) -> list[str]:
    listing = s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for item in listing.get("Contents", [])]


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_ended(ended: Ended, environment: dict[str, str], code: int, *words: str) -> None:
    """Check how a job ended, and that `words` are in its message."""
    assert ended.code == code, ended.output
    outcome = ended.outcome
    assert (outcome["code"], outcome["name"]) == (code, NAMES[code])
    assert [word for word in words if word not in outcome["message"]] == [], outcome["message"]
    assert outcome["hint"], outcome
    assert outcome["message"].splitlines()[0] in ended.output
    assert outcome["hint"].splitlines()[0] in ended.output
    assert "Traceback" not in ended.output
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if name in environment:
            assert environment[name] not in ended.output + json.dumps(outcome)


def refuse(environment: dict[str, str], code: int, *words: str) -> Ended:
    """Run a job that must end with this code before it trains, and these words in its message."""
    ended = run_job(environment)
    assert_ended(ended, environment, code, *words)
    assert "step 1/" not in ended.output
    return ended


# -- S3 ----------------------------------------------------------------------------------------------------------------


def test_wrong_secret(on_s3: dict[str, str]) -> None:
    right = on_s3["AWS_SECRET_ACCESS_KEY"]
    on_s3["AWS_SECRET_ACCESS_KEY"] = "wrong" + right[5:]
    refuse(on_s3, 77, "SFT_OUTPUT__URI=s3://", "the secret does not fit the access key id")


def test_unknown_access_key(on_s3: dict[str, str]) -> None:
    on_s3["AWS_ACCESS_KEY_ID"] = "AKIDUNKNOWN123456"
    refuse(on_s3, 77, "SFT_OUTPUT__URI=s3://", "the access key id is unknown there")


def test_no_credentials(on_s3: dict[str, str]) -> None:
    del on_s3["AWS_ACCESS_KEY_ID"], on_s3["AWS_SECRET_ACCESS_KEY"]
    ended = refuse(on_s3, 77, "SFT_OUTPUT__URI=s3://", "no AWS credentials found")
    assert "AWS_SECRET_ACCESS_KEY" in ended.outcome["hint"]


def test_an_identity_that_may_only_read(
    seaweed: SeaweedFS, s3_client: "S3Client", tiny_model: Path, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket=READ_ONLY_BUCKET, Key="data/train.jsonl", Body="\n".join(ROWS).encode())
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=f"s3://{READ_ONLY_BUCKET}/data/train.jsonl",
        OUTPUT__URI=f"s3://{READ_ONLY_BUCKET}/out",
    )
    environment |= seaweed.read_only_environment()
    refuse(environment, 77, f"SFT_OUTPUT__URI=s3://{READ_ONLY_BUCKET}/out", "access denied")
    assert list_keys(s3_client, READ_ONLY_BUCKET, "out") == []


@pytest.mark.parametrize(
    ("name", "uri", "words"),
    [
        ("SFT_DATA__URI", "s3://{bucket}/data/trian.jsonl", "nothing is there"),
        ("SFT_DATA__URI", "s3://{bucket}/data/empty/", "nothing is there"),
        ("SFT_DATA__URI", "s3://{bucket}/data/*.csv", "the glob matches nothing"),
        ("SFT_DATA__URI", "s3://{bucket}-none/data/train.jsonl", "no such bucket"),
        ("SFT_DATA__EVAL_URI", "s3://{bucket}/data/eval.jsonl", "nothing is there"),
        ("SFT_MODEL__ID", "s3://{bucket}/models/none", "nothing is there"),
        ("SFT_OUTPUT__URI", "s3://{bucket}-none/out", "no such bucket"),
    ],
)
def test_nothing_is_there(on_s3: dict[str, str], bucket: str, name: str, uri: str, words: str) -> None:
    on_s3[name] = uri.format(bucket=bucket)
    refuse(on_s3, 66, f"{name}={on_s3[name]}", words)


def test_closed_port(on_s3: dict[str, str], closed_port: int) -> None:
    on_s3["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{closed_port}"
    ended = refuse(on_s3, 69, "SFT_OUTPUT__URI=s3://", f"127.0.0.1:{closed_port} can't be reached")
    assert "AWS_ENDPOINT_URL_S3" in ended.outcome["hint"]


@pytest.mark.parametrize("endpoint", ["seaweed:8333", "not a url", "http://127.0.0.1:port"])
def test_malformed_endpoint(on_s3: dict[str, str], endpoint: str) -> None:
    on_s3["AWS_ENDPOINT_URL_S3"] = endpoint
    refuse(on_s3, 78, "AWS_ENDPOINT_URL_S3", "is not a URL")


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "completion": "b"', "not valid JSON"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
    ],
)
def test_a_bad_row_in_line_17(
    on_s3: dict[str, str], s3_client: "S3Client", bucket: str, line: str, reason: str
) -> None:
    put_rows(s3_client, bucket, [*ROWS[:16], line, *ROWS[17:]])
    refuse(on_s3, 65, "1 of 80 rows", "train.jsonl:17: ", reason)


def test_messages_without_a_chat_template(on_disk: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path, without=("chat_template.jinja",))
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = write_rows(tmp_path / "chats.jsonl", [conversation] * 20)
    ended = refuse(on_disk | {"SFT_MODEL__ID": str(model), "SFT_DATA__URI": str(data)}, 65, "chat template")
    assert "chats.jsonl" in ended.outcome["message"]


# -- base model --------------------------------------------------------------------------------------------------------


def copy_model(model: Path, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    target = folder / "model"
    shutil.copytree(model, target)
    for name in without:
        (target / name).unlink()
    return target


def test_model_folder_is_missing(on_disk: dict[str, str], tmp_path: Path) -> None:
    on_disk["SFT_MODEL__ID"] = str(tmp_path / "none")
    refuse(on_disk, 66, f"SFT_MODEL__ID={tmp_path / 'none'}", "nothing is there")


def test_model_without_configuration(on_disk: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    on_disk["SFT_MODEL__ID"] = str(copy_model(tiny_model, tmp_path, without=("config.json",)))
    refuse(on_disk, 66, f"SFT_MODEL__ID={tmp_path / 'model'}", "no config.json")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_model_with_a_broken_configuration(
    on_disk: dict[str, str], tiny_model: Path, tmp_path: Path, content: str
) -> None:
    model = copy_model(tiny_model, tmp_path)
    (model / "config.json").write_text(content)
    on_disk["SFT_MODEL__ID"] = str(model)
    refuse(on_disk, 78, f"SFT_MODEL__ID={model}", "config.json")


def test_model_with_pickled_weights_only(on_disk: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    on_disk["SFT_MODEL__ID"] = str(model)
    ended = refuse(on_disk, 66, f"SFT_MODEL__ID={model}", "no safetensors weights")
    assert ".bin" in ended.outcome["hint"]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_target_modules_that_the_model_lacks(on_disk: dict[str, str]) -> None:
    ended = refuse(on_disk | {"SFT_LORA__TARGET_MODULES": "q_proj,nonsense"}, 78, "SFT_LORA__TARGET_MODULES=nonsense")
    assert "== training" in ended.output  # it is the worker that knows
    assert "q_proj" in ended.outcome["hint"]
    assert "down_proj" in ended.outcome["hint"]


@pytest.mark.parametrize(
    "length", [{"SFT_TRAIN__MAX_STEPS": "10"}, {"SFT_TRAIN__MAX_STEPS": "", "SFT_TRAIN__EPOCHS": "1"}]
)
def test_warmup_beyond_the_run(on_disk: dict[str, str], length: dict[str, str]) -> None:
    refuse(on_disk | length | {"SFT_TRAIN__WARMUP": "100"}, 78, "SFT_TRAIN__WARMUP=100", "10 steps", "only 9 %")


def test_max_length_beyond_the_context(on_disk: dict[str, str]) -> None:
    refuse(on_disk | {"SFT_DATA__MAX_LENGTH": "513"}, 78, "SFT_DATA__MAX_LENGTH=513", "context is 512 tokens")


def test_impossible_batch_is_refused_before_any_download(on_s3: dict[str, str], closed_port: int) -> None:
    on_s3 |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{closed_port}",
        "SFT_TRAIN__GLOBAL_BATCH_SIZE": "7",
        "SFT_PARALLEL__PROCESSES": "2",
    }
    ended = refuse(on_s3, 78, "SFT_TRAIN__GLOBAL_BATCH_SIZE=7", "2 processes")
    assert "multiple of 2" in ended.outcome["hint"]


@pytest.mark.parametrize("argument", ["--learning-rate=1", "train"])
def test_unknown_arguments(on_disk: dict[str, str], argument: str) -> None:
    ended = run_job(on_disk, argument)
    assert_ended(ended, on_disk, 78, argument.split("=", maxsplit=1)[0])


def test_work_dir_of_a_running_job(on_s3: dict[str, str], silent_port: int, tmp_path: Path) -> None:
    waiting = on_s3 | {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent_port}",
        "SFT_RUNTIME__TERMINATION_LOG": str(tmp_path / "first.json"),
    }
    with start_job(waiting) as first:
        try:
            assert first.stdout is not None
            assert any("== reading the inputs" in line for line in first.stdout)
            refuse(on_s3, 78, f"SFT_RUNTIME__WORK_DIR={tmp_path / 'work'}", "another job is using it")
            assert first.poll() is None
        finally:
            first.kill()


def test_every_wrong_setting_is_named_at_once(on_disk: dict[str, str]) -> None:
    on_disk |= {"SFT_LERNING_RATE": "1", "SFT_TRAIN__LERNING_RATE": "1", "SFT_LORA__R": "0"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    refuse(
        on_disk,
        78,
        "SFT_LERNING_RATE: unknown setting, did you mean SFT_TRAIN__LEARNING_RATE?",
        "SFT_TRAIN__LERNING_RATE: unknown setting, did you mean SFT_TRAIN__LEARNING_RATE?",
        "SFT_LORA__R=0: must be at least 1",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    imported = find_imports(on_disk, 78)
    assert "pydantic" in imported  # so that the next line can fail
    assert imported & {"torch", "transformers", "numpy", "boto3"} == set()


def test_the_parent_never_imports_torch(on_disk: dict[str, str]) -> None:
    imported = find_imports(on_disk, 0, "check")
    assert {"transformers", "numpy"} <= imported
    assert "torch" not in imported


def find_imports(environment: dict[str, str], code: int, *arguments: str) -> set[str]:
    """Run the job and return the top-level modules that it imported, or tried to."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "job", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ran.returncode == code, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_slot_that_another_run_has_taken(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    def read_run_id() -> str:
        body = s3_client.get_object(Bucket=bucket, Key="out/manifest.json")["Body"].read()
        run_id: str = json.loads(body)["run_id"]
        return run_id

    environment = seaweed.environment() | job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{bucket}/out",
        TRAIN__MAX_STEPS=2,
    )
    first = run_job(environment)
    assert first.code == 0, first.output
    assert read_run_id() == first.outcome["run_id"]

    environment["SFT_TRAIN__SEED"] = "1"
    refused = refuse(environment, 78, f"SFT_OUTPUT__URI=s3://{bucket}/out", first.outcome["run_id"])
    assert refused.outcome["run_id"] != first.outcome["run_id"]
    assert refused.outcome["run_id"] in refused.outcome["message"]
    assert "SFT_OUTPUT__OVERWRITE=true" in refused.outcome["hint"]
    assert "== tokenizing" not in refused.output
    assert read_run_id() == first.outcome["run_id"]

    replaced = run_job(environment | {"SFT_OUTPUT__OVERWRITE": "true"})
    assert replaced.code == 0, replaced.output
    assert replaced.outcome["run_id"] == refused.outcome["run_id"]
    assert read_run_id() == refused.outcome["run_id"]


def edit_weights(model: Path, edit: Callable[[dict[str, "torch.Tensor"]], None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_loss_that_leaves_the_numbers(on_disk: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    def move_to_the_edge(weights: dict[str, "torch.Tensor"]) -> None:
        # The same function as before, but with numbers in its middle that the gate can drive beyond float32.
        weights["model.layers.1.mlp.up_proj.weight"] *= 1e33
        weights["model.layers.1.mlp.down_proj.weight"] *= 1e-33

    model = copy_model(tiny_model, tmp_path)
    edit_weights(model, move_to_the_edge)
    on_disk |= {
        "SFT_MODEL__ID": str(model),
        "SFT_MODEL__DTYPE": "float32",
        "SFT_LORA__TARGET_MODULES": "gate_proj",
        "SFT_LORA__R": "1",
        "SFT_LORA__ALPHA": "8192",
        "SFT_TRAIN__LEARNING_RATE": "1",
        "SFT_TRAIN__SCHEDULER": "constant",
        "SFT_TRAIN__MAX_STEPS": "100",
    }
    ended = run_job(on_disk)
    assert_ended(ended, on_disk, 80, "of 100: loss nan", "learning rate 1")
    assert 1 < ended.outcome["step"] < 100
    assert f"step {ended.outcome['step']} of 100" in ended.outcome["message"]
    assert ended.outcome["total_steps"] == 100
    assert "step 1/100  loss 10." in ended.output  # it began well
    assert "SFT_TRAIN__LEARNING_RATE=0.25" in ended.outcome["hint"]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_base_model_with_infinite_weights(
    on_disk: dict[str, str], tiny_model: Path, tmp_path: Path, packing: str
) -> None:
    def break_one(weights: dict[str, "torch.Tensor"]) -> None:
        weights["model.norm.weight"][3] = float("inf")

    model = copy_model(tiny_model, tmp_path)
    edit_weights(model, break_one)
    on_disk |= {"SFT_MODEL__ID": str(model), "SFT_TRAIN__PACKING": packing}
    ended = run_job(on_disk)
    assert_ended(ended, on_disk, 80, f"SFT_MODEL__ID={model}", "NaN or infinite")
    assert ended.outcome["step"] == 0
    assert "SFT_TRAIN__LEARNING_RATE" not in ended.outcome["hint"]  # it isn't to blame


def test_prompts_that_cannot_be_asked(on_disk: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    on_disk["SFT_EVAL__PROMPTS"] = str(path)
    refuse(on_disk, 66, f"SFT_EVAL__PROMPTS={path}")
    write_rows(path, ["Who are you?", {"question": "And you?"}])
    refuse(on_disk, 65, "prompts.jsonl:2: not a prompt")
    on_disk["SFT_EVAL__PROMPTS"] = '[[{"role": "boss", "content": "Who are you?"}]]'
    refuse(on_disk, 78, "SFT_EVAL__PROMPTS[0]: messages[0] has the role 'boss'")
