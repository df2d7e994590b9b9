"""The state of the random number generators of one process: as tensors for a checkpoint, and back."""

import random
from typing import Any

import numpy as np
import torch
from transformers import set_seed

_PYTHON_VERSION = 3  # of random.getstate()
_NUMPY_KIND = "MT19937"


def read_random_state(device: str) -> dict[str, torch.Tensor]:
    """Return the states by generator, uint8 (N,) each; N is the same on every process."""
    states = {"torch_cpu": torch.get_rng_state(), "python": _read_python(), "numpy": _read_numpy()}
    if device == "cuda":
        states["torch_cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, torch.Tensor]) -> None:
    """Put all generators into the states that `read_random_state` returned."""
    torch.set_rng_state(states["torch_cpu"])
    _restore_python(states["python"])
    _restore_numpy(states["numpy"])
    if "torch_cuda" in states:
        torch.cuda.set_rng_state(states["torch_cuda"])


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Seed all generators from these three alone, so that a second start from the same step draws the same."""
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _read_python() -> torch.Tensor:
    _, words, gauss_next = random.getstate()
    return _to_bytes([*words, *_of_gauss(gauss_next)])


def _restore_python(state: torch.Tensor) -> None:
    *words, has_gauss, gauss = _to_numbers(state)
    random.setstate((_PYTHON_VERSION, tuple(words), _to_float(gauss) if has_gauss else None))


def _read_numpy() -> torch.Tensor:
    state: dict[str, Any] = np.random.get_state(legacy=False)
    gauss = state["gauss"] if state["has_gauss"] else None
    return _to_bytes([*state["state"]["key"].tolist(), state["state"]["pos"], *_of_gauss(gauss)])


def _restore_numpy(state: torch.Tensor) -> None:
    *words, position, has_gauss, gauss = _to_numbers(state)
    np.random.set_state((_NUMPY_KIND, np.array(words, dtype=np.uint32), position, has_gauss, _to_float(gauss)))


def _of_gauss(value: float | None) -> tuple[int, int]:
    """Return whether a second normal number is left over from the last draw, and its bits."""
    return int(value is not None), int(np.float64(value or 0.0).view(np.int64))


def _to_float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def _to_bytes(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)


def _to_numbers(content: torch.Tensor) -> list[int]:
    numbers: list[int] = content.view(torch.int64).tolist()
    return numbers
