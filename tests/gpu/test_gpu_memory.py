"""Memory and speed on a real GPU: the estimate against the measured peak, what happens when there is too little, and
tokens per second."""

from pathlib import Path

import pytest
from gpu_training import read_slot, train, try_to_train
from job_cli import ROOT

STEPS = {"TRAIN__MAX_STEPS": 6, "TRAIN__GLOBAL_BATCH_SIZE": 16, "DATA__MAX_LENGTH": 512}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bf16", {}),
        ("bf16, checkpointing", {"TRAIN__GRADIENT_CHECKPOINTING": "true"}),
        ("bf16, checkpointing of half the layers", {"TRAIN__GRADIENT_CHECKPOINTING": 0.5}),
        ("bf16, chunked loss", {"TRAIN__LOSS": "chunked"}),
        ("nf4", {"QUANTIZATION": "nf4"}),
        ("int8", {"QUANTIZATION": "int8"}),
    ],
)
def test_the_estimate_is_near_the_peak(
    large_model: Path, tmp_path: Path, figures: list[str], name: str, settings: dict[str, object]
) -> None:
    defaults = {"TRAIN__MICRO_BATCH_SIZE": 8, "TRAIN__GRADIENT_CHECKPOINTING": "false", "TRAIN__LOSS": "full"}
    manifest = train(tmp_path / "run", large_model, **(STEPS | defaults | settings))
    metrics, plan = manifest["metrics"], manifest["plan"]
    memory = plan["memory"]
    peak, estimate = metrics["peak_memory_bytes"], memory["total_bytes"] - memory["overhead_bytes"]  # PyTorch's part
    figures.append(
        f"{name}: peak {peak / 2**30:.2f} GiB, estimated {estimate / 2**30:.2f} GiB ({estimate / peak - 1:+.0%}); "
        f"{metrics['tokens_per_second']:,.0f} tokens/s on {manifest['hardware']['gpus'][0]['name']}"
    )
    assert 0.9 < estimate / peak < 1.6


def test_out_of_memory_ends_in_the_adapter_of_smaller_micro_batches(small_model: Path, tmp_path: Path) -> None:
    """PyTorch's allocator is told to refuse what goes beyond a share of the GPU."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ or 'ACCELERATE_MIXED_PRECISION' in os.environ:\n"
        "    import torch\n"
        "    total = torch.cuda.get_device_properties(0).total_memory\n"
        "    torch.cuda.set_per_process_memory_fraction(180 * 2**20 / total)\n"
    )
    settings = {"TRAIN__GLOBAL_BATCH_SIZE": 64, "TRAIN__MAX_STEPS": 4, "TRAIN__GRADIENT_CHECKPOINTING": "false"}
    settings |= {"TRAIN__LOSS": "full"}
    path = {"PYTHONPATH": f"{hook}:{ROOT}"}
    ended = try_to_train(tmp_path / "run", small_model, environment=path, TRAIN__MICRO_BATCH_SIZE=64, **settings)
    assert ended.code == 0, ended.output
    assert "out of memory" in ended.output.lower(), "nothing ran out of memory: the limit is too high"
    fitted = read_slot(tmp_path / "run" / "slot")
    micro = fitted["plan"]["micro_batch_size"]
    assert micro < 64
    direct = train(tmp_path / "direct", small_model, TRAIN__MICRO_BATCH_SIZE=micro, **settings)
    assert fitted["losses"] == pytest.approx(direct["losses"], rel=1e-3)
