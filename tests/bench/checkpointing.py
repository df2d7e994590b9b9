"""What gradient checkpointing and the size of micro batches cost: time of a token, side by side, on a CPU.

A random model of SmolLM2-135M's width with LoRA on all linear layers takes micro batches of joined rows of 256 tokens,
with none, half and all of its layers computed again; every setup once in each round. The planner's choice among them
(job/memory/candidates.py) goes by such ratios.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

ROW_TOKENS, VOCABULARY = 256, 8_000
SIZES, SHARES = (1, 2, 4, 8, 16), (0.0, 0.5, 1.0)


def make_model(layers: int) -> Any:
    """Return a random llama with an adapter, as the job trains it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from job.train import varlen  # noqa: F401 - the attention of that name
    from job.train.chunked_loss import chunk_loss
    from job.train.lora import lighten_lora

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="varlen",
        tie_word_embeddings=True,
        use_cache=False,
    )
    lora = LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    lighten_lora(model)
    chunk_loss(model)
    return model


def time_rows(model: Any, rows: int, size: int, share: float) -> float:
    """Return the seconds that a token takes with so many rows in a micro batch."""
    import torch

    from job.train.trainer import keep_activations_of_last_layers
    from job.train.varlen import JoinRows

    if share:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_activations_of_last_layers(model, share)
    else:
        model.gradient_checkpointing_disable()
    ids = torch.randint(VOCABULARY, (rows, ROW_TOKENS))
    began_s = time.perf_counter()
    for start in range(0, rows, size):
        batch = JoinRows("varlen")([{"input_ids": row, "labels": row} for row in ids[start : start + size]])
        model(**batch, num_items_in_batch=rows * (ROW_TOKENS - 1)).loss.backward()
    return (time.perf_counter() - began_s) / (rows * ROW_TOKENS)


def main() -> None:
    """Measure, and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="whose median counts, after a first one")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model, rows = make_model(options.layers), max(SIZES)
    setups = [(size, share) for size in SIZES for share in SHARES]
    found: dict[tuple[int, float], list[float]] = {setup: [] for setup in setups}
    for _ in range(options.rounds + 1):
        for setup in setups:
            found[setup].append(time_rows(model, rows, *setup))
    medians = {setup: statistics.median(times[1:]) for setup, times in found.items()}
    least = min(medians.values())
    print("tokens of a micro batch  " + "".join(f"{f'{share:.0%} again':>12}" for share in SHARES))
    for size in SIZES:
        times = (medians[size, share] / least for share in SHARES)
        print(f"{size * ROW_TOKENS:23,}  " + "".join(f"{ratio:12.2f}" for ratio in times))


if __name__ == "__main__":
    main()
