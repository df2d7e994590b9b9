"""Whole weights come out of a model that FSDP2 has split: two processes on this CPU, by accelerate's own wrapping.

The job never runs FSDP2 on a CPU, for accelerate would not; what it does to a model with an adapter is the same there.
"""

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent


def test_fsdp2_gives_back_whole_trained_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{_ROOT}:{_ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [*command, str(_HERE / "fsdp2_process.py"), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("as without FSDP2") == 2
