"""What of a plan decides how much memory its training needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from job.support import Attention, Device, Engine, Quantization

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Setup:
    """What of a plan decides it; the names are TrainPlan's."""

    device: Device
    dtype: str
    quantization: Quantization
    engine: Engine
    offload: bool
    nodes: int
    processes: int
    attn_implementation: Attention
    packing: bool
    max_length_tokens: int
    micro_batch_size: int
    micro_batch_tokens: int
    gradient_checkpointing: float
    loss: str
    optimizer: str
    lora_r: int
    lora_dropout: float
    lora_dora: bool
    target_modules: str | list[str]
    modules_to_save: list[str]
    new_tokens: list[str] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """The processes on all nodes."""
        return self.nodes * self.processes

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the precision of weights and arithmetic."""
        return _BYTES_OF_DTYPE[self.dtype]


def pick_setup(values: Mapping[str, Any]) -> Setup:
    """Return the setup within a plan's values: `pick_setup(plan.model_dump())`."""
    return Setup(**{part.name: values[part.name] for part in fields(Setup)})
