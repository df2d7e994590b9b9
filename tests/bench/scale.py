"""What more GPUs cost in communication, computed: `make bench-scale` prints the table that the README has.

Nothing here is measured but what is said to be. A step is as long as its tokens take at an assumed rate, a GPU alone;
communication is bytes by formula over a stated bandwidth, and none of it is hidden behind the computing, though engines
hide a part. A ring moves 2 (n - 1) / n of what is summed through each GPU, and (n - 1) / n of what is gathered.

DDP sums the adapter's gradients, float32, once a step. ZeRO-3 and FSDP2 send no more of them, and gather the frozen
weights for the forward and the backward pass of every micro batch; these have no gradients to sum.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

# Bytes a second, through each GPU, in one direction. NVLink: NVIDIA's H100 datasheet, 900 GB/s of the SXM form, both
# directions together. InfiniBand: NDR, 400 Gb/s, one adapter for each GPU as in NVIDIA's DGX H100 User Guide.
NVLINK_BYTES_PER_S = 450e9
INFINIBAND_BYTES_PER_S = 50e9
REACHED = 0.8  # assumed: of either, by NCCL with large messages
GPUS_OF_NODE = 8

# Llama-3-8B: 32 layers, hidden 4,096, intermediate 14,336, 32 heads of 128, 8 of them for keys and values.
PARAMETERS = 8_030_261_248
ADAPTER_PARAMETERS = 41_943_040  # r 16 on all linear layers
WEIGHT_BYTES = 2  # bfloat16
GRADIENT_BYTES = 4  # float32
CHECKPOINT_BYTES = 12  # of a trained parameter: itself and AdamW's two moments, float32

DRAG = 0.1  # a setting no longer scales where communication takes more of the step than this


@dataclass(frozen=True)
class Setting:
    """One way to run: GPUs, their engine, and what each does in a step at `tokens_per_s`, assumed, alone."""

    gpus: int
    engine: str
    micro_batch_tokens: int
    accumulation: int
    tokens_per_s: float

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.micro_batch_tokens * self.accumulation * self.gpus

    @property
    def compute_s(self) -> float:
        """What a step takes without any communication."""
        return self.micro_batch_tokens * self.accumulation / self.tokens_per_s


def summed_bytes(gpus: int) -> float:
    """Return what an all-reduce of the adapter's gradients sends through each GPU, once a step."""
    return 2 * (gpus - 1) / gpus * ADAPTER_PARAMETERS * GRADIENT_BYTES


def gathered_bytes(setting: Setting) -> float:
    """Return what gathering the frozen weights sends through each GPU in a step; they need no sum of gradients."""
    if setting.engine == "ddp":
        return 0.0
    return 2 * setting.accumulation * (setting.gpus - 1) / setting.gpus * PARAMETERS * WEIGHT_BYTES


def communication_s(setting: Setting) -> float:
    """Return how long a step's communication takes over the slowest link in the ring."""
    if setting.gpus == 1:
        return 0.0
    link = NVLINK_BYTES_PER_S if setting.gpus <= GPUS_OF_NODE else INFINIBAND_BYTES_PER_S
    return (summed_bytes(setting.gpus) + gathered_bytes(setting)) / (link * REACHED)


def communication_share(setting: Setting) -> float:
    """Return the share of a step that is communication, when none of it is hidden."""
    taken_s = communication_s(setting)
    return taken_s / (taken_s + setting.compute_s)


def least_micro_batch_tokens(gpus: int, engine: str, tokens_per_s: float) -> float:
    """Return the tokens of a micro batch from which on communication takes no more than `DRAG` of a step without
    accumulation."""
    once = Setting(gpus, engine, 1, 1, tokens_per_s)
    return communication_s(once) * (1 - DRAG) / DRAG * tokens_per_s


def advise(setting: Setting) -> str:
    """Say which setting to change, or that none need be."""
    if communication_share(setting) <= DRAG:
        return "-"
    if setting.engine == "ddp":
        return "`SFT_TRAIN__GLOBAL_BATCH_SIZE` up: the sum comes once a step"
    return "`SFT_PARALLEL__ENGINE=ddp`, with `SFT_QUANTIZATION=nf4` or `fp8` if need be; else a larger micro batch"


def rows(micro_batch_tokens: int, tokens_per_s: float) -> Iterator[list[str]]:
    """Yield the table's cells."""
    for gpus in (1, 8, 64):
        for engine in ("ddp", "zero3, fsdp2") if gpus > 1 else ("ddp",):
            setting = Setting(gpus, engine, micro_batch_tokens, 1, tokens_per_s)
            share = communication_share(setting)
            least = least_micro_batch_tokens(gpus, engine, tokens_per_s)
            yield [
                str(gpus),
                f"`{engine}`",
                f"{setting.global_batch_tokens:,}",
                f"{(summed_bytes(gpus) + gathered_bytes(setting)) / 1e9:.2f} GB",
                f"{communication_s(setting):.3f} s",
                f"{setting.compute_s:.2f} s",
                f"{share:.1%}",
                f"{gpus * (1 - share):.1f} x",
                f"{least:,.0f}",
                advise(setting),
            ]


HEAD = [
    "GPUs",
    "engine",
    "global batch, tokens",
    "through each GPU a step",
    "takes",
    "computing",
    "communication",
    "speed",
    "micro batch for 10 %, tokens",
    "then change",
]


def table(micro_batch_tokens: int, tokens_per_s: float) -> str:
    """Return the table as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows(micro_batch_tokens, tokens_per_s)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_checkpoint(save_bytes_per_s: float, upload_bytes_per_s: float) -> str:
    """Say how long a checkpoint of the adapter and its optimizer holds training up, and how long it is on its way."""
    size = ADAPTER_PARAMETERS * CHECKPOINT_BYTES
    return (
        f"A checkpoint holds {size / 1e6:,.0f} MB, whatever the number of GPUs: at the speeds given, "
        f"{size / save_bytes_per_s:.1f} s in which training stands still, and {size / upload_bytes_per_s:.1f} s of "
        "upload beside it."
    )


def main() -> None:
    """Print what is computed, with what was assumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens-per-s", type=float, default=16_000, help="ASSUMED rate of one GPU alone")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384, help="of each GPU")
    # 56 MiB in 0.09 s: `make bench-checkpoints`, SmolLM2-135M on 2 CPU cores.
    parser.add_argument("--save-mb-per-s", type=float, default=650, help="measured by make bench-checkpoints")
    parser.add_argument("--upload-mb-per-s", type=float, default=100, help="ASSUMED speed of the store")
    options = parser.parse_args()
    print("Computed, not measured: LoRA of rank 16 on Llama-3-8B, bfloat16.")
    print(f"ASSUMED: {options.tokens_per_s:,.0f} tokens/s of one GPU; {REACHED:.0%} of the links' bandwidth.\n")
    print(table(options.micro_batch_tokens, options.tokens_per_s))
    print(f"\n{describe_checkpoint(options.save_mb_per_s * 1e6, options.upload_mb_per_s * 1e6)}")


if __name__ == "__main__":
    main()
