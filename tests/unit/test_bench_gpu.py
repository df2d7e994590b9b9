"""The benchmark for GPUs runs: its whole ladder with a tiny model on a CPU."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from gpu import main


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_whole_ladder_with_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # settings are put there
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # other tests want all cores
    main(["--tiny", "--device", "cpu", "--no-trl"])
    lines = capsys.readouterr().out.splitlines()
    rungs = {line[:40].strip(): line[40:].split() for line in lines[lines.index(next(filter(_is_head, lines))) + 1 :]}
    for name in ("padded rows, all logits, checkpointing", "joined rows", "attention within each row", "FP8 base"):
        batch, tokens_per_s, *_ = rungs[name]
        assert batch == "1"
        assert float(tokens_per_s.replace(",", "")) > 0
    assert "x" in rungs["joined rows"]
    assert rungs["Liger's loss"][:2] == ["not", "measured:"]  # it needs a GPU, and the command says so


def _is_head(line: str) -> bool:
    return line.startswith("tiny ")
