"""What a model learns to stop at, and whether generation stops there too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.data.prepare import TokenizedData


@dataclass(frozen=True)
class TurnEnd:
    """The tokens that rows end in, and those that generation with the base model stops at.

    `adopted` is a token that the rows end in and that generation would not have stopped at: it is the tokenizer's EOS
    now.
    """

    rows_by_token: dict[str, int]
    rows_that_stop: int  # rows in which a stop token is learned
    stop_tokens: tuple[str, ...]
    pad_token: str | None
    adopted: str | None


def adopt_turn_end(tokenizer: "PreTrainedTokenizerBase", data: "TokenizedData", model_folder: Path) -> TurnEnd:
    """Compare what the rows end in with what generation stops at; where the most frequent end of a row is not among
    the stops, make it the tokenizer's EOS, so that it is published with the adapter."""
    stops = find_stop_ids(tokenizer, model_folder)
    ends = dict(sorted(data.end_token_rows.items(), key=lambda item: -item[1]))
    most_frequent = next(iter(ends), None)
    stop_tokens = tuple(tokenizer.convert_ids_to_tokens(stops))
    adopted = None
    if most_frequent is not None and most_frequent not in stops:
        adopted = str(tokenizer.convert_ids_to_tokens(most_frequent))
        tokenizer.eos_token = adopted
    return TurnEnd(
        rows_by_token={str(tokenizer.convert_ids_to_tokens(token)): rows for token, rows in ends.items()},
        rows_that_stop=sum(rows for token, rows in ends.items() if token in stops),
        stop_tokens=stop_tokens,
        pad_token=tokenizer.pad_token,
        adopted=adopted,
    )


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", model_folder: Path) -> list[int]:
    """Return the token ids that generation stops at: the tokenizer's EOS and those of generation_config.json, or of
    config.json where there is none, as transformers and vLLM have it."""
    stops: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for name in ("generation_config.json", "config.json"):
        path = model_folder / name
        if path.is_file():
            stops += _read_eos(path)
            break
    return [token for token in dict.fromkeys(stops) if token < len(tokenizer)]


def _read_eos(path: Path) -> list[int]:
    try:
        configuration: Any = json.loads(path.read_bytes())
    except ValueError:
        return []
    eos = configuration.get("eos_token_id") if isinstance(configuration, dict) else None
    found = eos if isinstance(eos, list) else [eos]
    return [token for token in found if isinstance(token, int)]
