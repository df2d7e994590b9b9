"""The adapter's weights, looked at without loading them: a safetensors file begins with a list of its tensors.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LENGTH_BYTES = 8  # of the number at the beginning, little-endian, that says how long the list is
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What A and B are called, by the kind of module.
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))

Shapes = dict[str, list[int]]


def read_shapes(path: Path) -> Shapes:
    """Return the tensors of a safetensors file, by name. Raises ValueError for a file that isn't whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError("its list of tensors is longer than the file")
        listed = json.loads(file.read(length))
    if not isinstance(listed, dict):
        raise ValueError("it has no list of tensors")
    listed.pop("__metadata__", None)
    end = 0
    try:
        for name, tensor in sorted(listed.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = tensor["data_offsets"]
            if begin != end or stop - begin != math.prod(tensor["shape"]) * _ITEMSIZE[tensor["dtype"]]:
                raise ValueError(f"{name} doesn't lie where the list says")
            end = stop
        shapes = {name: list(tensor["shape"]) for name, tensor in listed.items()}
    except (KeyError, TypeError) as error:
        raise ValueError("its list of tensors is broken") from error
    if _LENGTH_BYTES + length + end != path.stat().st_size:
        raise ValueError("it is longer or shorter than its tensors")
    return shapes


def find_odd_tensors(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Return what an adapter's tensors lack of what adapter_config.json promises, each in a few words.

    How many layers the base model has isn't known here.
    """
    odd = [*_find_odd_pairs(shapes, config["r"], dora=bool(config.get("use_dora")))]
    targets = config["target_modules"]
    odd += [
        f"no LoRA for {module}"
        for module in ([] if isinstance(targets, str) else targets)
        if not any(_is_within(name, module) for name in shapes if ".lora_" in name)
    ]
    odd += [
        f"no weights of {module}"
        for module in config.get("modules_to_save") or []
        if not any(_is_within(name, module) and ".lora_" not in name for name in shapes)
    ]
    for module, ids in (config.get("trainable_token_indices") or {}).items():
        rows = [shape for name, shape in shapes.items() if _is_within(name, module) and "token_adapter" in name]
        if not rows or rows[0][0] != len(ids):
            odd.append(f"no rows for the {len(ids)} new tokens of {module}")
    return odd


def _find_odd_pairs(shapes: Shapes, rank: int, *, dora: bool) -> Iterator[str]:
    for a_ending, b_ending in _PAIRS:
        a_shapes = {name.removesuffix(a_ending): shape for name, shape in shapes.items() if name.endswith(a_ending)}
        b_shapes = {name.removesuffix(b_ending): shape for name, shape in shapes.items() if name.endswith(b_ending)}
        for module in sorted(a_shapes.keys() | b_shapes.keys()):
            if module not in a_shapes or module not in b_shapes:
                yield f"no {'A' if module not in a_shapes else 'B'} for {module}"
            elif (found := (a_shapes[module][0], b_shapes[module][-1])) != (rank, rank):
                yield f"A and B of {module} have ranks {found[0]} and {found[1]}, not {rank}"
            elif dora and not any(name.startswith(f"{module}.lora_magnitude_vector") for name in shapes):
                yield f"no magnitude for {module}"


def _is_within(name: str, module: str) -> bool:
    """Say whether a tensor is of a module, which is named in full or by the end of its name."""
    return f".{module}." in f".{name}"
