"""One of two processes that train a small model by FSDP2 on a CPU, compare with a model that isn't split, and go on."""

import os
import sys
import time
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

from job.handover import PromptInput, SampleInputs
from job.train.adapter import save_adapter
from job.train.gather import (
    find_trained,
    gather_frozen,
    gather_one,
    gather_trained,
    replace_one,
    replace_trained,
)
from job.train.optimizer_state import gather_states, restore_states
from job.train.samples import Answerer

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


def train(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Step a few times; FSDP2 averages the gradients of both processes, so that a whole batch in one is the same."""
    if optimizer is None:
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def split_up(model: Any, rank: int) -> Any:
    """Have accelerate split a model among the processes, as it does on GPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=rank == 0, device="cpu"
    )
    fsdp2_prepare_model(accelerator, model)
    return model


def go_on(ids: torch.Tensor) -> None:
    """Train, put all that was learned into another model that is split, and see both learn the same from there on."""
    rank = dist.get_rank()
    mine = ids[rank * 2 : rank * 2 + 2]
    plan: Any = SimpleNamespace(engine="fsdp2", optimizer="adamw")
    models = [split_up(make_model(tied=True), rank) for _ in range(2)]
    trained = [find_trained(model) for model in models]
    trainers: list[Any] = [
        SimpleNamespace(optimizer=torch.optim.AdamW(weights.values(), lr=1e-2)) for weights in trained
    ]
    train(models[0], mine, trainers[0].optimizer)
    saved = {f"{name}/{key}": state.clone() for name, key, state in gather_states(trainers[0], trained[0], plan)}
    keys = {name: ["exp_avg", "exp_avg_sq", "step"] for name in trained[1]}
    for name, weight in trained[0].items():
        assert not isinstance(saved[f"{name}/exp_avg"], DTensor)
        assert saved[f"{name}/exp_avg"].shape == weight.shape
        with torch.no_grad():
            replace_one(trained[1][name], gather_one(name, weight, "fsdp2"), "fsdp2")
    restore_states(trainers[1], trained[1], plan, keys, lambda name, key: saved[f"{name}/{key}"])
    before = gather_trained(models[1], "fsdp2")
    for model, trainer in zip(models, trainers, strict=True):
        train(model, mine, trainer.optimizer)
    expected, actual = (gather_trained(model, "fsdp2") for model in models)
    assert all(torch.equal(weight, expected[name]) for name, weight in actual.items())
    assert not all(torch.equal(weight, before[name]) for name, weight in actual.items())


def compare_answers(alone: Any, split: Any, weights: dict[str, torch.Tensor]) -> None:
    """See the split model answer what the whole one does with the same weights, with its adapter and without."""
    replace_trained(alone, weights, "ddp")
    prompts = [PromptInput(ids=ids, text="", messages=None, reference=None) for ids in ([5, 9, 3], [7], [20, 21])]
    samples = SampleInputs(prompts=prompts, stop_ids=[], max_new_tokens=6)

    def answer(model: Any, world_size: int) -> list[Any]:
        plan: Any = SimpleNamespace(world_size=world_size, device="cpu", dtype="bfloat16")
        rank = dist.get_rank() if world_size > 1 else 0
        answerer = Answerer(model, model.get_base_model(), 0, plan, rank=rank, beat=lambda: None)
        return answerer.answer(samples, batch_size=1, until_s=time.monotonic() + 60)

    after = answer(split, 2)
    assert after == answer(alone, 1)
    with split.disable_adapter(), alone.disable_adapter():
        before = answer(split, 2)
        assert before == answer(alone, 1)
    assert before != after
    assert all(len(ids) == 6 for ids in before)


def compare(folder: Path, *, tied: bool) -> None:
    rank = dist.get_rank()
    ids = torch.arange(4 * 12).reshape(4, 12) % 97
    alone = make_model(tied=tied)
    train(alone, ids)

    split = make_model(tied=tied)
    before = {name: weight.detach().float().clone() for name, weight in split.named_parameters()}
    split_up(split, rank)
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
    compare_answers(alone, split, actual)
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
    go_on(torch.arange(4 * 12).reshape(4, 12) % 97)
    print("as without FSDP2", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # as the worker does: PyTorch's threads may abort an interpreter that takes itself down
