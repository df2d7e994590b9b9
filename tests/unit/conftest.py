"""Settings, machines and plans for tests that need no process and no server."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from job.hardware import Gpu, Hardware
from job.log import SECRET_VARIABLES
from job.memory.model_shape import ModelShape, read_model_shape
from job.parallel import plan_parallel
from job.plan import DataFacts, TrainPlan, make_plan
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
        amx: bool = False,
        host_gib: float = 64,
    ) -> Hardware:
        gpu = Gpu(name="Test GPU", memory_bytes=int(gpu_gib * 2**30), compute_capability=capability)
        return Hardware((gpu,) * gpus, "Test CPU", cores, amx, int(host_gib * 2**30))

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
