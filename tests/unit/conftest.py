"""Settings, machines and plans for tests that need no process and no server."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from job.accept import Acceptance
from job.evaluation import Evaluation, LossChange, RowLoss, Sample
from job.hardware import Gpu, Hardware
from job.log import SECRET_VARIABLES
from job.manifest import DataFile
from job.memory.model_shape import ModelShape, read_model_shape
from job.parallel import plan_parallel
from job.plan import DataFacts, TrainPlan, make_plan
from job.record import PublishedFile, RunRecord
from job.serving import EngineVerdict
from job.settings import Settings, load_settings

# SmolLM2-135M's
SMALL_SHAPE = read_model_shape(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    stored_bytes=269_060_552,
)
METRICS = {
    "trainable_parameters": 1234,
    "total_parameters": 567_890,
    "steps": 20,
    "tokens": 19_160,
    "tokens_per_second": 105.3,
    "train_seconds": 182.0,
    "train_loss": 1.9,
    "peak_memory_bytes": 2 * 2**30,
    "eval_loss_base": 3.0344,
    "eval_loss": 1.3376,
}
CHANGE = LossChange(
    rows=12, supervised_tokens=700, loss_base=3.0344, loss=1.3376, change=-1.6968, change_low=-1.86, change_high=-1.52
)
ROWS = [
    RowLoss(line=f"eval.jsonl:{row}", supervised_tokens=60, loss_base=2.5 + row / 12, loss=1.0 + row / 16)
    for row in range(1, 13)
]
SAMPLES = [
    Sample(
        messages=[{"role": "user", "content": "請問多久會收到商品"}],
        prompt="user: 請問多久會收到商品",
        reference="您好 這裡是山茶小舖 訂單付款後 1 到 3 個工作天就會送達",
        before="I am not sure.",
        after="您好 這裡是山茶小舖",
    )
]
XRAY: dict[str, Any] = {
    "files": [{"name": "s3://bucket/train.jsonl", "format": "prompt/completion", "rows": 100, "weight": 1.0}],
    "read": 112,
    "kept": 112,
    "skipped": {},
    "too_long": {},
    "max_length_tokens": 192,
    "truncation": "drop",
    "train": 100,
    "held_out": 12,
    "held_out_in_train": 0,
    "tokens": 9580,
    "supervised_tokens": 5861,
    "lengths": {"p50": 135, "p90": 175, "p99": 186, "max": 186, "histogram": [[64, 3], [128, 60], [192, 49]]},
    "turn_end": {
        "rows_by_token": {"<|im_end|>": 112},
        "rows_that_stop": 112,
        "stop_tokens": ["<|im_end|>"],
        "pad_token": None,
        "adopted": None,
    },
    "duplicates": 3,
    "with_oddity": {},
    "samples": [[{"text": "user: hello\n", "supervised": False}, {"text": "Hi.<|im_end|>", "supervised": True}]],
    "warnings": [],
}
REQUIRED = {"MODEL__ID": "org/model", "DATA__URI": "/data/train.jsonl", "OUTPUT__URI": "/out"}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's own settings and credentials."""
    for name in list(os.environ):
        if name.upper().startswith("SFT_") or name in SECRET_VARIABLES:
            monkeypatch.delenv(name)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Load the settings from these variables (without prefix; None: not set) and the required ones."""

    def load_from(**variables: object) -> Settings:
        for name in [name for name in os.environ if name.upper().startswith("SFT_")]:
            monkeypatch.delenv(name)
        for name, value in (REQUIRED | variables).items():
            if value is not None:
                monkeypatch.setenv(f"SFT_{name}", str(value))
        return load_settings()

    return load_from


@pytest.fixture
def machine() -> Callable[..., Hardware]:
    """A machine with some GPUs of one kind, or none."""

    def make(
        *,
        gpus: int = 0,
        capability: tuple[int, int] = (9, 0),
        gpu_gib: float = 80,
        cores: int = 8,
        bf16: str | None = None,
        host_gib: float = 64,
    ) -> Hardware:
        gpu = Gpu(name="Test GPU", memory_bytes=int(gpu_gib * 2**30), compute_capability=capability)
        return Hardware((gpu,) * gpus, "Test CPU", cores, bf16, int(host_gib * 2**30))

    return make


@pytest.fixture
def small_shape() -> ModelShape:
    """The shape of the base model that `facts` is about."""
    return SMALL_SHAPE


@pytest.fixture
def facts() -> Callable[..., DataFacts]:
    """What is known of a data set of 100 rows, but for what a test changes."""

    def make(**changes: Any) -> DataFacts:
        values: dict[str, Any] = {
            "model_revision": "abc123",
            "model_type": "llama",
            "shape": SMALL_SHAPE,
            "chat_template": "the tokenizer's own",
            "max_length_tokens": 512,
            "max_length_source": "auto",
            "truncation": "drop",
            "train_rows": 100,
            "eval_rows": 10,
            "train_tokens": 20_000,
            "supervised_tokens": 5_000,
        }
        return DataFacts(**(values | changes))

    return make


@pytest.fixture
def plan_for(
    load: Callable[..., Settings], machine: Callable[..., Hardware], facts: Callable[..., DataFacts]
) -> Callable[..., TrainPlan]:
    """The whole plan for some settings, on a machine and data of the defaults above."""

    def make(
        hardware: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **variables: object
    ) -> TrainPlan:
        settings = load(**variables)
        return make_plan(settings, plan_parallel(settings, machine(**(hardware or {}))), facts(**(data or {})))

    return make


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Give the test the root logger, and take it back as it was."""
    root, job = logging.getLogger(), logging.getLogger("sft_job")
    kept = root.handlers[:], root.level, job.level
    root.handlers[:] = []
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = kept[0], kept[1]
    job.setLevel(kept[2])


def describe_step(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 3 / (1 + step / 10),
        "grad_norm": 0.8,
        "learning_rate": 1e-3 * (1 - step / 20),
        "tokens": 958 * step,
        "elapsed_s": 9.1 * step,
    }


@pytest.fixture
def record_for(
    load: Callable[..., Settings], machine: Callable[..., Hardware], plan_for: Callable[..., TrainPlan]
) -> Callable[..., RunRecord]:
    """The record of a run of 20 steps with 12 held-out rows, with some settings, but for what a test changes."""

    def make(
        hardware: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
        **variables: object,
    ) -> RunRecord:
        plan = plan_for(hardware, {"eval_rows": 12} | (data or {}), **variables)
        settings = load(**variables)
        values: dict[str, Any] = {
            "run_id": "0123456789abcdef",
            "job_version": "1.2.3",
            "created_at": "2026-11-28T12:00:00+00:00",
            "output": "s3://bucket/adapters/0123456789abcdef",
            "settings": settings.model_dump(mode="json"),
            "given": settings.model_dump(mode="json", exclude_unset=True),
            "plan": plan,
            "hub_revision": None,
            "hardware": machine(**(hardware or {})),
            "data": [DataFile("s3://bucket/train.jsonl", "etag", "5a" * 32, 1000, 100, 1.0)],
            "packages": {"torch": "2.13.0", "peft": "0.21.2"},
            "metrics": METRICS,
            "steps": [describe_step(step) for step in range(1, 21)],
            "phases": {"start": 0.4, "steps": 182.0, "other": 0.1},
            "evaluation": Evaluation(loss=CHANGE, rows=ROWS, samples=SAMPLES, problems=[]),
            "acceptance": Acceptance(rows=4, loss=1.3391, loss_trained=1.339, tolerance=0.01, skipped=None),
            "engines": [EngineVerdict("vLLM", True, ""), EngineVerdict("TGI", False, "no DoRA")],
            "serve_command": "vllm serve org/model --enable-lora --lora-modules adapter=adapter",
            "warnings": ["3 rows repeat another"],
            "xray": XRAY,
            "files": [PublishedFile("adapter_model.safetensors", "ab" * 32, 12_345_678)],
        }
        return RunRecord(**(values | (changes or {})))

    return make
