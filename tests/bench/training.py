"""Training side by side with what else a user would pick: `make bench`, on any machine, without a GPU.

Several rounds, in each of which all that are compared (competitors.py) learn the same rows one after the other, in an
order that turns from round to round, each by its own command line in processes of its own. What is reported is the
median over the rounds, with the lowest and the highest.

A speed is in useful tokens a second: padding doesn't count. "training" is from the end of the first optimizer step,
in which much is set up once, to the end of the last, noted by the same probe in each (training_probe); "whole" is from
the start of the command to its end. The memory is that of all its processes. The held-out loss is measured on the saved
adapter by one and the same program (held_out_loss.py), and the seed differs from round to round, so that its spread
shows the noise.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from base_model import get_base_model, get_tiny_model  # noqa: E402
from competitors import (  # noqa: E402
    COMPETITORS,
    LEARNING_RATE,
    LIBRARIES,
    MAX_LENGTH_TOKENS,
    OURS,
    ROOT,
    Competitor,
    Task,
)
from docs import table  # noqa: E402
from measured_run import Measured, clean_environment, run_measured  # noqa: E402
from training_rows import Rows, write_rows  # noqa: E402

from job.hardware import Hardware, find_hardware  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "training.md"
HELD_OUT_ROWS = 128
_PACKED_MULTIPLE_TOKENS = 32
_LEAST_STEPS = 8  # of one that takes a part of them


@dataclass(frozen=True)
class Result:
    """What one competitor did in one round, and the held-out loss of its adapter, if it took all steps."""

    measured: Measured
    loss: float | None


def plan_task(rows: Rows, model: Path, folder: Path, *, batch: int, padded_steps: int, dtype: str) -> Task:
    """Return what each is to do, but for seed and folder."""
    steps = len(rows.lengths_tokens) // batch
    mean = rows.tokens / steps  # tokens in a step
    packed = -(-max(mean, *rows.lengths_tokens) // _PACKED_MULTIPLE_TOKENS) * _PACKED_MULTIPLE_TOKENS
    return Task(
        model=model,
        train=rows.train,
        held_out=rows.held_out,
        batch=batch,
        steps=steps,
        packed_tokens=int(packed),
        padded_steps=min(steps, padded_steps),
        dtype=dtype,
        seed=0,
        folder=folder,
    )


def run_round(task: Task, number: int, hardware: Hardware) -> dict[str, Result]:
    """Run all, beginning with another one than in the round before."""
    first = number % len(COMPETITORS)
    measured: dict[str, Measured] = {}
    adapters: dict[str, Path] = {}
    for place, competitor in enumerate([*COMPETITORS[first:], *COMPETITORS[:first]]):
        mine = replace(task, seed=number + 1, folder=task.folder / f"{number}-{place}")
        measured[competitor.name] = _run(competitor, mine, hardware)
        if competitor.is_whole or mine.padded_steps == mine.steps:
            adapters[competitor.name] = mine.adapter
        print(_progress(number, competitor.name, measured[competitor.name]), flush=True)
    base, *losses = _measure_losses(task, list(adapters.values()))
    by_name = dict(zip(adapters, losses, strict=True))
    results = {name: Result(one, by_name.get(name)) for name, one in measured.items()}
    return results | {"base": Result(measured[OURS], base)}


def _run(competitor: Competitor, task: Task, hardware: Hardware) -> Measured:
    task.folder.mkdir()
    environment = clean_environment(task.folder, LIBRARIES, ROOT, hardware.cpu_cores)
    environment |= competitor.settings(task)
    measured = run_measured(competitor.command(task), environment, task.folder)
    _check(competitor, task, measured, hardware)
    return measured


def _check(competitor: Competitor, task: Task, measured: Measured, hardware: Hardware) -> None:
    """Raise SystemExit where it didn't do what it is compared for."""
    about = measured.steps[0]
    wrong = [
        about["threads"] != hardware.cpu_cores and f"{about['threads']} threads",
        task.dtype not in (about["autocast"] or about["dtypes"][0]) and f"computes in {about['autocast']}",
    ]
    if any(wrong):
        raise SystemExit(f"{competitor.name}: {'; '.join(filter(None, wrong))}: nothing to compare with")


def _measure_losses(task: Task, adapters: Sequence[Path]) -> list[float]:
    command = [sys.executable, str(Path(__file__).parent / "held_out_loss.py"), str(task.model), str(task.held_out)]
    done = subprocess.run([*command, *map(str, adapters)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


def _progress(number: int, name: str, measured: Measured) -> str:
    return (
        f"round {number + 1}  {name:30} {measured.training_tokens_per_s:8.1f} tokens/s in training, "
        f"{measured.tokens_per_cpu_s:8.1f} a core-second  {measured.whole_s:6.1f} s in all  "
        f"{len(measured.steps)} steps  {measured.tokens:,} tokens, {measured.learned:,} learned"
    )


def write_report(rounds: list[dict[str, Result]], rows: Rows, task: Task, hardware: Hardware) -> str:
    """Return the page of results: the machine, the task, and a table."""
    name = task.model.name
    base = [one["base"].loss for one in rounds]
    lines = [_line(competitor.name, rounds) for competitor in COMPETITORS]
    head = [
        "",
        "training",
        "sft-job is",
        "per core-second",
        "whole",
        "sft-job is",
        "memory",
        "held-out loss",
        "steps",
        "padding",
    ]
    return "\n\n".join(
        [
            f"{hardware.cpu_cores} cores of {hardware.cpu_name}, {task.dtype}; {name}; {rows.describe()}; "
            f"{task.batch} rows a step, learning rate {LEARNING_RATE:g}; {len(rounds)} rounds.",
            table(head, lines),
            f"The base model's held-out loss is {base[0]:.4f}.",
        ]
    )


def _line(name: str, rounds: list[dict[str, Result]]) -> list[str]:
    results = [one[name] for one in rounds]
    measured = [one.measured for one in results]
    losses = [one.loss for one in results if one.loss is not None]
    last = measured[-1]
    return [
        f"**{name}**" if name == OURS else name,
        _spread([one.training_tokens_per_s for one in measured], "{:,.0f}") + " tokens/s",
        _ratio(name, rounds, lambda one: one.training_tokens_per_s),
        f"{statistics.median(one.tokens_per_cpu_s for one in measured):,.0f}",
        _spread([one.whole_tokens_per_s for one in measured], "{:,.0f}") + " tokens/s",
        _ratio(name, rounds, lambda one: one.whole_tokens_per_s),
        f"{statistics.median(one.peak_bytes for one in measured) / 2**30:.2f} GiB",
        _spread(losses, "{:.4f}") if losses else "not all steps",
        str(len(last.steps)),
        f"{1 - last.tokens / last.computed:.0%}",
    ]


def _ratio(name: str, rounds: list[dict[str, Result]], speed: Callable[[Measured], float]) -> str:
    """Return how many times as fast ours was, each round by itself."""
    if name == OURS:
        return ""
    return _spread([speed(one[OURS].measured) / speed(one[name].measured) for one in rounds], "{:.2f}") + " x"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(statistics.median(values))
    low, high = form.format(min(values)), form.format(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def main() -> None:
    """Measure, print what came of it, and write it down unless it was a quick look."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing is left behind
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rows, to see that all of it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="that all have; one is steadiest on a busy machine; all by default")
    parser.add_argument("--rows", type=int, default=512, help="to learn from, once")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--padded-steps", type=int, default=_LEAST_STEPS, help="of the loop that pads to the maximum")
    options = parser.parse_args()
    if options.rows % options.batch:
        parser.error(f"--rows {options.rows} is no multiple of --batch {options.batch}")
    rounds, train_rows = (1, 64) if options.quick else (options.rounds, options.rows)
    model = get_tiny_model() if options.quick else get_base_model()
    if options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    hardware = find_hardware()
    with tempfile.TemporaryDirectory(prefix="sft-job-bench-") as name:
        folder = Path(name)
        corpus = LIBRARIES / "chatterbot_corpus" / "data"
        limit = MAX_LENGTH_TOKENS // 2
        rows = write_rows(corpus, model, folder, train_rows=train_rows, held_out_rows=HELD_OUT_ROWS, limit=limit)
        dtype = "float32" if hardware.cpu_bf16 is None else "bfloat16"
        task = plan_task(rows, model, folder, batch=options.batch, padded_steps=options.padded_steps, dtype=dtype)
        found = [run_round(task, number, hardware) for number in range(rounds)]
    report = write_report(found, rows, task, hardware)
    print(f"\n{report}")
    if not options.quick:
        RESULTS.write_text(f"{report}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
