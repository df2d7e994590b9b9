"""What the loss in chunks saves, and what it costs: memory and time of a training step, beside the full loss.

Each way trains a random llama with a LoRA adapter in a process of its own; memory is the peak of a step above what the
model takes (on a GPU what PyTorch allocated, else the resident set of the process), time the median of the steps (on a
CPU what the process used of it).
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Return MiB and seconds of a training step. To be called in a fresh process."""
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from job.train.chunked_loss import chunk_loss

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.tokens,
    )
    base = LlamaForCausalLM(config).to(device, dtype=getattr(torch, options.dtype))
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "chunked":
        chunk_loss(model)
    ids = torch.randint(options.vocabulary, (1, options.tokens), device=device)
    labels = ids.clone()
    labels[:, int(options.tokens * options.supervised) :] = -100
    tokens = int((labels[:, 1:] != -100).sum())

    clock = time.perf_counter if on_gpu else time.process_time

    def step() -> float:
        began_s = clock()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss
        loss.backward()
        value: float = loss.item()  # waits for the GPU
        seconds.append(clock() - began_s)
        return value

    seconds: list[float] = []
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    loss = step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(options.rounds):
        step()
    return {"mib": (peak - before) / 2**20, "seconds": statistics.median(seconds[1:]), "loss": loss}


def _send(way: str, options: argparse.Namespace, pipe: Any) -> None:
    pipe.send(json.dumps(measure(way, options)))


def _measure_apart(way: str, options: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(way, options, theirs))
    process.start()
    found: dict[str, float] = json.loads(ours.recv())
    process.join()
    return found


def main() -> None:
    """Measure both ways, and print a table with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50_000, help="tokens that the model knows")
    parser.add_argument("--tokens", type=int, default=2_048, help="length of the sequence")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that are learned")
    parser.add_argument("--hidden", type=int, default=576, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="its depth")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU")
    parser.add_argument("--rounds", type=int, default=1, help="steps whose median time counts, after a first one")
    options = parser.parse_args()
    print("loss        MiB   seconds      loss")
    full, chunked = (_measure_apart(way, options) for way in ("full", "chunked"))
    for way, found in (("full", full), ("chunked", chunked)):
        print(f"{way:8} {found['mib']:6,.0f} {found['seconds']:9.2f} {found['loss']:9.5f}")
    print(f"ratio    {full['mib'] / chunked['mib']:6.2f} {full['seconds'] / chunked['seconds']:9.2f}")


if __name__ == "__main__":
    main()
