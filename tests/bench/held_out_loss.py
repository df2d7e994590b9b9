"""The loss of a base model, and of adapters on it, on the same held-out rows: one measure for all that are compared.

`python tests/bench/held_out_loss.py MODEL ROWS ADAPTER...` prints a JSON list in nats per token, the base model's
first: in float32, each row by itself, over all of its tokens but the first.
"""

import json
import sys
from pathlib import Path

import torch
from training_rows import read_tokens


def main(model_folder: Path, rows_file: Path, adapters: list[Path]) -> None:
    """Measure, and print."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = read_tokens(AutoTokenizer.from_pretrained(model_folder), rows_file)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    losses = [_measure(base, rows)]
    for adapter in adapters:
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        losses.append(_measure(adapted, rows))
        base = adapted.unload()
    print(json.dumps(losses))


@torch.no_grad()
def _measure(model: torch.nn.Module, rows: list[list[int]]) -> float:
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])  # (1, T)
        logits = model(input_ids=ids).logits[0, :-1]  # (T - 1, V)
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(row) - 1
    return total / tokens


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
