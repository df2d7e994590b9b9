"""The model card says what the adapter is, and the Hub can read its front matter."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from job.manifest import DataFile
from job.record import RunRecord
from job.report.card import format_model_card

RecordFor = Callable[..., RunRecord]


def front_matter(card: str) -> dict[str, Any]:
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def table(card: str) -> dict[str, str]:
    return dict(
        line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and " | " in line[2:]
    )


@pytest.mark.parametrize(
    ("variables", "adapter", "held"),
    [
        ({}, "r 16, alpha 32, dropout 0.05", "as it is, arithmetic in float32"),
        (
            {"LORA__DORA": "true", "QUANTIZATION": "nf4"},
            "r 16, alpha 32, dropout 0.05, DoRA",
            "in 4 bits (NF4, double quantisation), arithmetic in float32",
        ),
        (
            {"LORA__RSLORA": "true", "QUANTIZATION": "int8"},
            "r 16, alpha 32, dropout 0.05, rank-stabilised LoRA",
            "in 8 bits (LLM.int8), arithmetic in float32",
        ),
    ],
)
def test_it_says_how_the_adapter_was_trained(
    record_for: RecordFor, variables: dict[str, str], adapter: str, held: str
) -> None:
    card = format_model_card(record_for(**variables))
    rows = table(card)
    assert rows["adapter"] == adapter
    assert rows["base model while training"] == held
    assert rows["trained parameters"] == "1,234 of 567,890"
    assert rows["perplexity, before and after"] == "20.79, 3.81"
    assert rows["s3://bucket/train.jsonl"] == f"100 | `{'5a' * 32}`"
    assert "It learned." in card
    assert "vllm serve org/model" in card
    assert "merged" not in card


def test_the_hub_can_read_where_it_came_from(record_for: RecordFor) -> None:
    assert front_matter(format_model_card(record_for())) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "sft-job"],
    }
    record = record_for()
    settings = record.settings | {"output": record.settings["output"] | {"license": "apache-2.0"}}
    rows = DataFile("hf://datasets/org/rows/train.jsonl", "etag", "00" * 32, 1, 1, 1.0)
    card = format_model_card(record_for(changes={"hub_revision": "c0ffee", "settings": settings, "data": [rows]}))
    assert front_matter(card) == {
        "base_model": "org/model",
        "library_name": "peft",
        "license": "apache-2.0",
        "datasets": ["org/rows"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "sft-job"],
    }


def test_a_hub_model_has_its_name_there(record_for: RecordFor) -> None:
    commit = "c0ffee0000" * 4
    data, changes = {"model_revision": commit}, {"hub_revision": commit}
    card = format_model_card(record_for(data=data, changes=changes, MODEL__ID="hf://org/model@main"))
    assert front_matter(card)["base_model"] == "org/model"
    assert 'from_pretrained("org/model")' in card
