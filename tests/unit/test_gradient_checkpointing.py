"""Layers whose activations are computed again: the first ones, as many as planned, with the same result."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import make_small_plan, save_gpt2, save_llama, train_here
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from job.plan import TrainPlan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

STEPS = 3
MICRO_BATCHES = STEPS * 2


@pytest.fixture
def count_passes(
    plan_for: Callable[..., TrainPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, type, float], tuple[list[float], bytes]]:
    """Train with a share of the layers checkpointed; return how often each layer's MLP ran for each micro batch, and
    the adapter."""

    def train(model: Path, mlp: type, share: float) -> tuple[list[float], bytes]:
        passes: Counter[Any] = Counter()
        forward: Callable[..., torch.Tensor] = mlp.forward  # type: ignore[attr-defined]

        def count(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
            if module.training and torch.is_grad_enabled():
                passes[module] += 1
            return forward(module, *inputs)

        settings = {"TRAIN__MAX_STEPS": STEPS, "TRAIN__MICRO_BATCH_SIZE": 2, "LORA__DROPOUT": 0.2}
        plan = make_small_plan(plan_for, **settings, TRAIN__GRADIENT_CHECKPOINTING=share)
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "forward", count)
            train_here(plan, model, tmp_path / f"{share}")
        adapter = (tmp_path / f"{share}" / "adapter" / "adapter_model.safetensors").read_bytes()
        return [count / MICRO_BATCHES for count in passes.values()], adapter

    return train


def test_the_first_layers_are_computed_again_with_the_same_result(
    count_passes: Callable[..., tuple[list[float], bytes]], tmp_path: Path
) -> None:
    base = save_llama(tmp_path / "base", tied=True, layers=4)
    once, expected = count_passes(base, LlamaMLP, 0.0)
    assert once == [1, 1, 1, 1]
    for share, passes in ((0.25, [2, 1, 1, 1]), (0.3, [2, 2, 1, 1]), (0.75, [2, 2, 2, 1]), (1.0, [2, 2, 2, 2])):
        found, adapter = count_passes(base, LlamaMLP, share)
        assert found == passes
        assert adapter == expected


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_of_other_architectures_too(count_passes: Callable[..., tuple[list[float], bytes]], tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "base")
    assert count_passes(base, GPT2MLP, 0.5)[0] == [2, 1]
