"""Where the time of a run goes: `python tests/bench/phases.py`, with `--beside FOLDER` next to another checkout's.

The same job is run by this checkout and by the other, in turns, so that whatever else the machine does meets both; the
table has the median of each phase over the rounds, and the CPU time, which other load changes less. Both must know
phases.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from base_model import get_base_model, get_tiny_model  # noqa: E402
from job_cli import SHOP, job_environment  # noqa: E402

from job.phases import PHASES  # noqa: E402


class Run(NamedTuple):
    """One run: seconds of each phase, of the whole from outside, and of all its processes on the CPU."""

    phases: dict[str, float]
    wall_s: float
    cpu_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--demo", action="store_true", help="the demo's model, rows and settings, not a tiny model's")
    options = parser.parse_args(arguments)
    checkouts = [options.beside, ROOT] if options.beside else [ROOT]
    runs: dict[Path, list[Run]] = {checkout: [] for checkout in checkouts}
    for number in range(options.rounds):
        for checkout in checkouts if number % 2 == 0 else reversed(checkouts):
            run = run_once(checkout.resolve(), demo=options.demo)
            runs[checkout].append(run)
            print(f"{checkout}: {run.wall_s:.1f} s, {run.cpu_s:.1f} s on the CPU", file=sys.stderr, flush=True)
    print(f"load {os.getloadavg()[0]:.1f}, {options.rounds} rounds, medians in seconds (lowest to highest)")
    print(format_table(list(runs.values())))
    return 0


def run_once(checkout: Path, *, demo: bool) -> Run:
    """Run the job of a checkout once, in a fresh folder."""
    folder = Path(tempfile.mkdtemp(prefix="bench-phases-"))
    settings: dict[str, object] = {"MODEL__ID": get_tiny_model(), "TRAIN__MAX_STEPS": 8}
    if demo:
        prompts = json.dumps(["How long does delivery take, and when is it free?"])
        settings = {"MODEL__ID": get_base_model(), "TRAIN__EPOCHS": 2, "TRAIN__LEARNING_RATE": 1e-3}
        settings |= {"EVAL__PROMPTS": prompts, "EVAL__MAX_NEW_TOKENS": 80}
    settings |= {"DATA__URI": SHOP / "train.jsonl", "DATA__EVAL_URI": SHOP / "eval.jsonl"}
    environment = job_environment(folder, **settings, OUTPUT__URI=folder / "slot", RUNTIME__LOG_FORMAT="json")
    environment["PYTHONPATH"] = str(checkout)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "job"], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    wall_s = time.monotonic() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode != 0:
        raise SystemExit(ended.stderr)
    shutil.rmtree(folder)
    lines = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
    [phases] = [line["phases"] for line in lines if line["event"] == "phases"]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(phases, wall_s, cpu_s)


def format_table(columns: Sequence[Sequence[Run]]) -> str:
    """Return the table in Markdown: a column for each checkout, the other one first."""
    heads = ["before", "after"] if len(columns) > 1 else ["seconds"]
    lines = [f"| phase | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    entered = {name for runs in columns for run in runs for name in run.phases}
    for name in (name for name in PHASES if name in entered):
        lines += [_line(name, [[run.phases.get(name, 0.0) for run in runs] for runs in columns])]
    lines.append(_line("**whole run**", [[run.wall_s for run in runs] for runs in columns]))
    lines.append(_line("CPU time of all processes", [[run.cpu_s for run in runs] for runs in columns]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[Sequence[float]]) -> str:
    shown = [f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in cells]
    return f"| {name} | {' | '.join(shown)} |"


if __name__ == "__main__":
    sys.exit(main())
