"""`make demo`: the job as a user would run it, on a real S3 server on loopback, with a real model and real data.

Everything is kept in `.cache/demo`, so that a second run finds the first one's adapter published. SFT_* variables are
passed on: `SFT_MODEL__ID=Qwen/Qwen2.5-0.5B-Instruct make demo` trains another base model.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from base_model import get_base_model
from seaweed import SeaweedFS

from job.evaluation import LossChange

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

ROOT = Path(__file__).parent.parent
DEMO = ROOT / ".cache" / "demo"
BUCKET = "demo"
MODEL = "models/SmolLM2-135M-Instruct"
PROMPTS = ["How long does delivery take, and when is it free?", "我的茶壺送來時破了，怎麼辦？"]  # noqa: RUF001


def main() -> int:
    """Run the demo and return its exit code, which is the job's."""
    signal.signal(signal.SIGTERM, _stop)
    say("1. A base model")
    base_model = get_base_model()
    say("2. An S3 server on loopback, with the data and the base model in it")
    with SeaweedFS(DEMO / "seaweed") as server:
        client = server.client()
        upload_inputs(client, base_model)
        show_listing(client, "")
        say("3. The job, with nothing but environment variables")
        environment = job_environment(server)
        for name in sorted(name for name in environment if name.startswith("SFT_")):
            print(f"   {name}={environment[name]}")
        code = run_job(environment)
        if code != 0:
            return code
        outcome = json.loads((DEMO / "termination.json").read_text())
        prefix = outcome["output"].removeprefix(f"s3://{BUCKET}/") + "/"
        say("4. What it published")
        show_listing(client, prefix)
        if outcome["message"] == "is published":
            adapter = download(client, prefix)
            say("5. What it learned")
            show_learning(adapter)
            show_answers(adapter)
        show_use(prefix)
    return 0


def say(title: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}", flush=True)


def upload_inputs(client: "S3Client", base_model: Path) -> None:
    """Put the sample data and the base model into the bucket, unless they are there."""
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    sources = {f"data/{file.name}": file for file in (ROOT / "tests" / "data" / "shop").iterdir()}
    sources |= {f"{MODEL}/{file.name}": file for file in base_model.iterdir()}
    there = {item["Key"]: item["Size"] for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    for key, source in sources.items():
        if there.get(key) != source.stat().st_size:
            client.upload_file(str(source), BUCKET, key)


def show_listing(client: "S3Client", prefix: str) -> None:
    """Print the bucket's objects under a prefix."""
    for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        print(f"   {item['Size']:>12,}  s3://{BUCKET}/{item['Key']}")


def job_environment(server: SeaweedFS) -> dict[str, str]:
    """Return this process's environment with the demo's settings where the user gave none."""
    settings = {
        "SFT_MODEL__ID": f"s3://{BUCKET}/{MODEL}",
        "SFT_DATA__URI": f"s3://{BUCKET}/data/train.jsonl",
        "SFT_DATA__EVAL_URI": f"s3://{BUCKET}/data/eval.jsonl",
        "SFT_OUTPUT__URI": f"s3://{BUCKET}/adapters/{{run_id}}",
        "SFT_TRAIN__LEARNING_RATE": "1e-3",
        "SFT_TRAIN__EPOCHS": "2",
        "SFT_EVAL__PROMPTS": json.dumps(PROMPTS),
        "SFT_EVAL__MAX_NEW_TOKENS": "80",
        "SFT_RUNTIME__LOG_FORMAT": "text",
        "SFT_RUNTIME__WORK_DIR": str(DEMO / "work"),
        "SFT_RUNTIME__TERMINATION_LOG": str(DEMO / "termination.json"),
    }
    return settings | dict(os.environ) | server.environment()


def run_job(environment: dict[str, str]) -> int:
    """Run `python -m job`, to its end also when this process is told to stop. (Ctrl-C tells both.)"""
    process = subprocess.Popen([sys.executable, "-m", "job"], env=environment, cwd=ROOT)
    try:
        return process.wait()
    except SystemExit:
        process.terminate()
        raise
    finally:
        process.wait()


def download(client: "S3Client", prefix: str) -> Path:
    """Fetch the published adapter."""
    folder = DEMO / "adapter"
    folder.mkdir(exist_ok=True)
    for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        client.download_file(BUCKET, item["Key"], str(folder / item["Key"].removeprefix(prefix)))
    return folder


def show_learning(adapter: Path) -> None:
    """Print the loss by step, and on the held-out rows before and after."""
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print("   loss by step:", " ".join(f"{loss:.2f}" for loss in losses))
    evaluation = json.loads((adapter / "evaluation.json").read_text())
    if evaluation["loss"] is not None:
        print(f"   held-out loss: {LossChange(**evaluation['loss']).describe()}")


def show_answers(adapter: Path) -> None:
    """Print what the base model and the adapter answered."""
    for sample in json.loads((adapter / "evaluation.json").read_text())["samples"]:
        print(f"   question: {sample['messages'][-1]['content'] if sample['messages'] else sample['prompt']}")
        print(f"   before:   {sample['before']}")
        print(f"   after:    {sample['after']}")


def show_use(prefix: str) -> None:
    """Print how to look at the report, and how to use the adapter."""
    say("How to look at it")
    print(f"   {DEMO / 'adapter' / 'report.html'}, in a browser")
    say("How to use it")
    print(f"   aws s3 cp --recursive s3://{BUCKET}/{prefix} adapter/")
    print('   model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_MODEL), "adapter")')
    print("   vllm serve BASE_MODEL --enable-lora --lora-modules shop=adapter")


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
