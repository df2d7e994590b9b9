"""The benchmark for GPUs runs: its whole ladder with a tiny model on a CPU, by its own command line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_whole_ladder_with_a_tiny_model() -> None:
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--tiny", "--device", "cpu", "--no-trl"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    rungs = {line[:40].strip(): line[40:].split() for line in lines[lines.index(next(filter(_is_head, lines))) + 1 :]}
    for name in ("padded rows, all logits, checkpointing", "joined rows", "no checkpointing", "FP8 base"):
        batch, tokens_per_s, *_ = rungs[name]
        assert batch == "1"
        assert float(tokens_per_s.replace(",", "")) > 0
    assert "x" in rungs["joined rows"]
    assert rungs["Liger's loss"][:2] == ["not", "measured:"]  # it needs a GPU, and the command says so


def _is_head(line: str) -> bool:
    return line.startswith("tiny ")
