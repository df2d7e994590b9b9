"""Out of memory, by whatever exception it comes."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from job.errors import ResourcesError

# CUDA and cuBLAS allocate some memory themselves, beside PyTorch's allocator.
_GPU_TEXTS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_TEXTS = ("can't allocate memory", "Cannot allocate memory")  # PyTorch's CPU allocator raises a RuntimeError


def describe_shortage(error: Exception) -> str | None:
    """Return what ran out of memory, in one line, or None for another error."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _GPU_TEXTS):
        return f"out of GPU memory: {text}"
    is_no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or is_no_memory or any(part in text for part in _HOST_TEXTS):
        return f"out of host memory: {text}"
    return None


@contextmanager
def no_smaller_step_helps() -> Iterator[None]:
    """Within it, out-of-memory is the end: the micro batch has no part in it.

    Raises ResourcesError.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        shortage = describe_shortage(error)
        if shortage is None:
            raise
        raise ResourcesError(
            f"the base model alone is too large: {shortage}",
            hint="set SFT_QUANTIZATION=nf4, share it among more GPUs by SFT_PARALLEL__ENGINE=zero3, or give the job "
            "more memory",
        ) from error
