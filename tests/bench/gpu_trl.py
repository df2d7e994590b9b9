"""The same steps by TRL, for `make bench-gpu`, with its best settings: rows packed without padding, FlashAttention 2
and Liger's kernels where they are installed, and no gradient checkpointing where that fits."""

import importlib.util
import itertools
import statistics
import tempfile
import time
from typing import Any

from gpu_rung import WARMUP_STEPS, Measured, Task


def measure_trl(task: Task, *, checkpointing: bool) -> Measured:
    """Train as the task says in this process, by TRL; of its settings only the precision counts."""
    if lacking := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        return Measured(lacking=f"{' and '.join(lacking)} not installed")
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix="sft-job-bench-") as folder:
            return _train(task, folder, checkpointing=checkpointing)
    except torch.OutOfMemoryError as error:
        return Measured(lacking=str(error).splitlines()[0], out_of_memory=True)


def _train(task: Task, folder: str, *, checkpointing: bool) -> Measured:
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    is_installed = {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "liger_kernel")}
    generator = np.random.default_rng(0)
    lengths = task.lengths * (task.steps * task.rows_of_batch // len(task.lengths))
    rows = Dataset.from_dict({"input_ids": [generator.integers(2, 500, length).tolist() for length in lengths]})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype=getattr(torch, task.settings["MODEL__DTYPE"]),
        attn_implementation="flash_attention_2" if on_gpu and is_installed["flash_attn"] else "sdpa",
        device_map={"": 0} if on_gpu else None,
    )
    ends: list[float] = []

    class _Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.monotonic())

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"),
        callbacks=[_Clock()],
        args=SFTConfig(
            output_dir=folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.rows_of_batch // len(task.lengths),
            packing=True,
            packing_strategy="bfd",
            max_length=sum(task.lengths),
            bf16=task.settings["MODEL__DTYPE"] == "bfloat16",
            use_cpu=not on_gpu,
            gradient_checkpointing=checkpointing,
            use_liger_kernel=on_gpu and is_installed["liger_kernel"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    step_s = [end - begin for begin, end in itertools.pairwise(ends)][WARMUP_STEPS - 1 :]
    trained, total = trainer.model.get_nb_trainable_parameters()
    return Measured(
        tokens_per_s=task.rows_of_batch // len(task.lengths) * sum(task.lengths) / statistics.median(step_s),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        loss=[line["loss"] for line in trainer.state.log_history if "loss" in line][-1],
        parameters=total - trained,
    )
