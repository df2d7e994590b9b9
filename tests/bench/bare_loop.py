"""The ceiling: a bare PyTorch loop over joined rows, with nothing but what a step needs.

The same batches as the job's (8 rows joined into one sequence, positions starting anew with each), the same adapter,
precision, loss, clipping and schedule. No trainer, no callbacks, no metrics: what a step costs beyond it is overhead.
"""

import random

import torch
from training_rows import read_tokens, training_parser


def main() -> None:
    """Train, and save the adapter."""
    options = training_parser(__doc__).parse_args()

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    base.config.use_cache = False  # else joined rows see each other
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    rows = read_tokens(AutoTokenizer.from_pretrained(options.model), options.rows)
    random.Random(options.seed).shuffle(rows)
    batches = [_join(rows[start : start + options.batch]) for start in range(0, len(rows), options.batch)]
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(options.output)


def _join(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),  # (1, T)
        "labels": torch.tensor([[token for row in rows for token in (-100, *row[1:])]]),  # (1, T)
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row))]]),  # (1, T)
    }


if __name__ == "__main__":
    main()
