"""One of two processes that train a small model by FSDP2 on a CPU, and compare with a model that isn't split."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from job.train.adapter import save_adapter
from job.train.gather import gather_frozen, gather_trained

STEPS = 3


def make_model(*, tied: bool) -> Any:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=tied, **sizes))
    # As the job loads it on a GPU: a frozen base in bfloat16 under an adapter in float32.
    model = get_peft_model(base.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def train(model: Any, ids: torch.Tensor) -> None:
    """Step a few times; FSDP2 averages the gradients of both processes, so that a whole batch in one is the same."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(folder: Path, *, tied: bool) -> None:
    rank = dist.get_rank()
    ids = torch.arange(4 * 12).reshape(4, 12) % 97
    alone = make_model(tied=tied)
    train(alone, ids)

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=rank == 0, device="cpu"
    )
    split = make_model(tied=tied)
    before = {name: weight.detach().float().clone() for name, weight in split.named_parameters()}
    fsdp2_prepare_model(accelerator, split)
    assert isinstance(split, FSDPModule)
    assert all(isinstance(weight, DTensor) for weight in split.parameters())
    assert all(torch.equal(gather_frozen(weight), before[name]) for name, weight in split.named_parameters())
    train(split, ids[rank * 2 : rank * 2 + 2])

    expected, actual = gather_trained(alone, "ddp"), gather_trained(split, "fsdp2")
    assert expected.keys() == actual.keys()
    for name, weight in actual.items():
        assert not isinstance(weight, DTensor)
        assert weight.dtype == torch.float32
        change = (expected[name] - before[name]).norm()
        assert change > 0
        assert (weight - expected[name]).norm() < 0.03 * change, name  # the base computes in bfloat16
    save_adapter(split, actual, folder, rank=rank)
    dist.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in actual} == set(saved)
    assert all(torch.equal(saved[name.replace(".default", "")], weight) for name, weight in actual.items())
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for tied in (True, False):
        compare(Path(sys.argv[1]) / f"tied-{tied}", tied=tied)
    print("as without FSDP2")
    dist.destroy_process_group()
