"""The job's training step on a GPU, one measure after another: `make bench-gpu`.

Models of the shapes of Llama-3-8B and Qwen2.5-7B with random weights, LoRA of rank 16 on all linear layers, sequences
of 4,096 tokens, by the job's own worker with settings that users have. The ladder begins as tutorials do; what is no
loss of speed stays switched on for the next rung. The batch is the largest of --batches that fits.

TFLOP/s count 4 x parameters x tokens: 2 for the forward pass and 2 for the gradient of the activations. No gradients of
frozen weights are computed, what gradient checkpointing computes again counts nothing, and neither does attention.
They are compared with the product of large matrices as it was measured on the same card.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_rung import COMPILED, PLAIN_NORMS, SHAPES, WARMUP_STEPS, Measured, Task
from gpu_rung import main as answer_here

LENGTHS = [2048, 1024, 512, 512]  # of the ladder's rows: 4,096 joined, and twice that padded
NAIVE = {
    "TRAIN__PACKING": "false",
    "TRAIN__LOSS": "full",
    "TRAIN__GRADIENT_CHECKPOINTING": "true",
    "MODEL__ATTN_IMPLEMENTATION": "sdpa",
    PLAIN_NORMS: "true",
}
LADDER: list[tuple[str, dict[str, str]]] = [
    ("padded rows, all logits, checkpointing", {}),
    ("joined rows", {"TRAIN__PACKING": "true"}),
    ("attention within each row", {"MODEL__ATTN_IMPLEMENTATION": "varlen"}),
    ("FlashAttention 2", {"MODEL__ATTN_IMPLEMENTATION": "flash_attention_2"}),
    ("norms in one kernel", {PLAIN_NORMS: "false"}),
    ("rotation and gates compiled", {COMPILED: "true"}),
    ("loss in chunks", {"TRAIN__LOSS": "chunked"}),
    ("half of the layers checkpointed", {"TRAIN__GRADIENT_CHECKPOINTING": "0.5"}),
    ("no checkpointing", {"TRAIN__GRADIENT_CHECKPOINTING": "false"}),
    ("Liger's loss", {"TRAIN__LOSS": "liger"}),
]
FP8, NF4 = {"QUANTIZATION": "fp8"}, {"QUANTIZATION": "nf4"}


@dataclass(frozen=True)
class Bench:
    """How to measure: in processes of their own, or all in this one."""

    apart: bool
    device: str
    steps: int
    batches: list[int]
    with_trl: bool

    def ask(self, *arguments: str) -> Any:
        """Return the answer of `gpu_rung`."""
        if not self.apart:
            return _ask_here(arguments)
        command = [sys.executable, str(Path(__file__).with_name("gpu_rung.py")), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            return None if not ended.stderr else {"lacking": ended.stderr.strip().splitlines()[-1]}
        return json.loads(ended.stdout.splitlines()[-1])

    def measure(self, model: str, lengths: list[int], settings: dict[str, str], *way: str) -> tuple[int, Measured]:
        """Return how many sequences of 4,096 tokens were in a batch, the largest number that fits, and what came of it,
        by the job or, with `way`, by TRL."""
        found = Measured(lacking="no batch was tried")
        for batch in self.batches:
            task = Task(model, lengths, batch * len(lengths), self.steps, settings)
            kind, *rest = way or ("task",)
            answer = self.ask(kind, json.dumps(asdict(task)), *rest)
            found = Measured(**(answer or {"lacking": "it was killed"}))
            if not found.out_of_memory:
                return batch, found
        return self.batches[-1], found


def _ask_here(arguments: tuple[str, ...]) -> Any:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()):
        answer_here(arguments)
    return json.loads(output.getvalue().splitlines()[-1])


def climb(bench: Bench, model: str, lengths: list[int], dtype: str) -> Iterator[tuple[str, int, Measured, str]]:
    """Yield name, batch, what was measured and the gain, of each rung, of FP8 and QLoRA on top of what stayed on, and
    of rows that are all as long as a sequence; and the ladder's rows by TRL."""
    settings, before = NAIVE | {"MODEL__DTYPE": dtype}, 0.0
    for name, change in LADDER:
        batch, found = bench.measure(model, lengths, settings | change)
        # A tiny model is there to see that everything runs: its times say nothing.
        is_kept = found.lacking is None and (found.tokens_per_s >= before or not bench.apart)
        yield name, batch, found, _gain(found, before, is_kept=is_kept)
        if is_kept:
            settings, before = settings | change, found.tokens_per_s
    for name, change in (("FP8 base", FP8), ("QLoRA: NF4 base", NF4)):
        batch, found = bench.measure(model, lengths, settings | change)
        yield name, batch, found, _gain(found, before, is_kept=True)
    whole = [sum(lengths)]
    for name, change in ((f"rows of {sum(lengths):,}", {}), (f"rows of {sum(lengths):,}, FP8 base", FP8)):
        batch, found = bench.measure(model, whole, settings | change)
        yield name, batch, found, ""
    for way in ("plain", "checkpointing") if bench.with_trl else ():
        batch, found = bench.measure(model, lengths, settings, "trl", way)
        yield f"TRL, packed, {way}", batch, found, _gain(found, before, is_kept=True)


def _gain(found: Measured, before: float, *, is_kept: bool) -> str:
    if found.lacking is not None or not before:
        return ""
    return f"x {found.tokens_per_s / before:.2f}{'' if is_kept else ', off again'}"


def describe(name: str, batch: int, found: Measured, gain: str, peak_flops: float) -> str:
    """Return a line of the table."""
    if found.lacking is not None:
        return f"{name:40} not measured: {found.lacking}"
    flops = 4 * found.parameters * found.tokens_per_s
    return (
        f"{name:40} {batch:5} {found.tokens_per_s:10,.0f} {flops / 1e12:9.3g} {flops / peak_flops:7.1%} "
        f"{found.peak_bytes / 2**30:8.2f} {found.loss:8.4f}  {gain}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "qwen2.5-7b"], choices=[*SHAPES])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model in this process, to see that the command runs"
    )
    parser.add_argument("--folder", type=Path, help="keep the random models there, 16 GB each")
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARMUP_STEPS} don't count")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 4, 2, 1], help="sequences of 4,096 to try")
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, default=True, help="the same steps by TRL, too")
    options = parser.parse_args(arguments)
    bench = Bench(not options.tiny, options.device, options.steps, options.batches, options.trl)
    models, lengths, dtype, size = options.models, LENGTHS, "bfloat16", 8192
    if options.tiny:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # threads would wait for each other
        bench, models, lengths = replace(bench, steps=WARMUP_STEPS + 1, batches=[1]), ["tiny"], [32, 16, 8, 8]
    if options.device == "cpu":
        dtype, size = "float32", 512
    peaks = {kind: bench.ask("peak", options.device, kind, str(size)) for kind in (dtype, "fp8")}
    for kind, flops in peaks.items():
        print(f"product of {size:,} x {size:,} in {kind}: {f'{flops / 1e12:.3g} TFLOP/s' if flops else 'none here'}")
    print(f"TFLOP/s: 4 x parameters x tokens, without attention; share: of the product in {dtype}")
    with tempfile.TemporaryDirectory(prefix="sft-job-bench-", dir=options.folder) as scratch:
        for shape in models:
            if options.tiny:
                gc.freeze()  # each training collects garbage, and libraries are millions of objects to look at
            model = bench.ask("model", shape, str(options.folder or scratch), options.device)
            print(f"\n{shape:40} batch   tokens/s   TFLOP/s   share  GiB peak    loss  gain", flush=True)
            for rung in climb(bench, model, lengths, dtype):
                print(describe(*rung, peaks[dtype]), flush=True)


if __name__ == "__main__":
    main()
