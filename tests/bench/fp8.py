"""What a base model in FP8 does to loss and gradients: `make bench-fp8`, on a CPU, which computes the GPU's numbers.

SmolLM2-135M with an adapter that isn't zero takes one look at rows of the shop, in float32, in bfloat16, and in both
with the frozen layers in FP8. Printed is how far each is from float32: nothing is timed.
"""

import json
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402
from base_model import get_base_model  # noqa: E402
from docs import table  # noqa: E402
from job_cli import SHOP  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.nn.functional import cosine_similarity  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding  # noqa: E402

from job.train.fp8 import hold_in_fp8  # noqa: E402

ROWS = 8
LORA_B_STD = 0.01  # a fresh adapter has no B, and A no gradient


def read_batch(model: Path) -> BatchEncoding:
    """Return rows of the shop as a padded batch, with its labels."""
    lines = (SHOP / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    batch = AutoTokenizer.from_pretrained(model)(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def learn(model: Path, batch: BatchEncoding, dtype: torch.dtype, *, in_fp8: bool) -> tuple[float, list[torch.Tensor]]:
    """Return the loss, and the gradient of each matrix of the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.config.use_cache = False
    if in_fp8:
        hold_in_fp8(base, head=base.get_output_embeddings())
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        weight.data = weight.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=LORA_B_STD)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = adapted(**batch).loss
    loss.backward()
    return loss.item(), [weight.grad.flatten() for weight in trained.values()]


def main() -> None:
    """Print a line for each precision."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model = get_base_model()
    batch = read_batch(model)
    expected_loss, expected = learn(model, batch, torch.float32, in_fp8=False)
    lines = []
    for dtype, in_fp8 in ((torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
        loss, gradients = learn(model, batch, dtype, in_fp8=in_fp8)
        name = str(dtype).removeprefix("torch.") + (", base in FP8" if in_fp8 else "")
        whole = cosine_similarity(torch.cat(gradients), torch.cat(expected), dim=0)
        worst = min(cosine_similarity(*pair, dim=0) for pair in zip(gradients, expected, strict=True))
        lines.append([name, f"{loss / expected_loss - 1:+.2%}", f"{whole:.4f}", f"{worst:.2f}"])
    print(f"{model.name}, {ROWS} rows of {SHOP.name}; beside float32, whose loss is {expected_loss:.4f}:\n")
    print(table(["", "loss", "cosine of the gradients", "of the worst matrix"], lines))


if __name__ == "__main__":
    main()
