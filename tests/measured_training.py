"""Training of llamas of any size, in a process of its own whose peaks of memory are looked at.

`python tests/measured_training.py FOLDER...` trains, one after the other, as each folder's given.json says, on rows
that are as long as the plan allows, but for one that needs padding. FOLDER/peak.json gets the peak of each.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.handover import RunFolder, WorkerInputs
from job.plan import TrainPlan
from job.train.heartbeat import Pulse

ROOT = Path(__file__).parent.parent
_VOCABULARY_USED = 64


@dataclass(frozen=True)
class Peak:
    """Resident bytes of the process before a training, and its peak during it."""

    before_bytes: int
    peak_bytes: int


def save_llama(folder: Path, **sizes: Any) -> Path:
    """Save a random llama of these sizes, by the names of its config.json, with its head tied to the embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure_peaks(cases: list[tuple[TrainPlan, Path]], root: Path, *, with_fragments: bool) -> list[Peak]:
    """Train as each plan says, each with its model, in one other process; return their peaks.

    Without fragments, the C library gives all but small blocks back as soon as they are free, so that what is resident
    is alive; with them, it behaves as it does by default.
    """
    folders = [root / str(number) for number in range(len(cases))]
    for folder, (plan, model) in zip(folders, cases, strict=True):
        folder.mkdir(parents=True)
        given = {"plan": plan.model_dump(mode="json"), "model": str(model)}
        (folder / "given.json").write_text(json.dumps(given))
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "2000"}
    if not with_fragments:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, __file__, *map(str, folders)]
    done = subprocess.run(command, env=keep | environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return [Peak(**json.loads((folder / "peak.json").read_text())) for folder in folders]


def write_rows(path: Path, lengths: list[int]) -> None:
    """Write random rows, all of whose tokens are supervised."""
    import numpy as np
    import pyarrow as pa

    generator = np.random.default_rng(0)
    rows = [generator.integers(3, _VOCABULARY_USED, length).tolist() for length in lengths]
    column = pa.array(rows, pa.list_(pa.int32()))
    table = pa.table({"input_ids": column, "labels": column})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _train_here(root: Path) -> Peak:
    import accelerate
    import numpy as np

    from job.train.run import train

    given = json.loads((root / "given.json").read_text())
    plan = TrainPlan.model_validate(given["plan"])
    folder = RunFolder(root)
    folder.adapter.mkdir()
    lengths = [plan.max_length_tokens] * plan.train_rows
    lengths[1] -= 1
    write_rows(root / "tokens.arrow", lengths)
    segments = np.array([[row, 0, length] for row, length in enumerate(lengths)])
    np.save(folder.train_rows, segments)
    np.save(folder.eval_rows, segments[:0])
    inputs = WorkerInputs(
        model_folder=Path(given["model"]),
        train_tokens=root / "tokens.arrow",
        train_names=["rows.jsonl"],
        eval_tokens=None,
        eval_names=["rows.jsonl"],
        pad_token_id=0,
        vocabulary_size=_VOCABULARY_USED,
        new_tokens=[],
        log_format="text",
        log_level="info",
    )
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()  # what the training before left behind
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    train(plan, inputs, folder, rank=0, remember_step=lambda _: None, pulse=Pulse(folder, rank=0))
    return Peak(before_bytes, folder.read_result()["peak_memory_bytes"])


def main(folders: list[Path]) -> None:
    """Train in this process."""
    for folder in folders:
        peak = _train_here(folder)
        (folder / "peak.json").write_text(json.dumps(vars(peak)))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
