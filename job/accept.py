"""Acceptance: what a fresh process, which knows nothing of the training, must find again in what was published.

The workers leave some rows with the trained model's loss on each; the process loads the adapter onto the base model in
the way its users do, and must get the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from job.parallel import Dtype
from job.plan import TrainPlan
from job.support import Quantization

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# How far losses may lie apart, as a share of the trained model's, for it to be rounding. By the same kernels they lie
# 4e-8 apart in float32 and 1e-4 in bfloat16 (measured on a CPU). Another kernel adds up in another order, which moves a
# logit of 16 to 32 by 0.125 in bfloat16, its last bit, and so a short row's loss by about 1 %; and ZeRO computes with
# copies of the trained weights in the base's precision. To refuse what is sound would cost a run.
_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_QUANTIZED_TOLERANCE = 1e-2  # what is computed inside is in 16 bits or 8, whatever the model's precision
_COMMIT_DIGITS = 40  # a git commit; the revision of a model elsewhere is a sha256


class Acceptance(BaseModel):
    """What came of it: the mean loss per supervised token on some rows, in nats, in a fresh process and at the end of
    the training; how far they may be apart, as a share of the latter; or why it could not be tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = 0
    loss: float | None = None
    loss_trained: float | None = None
    tolerance: float | None = None
    skipped: str | None = None

    def describe(self) -> str:
        """Say it in a line."""
        if self.skipped is not None:
            return f"not loaded back in a fresh process: {self.skipped}"
        return (
            f"loaded back in a fresh process: loss {self.loss:.4f} on {self.rows} rows, {self.loss_trained:.4f} when "
            "trained"
        )


class AcceptanceRow(BaseModel):
    """T tokens of a row, their labels (-100 = not supervised), and the trained model's loss on them: the sum over the
    supervised tokens, in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_ids: list[int]
    labels: list[int]
    loss_sum: float
    supervised_tokens: int


ROWS = TypeAdapter(list[AcceptanceRow])


class AcceptanceTask(BaseModel):
    """What the fresh process is told: how the base model in `model_folder` is held (`plan`), the new tokens' ids by
    their text, and the rows. Without rows, the adapter must load and give numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: TrainPlan
    model_folder: Path
    new_token_ids: dict[str, int]
    rows: list[AcceptanceRow]
    log_format: Literal["auto", "text", "json"]
    log_level: str


def find_tolerance(dtype: Dtype, quantization: Quantization) -> float:
    """Return how far two losses may lie apart, as a share, and still be the same but for rounding."""
    tolerance = _TOLERANCE[dtype]
    return tolerance if quantization == "none" else max(tolerance, _QUANTIZED_TOLERANCE)


def name_base_model(model_id: str, revision: str) -> tuple[str, str | None]:
    """Return the name and the revision of a base model as adapter_config.json has them, for PEFT and its like to load.

    `model_id` is SFT_MODEL__ID, `revision` what it resolved to: only a Hub model's is one that can be asked for.
    """
    if len(revision) != _COMMIT_DIGITS:
        return model_id, None
    return model_id.removeprefix("hf://").partition("@")[0], revision


def find_wrong_config(config: Mapping[str, Any], plan: Mapping[str, Any]) -> str | None:
    """Return what an adapter's configuration says otherwise than the plan that it was trained by, if anything."""
    name, revision = name_base_model(plan["model_id"], plan["model_revision"])
    expected = {
        "base_model_name_or_path": name,
        "revision": revision,
        "r": plan["lora_r"],
        "lora_alpha": plan["lora_alpha"],
        "use_rslora": plan["lora_rslora"],
        "use_dora": plan["lora_dora"],
    }
    for key, value in expected.items():
        if config.get(key) != value:
            return f"{key} is {config.get(key)}, and it was trained with {value}"
    return None
