"""The arithmetic of the README's table of what more GPUs cost."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "bench"))

from scale import (  # noqa: E402
    ADAPTER_PARAMETERS,
    DRAG,
    PARAMETERS,
    Setting,
    communication_s,
    communication_share,
    gathered_bytes,
    least_micro_batch_tokens,
    summed_bytes,
    table,
)


def test_the_shape_is_llama_3_8b() -> None:
    hidden, intermediate, layers, vocabulary, kv = 4096, 14_336, 32, 128_256, 1024
    linears = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, intermediate)] * 3
    weights = layers * (sum(inputs * outputs for inputs, outputs in linears) + 2 * hidden)
    assert weights + 2 * vocabulary * hidden + hidden == PARAMETERS
    assert layers * 16 * sum(inputs + outputs for inputs, outputs in linears) == ADAPTER_PARAMETERS


def test_bytes_by_formula() -> None:
    assert summed_bytes(1) == 0
    assert summed_bytes(8) == 2 * 7 / 8 * 4 * ADAPTER_PARAMETERS
    assert gathered_bytes(Setting(8, "ddp", 1, 1, 1.0)) == 0
    whole = 2 * 63 / 64 * 2 * PARAMETERS
    assert gathered_bytes(Setting(64, "fsdp2", 1, 1, 1.0)) == pytest.approx(whole)
    assert gathered_bytes(Setting(64, "fsdp2", 1, 4, 1.0)) == pytest.approx(4 * whole)  # with every micro batch


def test_between_nodes_it_is_slower() -> None:
    inside, between = (communication_s(Setting(gpus, "ddp", 1, 1, 1.0)) for gpus in (8, 16))
    assert between > 8 * inside
    assert communication_s(Setting(1, "ddp", 1, 1, 1.0)) == 0


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_where_it_stops_scaling(engine: str) -> None:
    least = least_micro_batch_tokens(64, engine, 16_000)
    assert communication_share(Setting(64, engine, round(least), 1, 16_000)) == pytest.approx(DRAG, rel=1e-3)


def test_the_readme_has_this_table() -> None:
    assert table(16_384, 16_000) in (ROOT / "README.md").read_text()
