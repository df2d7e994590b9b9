"""What a base model in FP8 does to what is learned: `make bench-fp8`, on a CPU, which computes the GPU's numbers.

First SmolLM2-135M with an adapter that isn't zero takes one look at rows of the shop, in float32, in bfloat16, and in
both with the frozen layers in FP8: printed is how far loss and gradients are from float32's.

Then a fresh adapter learns the shop's rows over the base in bfloat16, and another over the base in FP8, from the same
numbers in the same order. Printed is the loss on held-out rows of the shop, over the base that each was learned over,
and of the second over the base in bfloat16, too, for it may be served there. Nothing is timed.
"""

import json
import random
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402
from base_model import get_base_model  # noqa: E402
from docs import table  # noqa: E402
from job_cli import SHOP  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cosine_similarity  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding  # noqa: E402

from job.train.fp8 import hold_in_fp8  # noqa: E402

ROWS = 8  # of a step
LORA_B_STD = 0.01  # a fresh adapter has no B, and A no gradient
SEEDS = (1, 2, 3)
EPOCHS = 2
LEARNING_RATE = 2e-4


def read_batches(model: Path, name: str) -> list[BatchEncoding]:
    """Return the rows of a file of the shop as padded batches, with their labels."""
    rows = [json.loads(line) for line in (SHOP / name).read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = []
    for start in range(0, len(texts), ROWS):
        batch = tokenizer(texts[start : start + ROWS], return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return batches


def load(model: Path, dtype: torch.dtype, *, in_fp8: bool, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model with a fresh adapter, and the adapter's matrices by name, float32."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.config.use_cache = False
    if in_fp8:
        hold_in_fp8(base, head=base.get_output_embeddings())
    torch.manual_seed(seed)
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data = weight.data.float()
    return adapted, trained


def compute_loss(adapted: nn.Module, batch: BatchEncoding) -> torch.Tensor:
    """Return the loss of a batch, by the arithmetic that the model is held in."""
    dtype = next(
        weight.dtype for weight in adapted.parameters() if not weight.requires_grad and weight.is_floating_point()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss: torch.Tensor = adapted(**batch).loss
    return loss


# -- one look ----------------------------------------------------------------------------------------------------------


def look(model: Path, batch: BatchEncoding, dtype: torch.dtype, *, in_fp8: bool) -> tuple[float, list[torch.Tensor]]:
    """Return the loss, and the gradient of each matrix of an adapter that isn't zero."""
    adapted, trained = load(model, dtype, in_fp8=in_fp8, seed=0)
    for name, weight in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=LORA_B_STD)
    loss = compute_loss(adapted, batch)
    loss.backward()
    return loss.item(), [weight.grad.flatten() for weight in trained.values() if weight.grad is not None]


def compare_gradients(model: Path, batch: BatchEncoding) -> None:
    """Print a line for each precision."""
    expected_loss, expected = look(model, batch, torch.float32, in_fp8=False)
    lines = []
    for dtype, in_fp8 in ((torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
        loss, gradients = look(model, batch, dtype, in_fp8=in_fp8)
        name = str(dtype).removeprefix("torch.") + (", base in FP8" if in_fp8 else "")
        whole = cosine_similarity(torch.cat(gradients), torch.cat(expected), dim=0)
        worst = min(cosine_similarity(*pair, dim=0) for pair in zip(gradients, expected, strict=True))
        lines.append([name, f"{loss / expected_loss - 1:+.2%}", f"{whole:.4f}", f"{worst:.2f}"])
    print(f"{model.name}, {ROWS} rows of {SHOP.name}; beside float32, whose loss is {expected_loss:.4f}:\n")
    print(table(["", "loss", "cosine of the gradients", "of the worst matrix"], lines))


# -- learning ----------------------------------------------------------------------------------------------------------


def learn(adapted: nn.Module, trained: dict[str, nn.Parameter], batches: list[BatchEncoding], seed: int) -> None:
    """Train the adapter on all batches, EPOCHS times, in an order of the seed's."""
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
    shuffle = random.Random(seed)
    for _ in range(EPOCHS):
        for batch in shuffle.sample(batches, len(batches)):
            compute_loss(adapted, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(adapted: nn.Module, batches: list[BatchEncoding]) -> float:
    """Return the mean loss of the batches' predicted tokens."""
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [compute_loss(adapted, batch).item() * count for batch, count in zip(batches, tokens, strict=True)]
    return sum(losses) / sum(tokens)


def compare_learning(model: Path) -> None:
    """Print a line for each seed."""
    train, held_out = read_batches(model, "train.jsonl"), read_batches(model, "eval.jsonl")
    print(f"\n{EPOCHS * len(train)} steps of {ROWS} rows, bfloat16; held-out loss:\n")
    lines = []
    for seed in SEEDS:
        (plain, plain_weights), (fp8, fp8_weights) = (
            load(model, torch.bfloat16, in_fp8=in_fp8, seed=seed) for in_fp8 in (False, True)
        )
        before = evaluate(plain, held_out), evaluate(fp8, held_out)
        learn(plain, plain_weights, train, seed)
        learn(fp8, fp8_weights, train, seed)
        after = evaluate(plain, held_out), evaluate(fp8, held_out)
        for name, weight in fp8_weights.items():
            plain_weights[name].data = weight.data
        found = (*before, *after, evaluate(plain, held_out))
        lines.append([str(seed), *(f"{loss:.4f}" for loss in found), f"{found[-1] / found[2] - 1:+.2%}"])
    header = [
        "seed",
        "untrained: bf16",
        "FP8",
        "learned over bf16",
        "over FP8",
        "over FP8, used over bf16",
        "beside bf16",
    ]
    print(table(header, lines))


def main() -> None:
    """Print both comparisons."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model = get_base_model()
    compare_gradients(model, read_batches(model, "train.jsonl")[0])
    compare_learning(model)


if __name__ == "__main__":
    main()
