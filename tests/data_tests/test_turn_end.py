"""What rows end in is compared with what generation stops at."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from job.data import load_tokenizer
from job.data.turn_end import adopt_turn_end, find_stop_ids


@dataclass
class Ends:
    end_token_rows: dict[int, int]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def write(folder: Path, name: str, eos: object) -> None:
    (folder / name).write_text(json.dumps({"eos_token_id": eos}))


def test_generation_stops_at_the_tokenizers_eos_and_the_models(tmp_path: Path, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    assert find_stop_ids(tokenizer, tmp_path) == [eos]
    write(tmp_path, "config.json", 7)
    assert find_stop_ids(tokenizer, tmp_path) == [eos, 7]
    write(tmp_path, "generation_config.json", [eos, 9])
    assert find_stop_ids(tokenizer, tmp_path) == [eos, 9]
    write(tmp_path, "generation_config.json", None)
    assert find_stop_ids(tokenizer, tmp_path) == [eos]
    (tmp_path / "generation_config.json").write_text("{")
    assert find_stop_ids(tokenizer, tmp_path) == [eos]


def test_rows_that_end_in_a_stop_are_left_alone(tmp_path: Path, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    end = adopt_turn_end(tokenizer, Ends({eos: 12}), tmp_path)  # type: ignore[arg-type]
    assert (end.rows_that_stop, end.adopted, tokenizer.eos_token_id) == (12, None, eos)
    assert end.rows_by_token == {tokenizer.eos_token: 12}


def test_an_end_that_generation_runs_over_becomes_the_eos(tmp_path: Path, tokenizer: Any) -> None:
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert other != tokenizer.eos_token_id
    end = adopt_turn_end(tokenizer, Ends({tokenizer.eos_token_id: 2, other: 10}), tmp_path)  # type: ignore[arg-type]
    assert (end.adopted, end.rows_that_stop) == ("<|endoftext|>", 2)
    assert tokenizer.eos_token == "<|endoftext|>"
