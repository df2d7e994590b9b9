"""Notes what a training really does, in whichever process it runs: with this folder on PYTHONPATH, every optimizer step
of PyTorch appends a line to the file that BENCH_PROBE names, with the time and the tokens of its forward passes.

It is the same for all that are compared, needs nothing of their logs, and costs microseconds a step.
"""

import functools
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_counts = {"computed": 0, "tokens": 0, "learned": 0}  # since the last step
_about: dict[str, Any] = {}


def _watch_optimizers(module: ModuleType) -> None:
    module.register_optimizer_step_post_hook(_note_step)


def _note_step(*_: object) -> None:
    now = {"time_s": time.monotonic(), "cpu_s": time.process_time()}
    with Path(os.environ["BENCH_PROBE"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(now | _counts | _about) + "\n")
    _counts.update(dict.fromkeys(_counts, 0))


def _watch_forward(module: ModuleType) -> None:
    kind = module.PeftModelForCausalLM
    forward = kind.forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and "labels" in kwargs:
            _count(self, kwargs)
        return forward(self, *args, **kwargs)

    kind.forward = counted


def _count(model: Any, batch: dict[str, Any]) -> None:
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")  # (B, T)
    _counts["computed"] += input_ids.numel()
    is_padded = mask is not None and mask.dim() == 2  # a mask of more dimensions is about attention, not padding
    _counts["tokens"] += int(mask.sum()) if is_padded else input_ids.numel()
    _counts["learned"] += int((batch["labels"][:, 1:] != -100).sum())  # nothing predicts the first token
    if not _about:
        torch = sys.modules["torch"]
        trained = [weights for weights in model.parameters() if weights.requires_grad]
        frozen = [weights for weights in model.parameters() if not weights.requires_grad]
        _about.update(
            threads=torch.get_num_threads(),
            trained=sum(weights.numel() for weights in trained),
            dtypes=[str(weights[0].dtype).removeprefix("torch.") for weights in (frozen, trained)],
            autocast=str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None,
        )


_WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "torch.optim.optimizer": _watch_optimizers,
    "peft.peft_model": _watch_forward,
}


class _AfterImport(MetaPathFinder):
    """Acts on a module once it is imported, so that nothing is imported that would not be anyway."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            _WATCHED[name](module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


if "BENCH_PROBE" in os.environ:
    sys.meta_path.insert(0, _AfterImport())
