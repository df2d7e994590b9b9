"""What `make bench` runs side by side: each a command as its users start it, that learns the same from the same rows.

The same for all: base model, rows, one pass over them, LoRA of rank 16 and alpha 32 with dropout 0.05 on all linear
layers, a learning rate that falls linearly from the same peak without warmup, the loss on every token, and the
precision of the arithmetic (what the job chooses on this machine). What else differs is what is compared.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).parent
ROOT = BENCH.parent.parent
LIBRARIES = ROOT / ".cache" / "trl"  # of trl.lock
MAX_LENGTH_TOKENS = 512
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Task:
    """What is to be learned, and where to: `batch` rows a step, `packed_tokens` of them on average."""

    model: Path
    train: Path
    held_out: Path
    batch: int
    steps: int
    packed_tokens: int
    padded_steps: int
    dtype: str
    seed: int
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


@dataclass(frozen=True)
class Competitor:
    """One of those that are compared; what it runs, and in which environment beyond the common one."""

    name: str
    is_whole: bool  # takes all steps; else it is so slow that it takes a part of them
    command: Callable[[Task], Sequence[str]]
    settings: Callable[[Task], Mapping[str, str]]


def _no_settings(task: Task) -> dict[str, str]:
    return {}


def _job_settings(task: Task) -> dict[str, str]:
    settings = {
        "MODEL__ID": task.model,
        "DATA__URI": task.train,
        "DATA__EVAL_URI": task.held_out,
        "DATA__LOSS_ON": "all",  # as `trl sft` has it for conversations
        "DATA__MAX_LENGTH": MAX_LENGTH_TOKENS,
        "OUTPUT__URI": task.adapter,
        "TRAIN__EPOCHS": 1,
        "TRAIN__GLOBAL_BATCH_SIZE": task.batch,
        "TRAIN__LEARNING_RATE": LEARNING_RATE,
        "TRAIN__SCHEDULER": "linear",
        "TRAIN__WARMUP": 0,
        "TRAIN__SEED": task.seed,
        "RUNTIME__WORK_DIR": task.folder / "work",
        "RUNTIME__TERMINATION_LOG": task.folder / "termination.json",
    }
    return {f"SFT_{name}": str(value) for name, value in settings.items()}


def _trl_command(task: Task) -> list[str]:
    """Return `trl sft` with what must be set: the rest are its defaults, but for the precision where bfloat16 is slow,
    and the rows in a step where a test asks for few."""
    return [
        *(sys.executable, str(LIBRARIES / "bin" / "trl"), "sft"),
        *("--model_name_or_path", str(task.model), "--dataset_name", str(task.train.parent)),
        *("--output_dir", str(task.adapter), "--num_train_epochs", "1", "--learning_rate", str(LEARNING_RATE)),
        *("--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"),
        *("--per_device_train_batch_size", str(task.batch), "--seed", str(task.seed)),
        *("--use_cpu", "--report_to", "none"),
        *(() if task.dtype == "bfloat16" else ("--bf16", "False")),
    ]


def _script(name: str, task: Task, *more: str) -> list[str]:
    return [
        *(sys.executable, str(BENCH / name), "--model", str(task.model), "--rows", str(task.train)),
        *("--output", str(task.adapter), "--batch", str(task.batch), "--learning-rate", str(LEARNING_RATE)),
        *("--dtype", task.dtype, "--seed", str(task.seed), *more),
    ]


def _padded(task: Task) -> list[str]:
    more = ("--max-length", str(MAX_LENGTH_TOKENS), "--max-steps", str(task.padded_steps))
    return _script("padded_trainer.py", task, *more)


def _trl_packed(task: Task) -> list[str]:
    """Return `trl sft` that packs rows by best fit into sequences, of which a step has one: as long as a step of the
    others is on average, so that as many steps learn from as many tokens."""
    length = ("--max_length", str(task.packed_tokens), "--per_device_train_batch_size", "1")
    return [*_trl_command(task), *_trl_fast(task), "--packing", *length]


def _trl_padding_free(task: Task) -> list[str]:
    """Return `trl sft` that joins the rows of a step into one sequence, as the job does."""
    return [*_trl_command(task), *_trl_fast(task), "--padding_free", "--max_length", "None"]


def _trl_fast(task: Task) -> list[str]:
    return ["--gradient_checkpointing", "False", "--dtype", task.dtype]


OURS = "sft-job"
CEILING = "bare PyTorch loop, packed"
COMPETITORS = (
    Competitor(OURS, True, lambda task: [sys.executable, "-m", "job"], _job_settings),
    Competitor("trl sft, defaults", True, _trl_command, _no_settings),
    Competitor("trl sft, best: packing", True, _trl_packed, _no_settings),
    Competitor("trl sft, best: padding-free", True, _trl_padding_free, _no_settings),
    Competitor("Trainer, padded to 512", False, _padded, _no_settings),
    Competitor(CEILING, True, lambda task: _script("bare_loop.py", task), _no_settings),
)
