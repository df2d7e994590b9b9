"""The data set of a run: files tokenised, rows chosen and split, counted for the plan."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from job.data import (
    NOT_SUPERVISED,
    TokenizedData,
    choose_max_length,
    load_tokenizer,
    select_rows,
    split_rows,
    tokenize_files,
)
from job.errors import ConfigError, DataError
from job.inputs import FetchedFile, Inputs
from job.log import logger
from job.manifest import DataFile
from job.plan import DataFacts, setting_source
from job.settings import Settings
from job.settings_groups import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a configuration says how many positions the model has, by family.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True)
class Dataset:
    """Token files with the row numbers to use of them; `evaluation` is None when the held-out rows are of `train`."""

    tokenizer: "PreTrainedTokenizerBase"
    train: TokenizedData
    evaluation: TokenizedData | None
    train_rows: NDArray[np.int64]  # (N,)
    eval_rows: NDArray[np.int64]  # (M,)
    facts: DataFacts
    files: list[DataFile]


def prepare_dataset(settings: Settings, inputs: Inputs, model_folder: Path, folder: Path) -> Dataset:
    """Tokenise the files with the base model's tokenizer, choose the maximum length and the rows, and split.

    Raises DataError for rows that can't be learned from, ConfigError for a length beyond the model's context or a
    broken configuration.
    """
    configuration = _read_configuration(settings.model.id, model_folder)
    tokenizer = load_tokenizer(model_folder)
    train = _tokenize(inputs.train, tokenizer, settings.data, folder / "train.arrow")
    evaluation = None
    if inputs.evaluation:
        evaluation = _tokenize(inputs.evaluation, tokenizer, settings.data, folder / "eval.arrow")
    max_length, source = _max_length(settings.data, train, read_context_tokens(configuration))
    train_rows = _select(train, settings.data, max_length, setting="SFT_DATA__URI")
    if evaluation is not None:
        eval_rows = _select(evaluation, settings.data, max_length, setting="SFT_DATA__EVAL_URI")
    else:
        fraction = None if settings.data.eval_fraction == "auto" else settings.data.eval_fraction
        train_rows, eval_rows = split_rows(train_rows, fraction=fraction, seed=settings.train.seed)
    if len(eval_rows) == 0:
        logger.warning("no rows are held out, so nothing shows whether the adapter learned or memorised")
    facts = DataFacts(
        model_revision=inputs.base_model.revision,
        model_type=str(configuration.get("model_type", "unknown")),
        max_length_tokens=max_length,
        max_length_source=source,
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        train_tokens=int(np.minimum(train.lengths_tokens[train_rows], max_length).sum()),
        supervised_tokens=_count_supervised(train, train_rows, max_length),
    )
    files = _describe_files(inputs.train, train)
    files += _describe_files(inputs.evaluation, evaluation) if evaluation is not None else []
    return Dataset(tokenizer, train, evaluation, train_rows, eval_rows, facts, files)


def _read_configuration(model_id: str, model_folder: Path) -> dict[str, object]:
    try:
        configuration = json.loads((model_folder / "config.json").read_bytes())
    except ValueError as error:
        configuration = error
    if not isinstance(configuration, dict):
        raise ConfigError(
            f"SFT_MODEL__ID={model_id}: its config.json is not a JSON object", hint="fetch or upload the model again"
        )
    return configuration


def read_context_tokens(configuration: dict[str, object]) -> int:
    """Return the longest sequence that a model's config.json allows, in tokens."""
    nested = configuration.get("text_config")
    for tree in (configuration, nested if isinstance(nested, dict) else {}):
        for key in _CONTEXT_KEYS:
            value = tree.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return 1_048_576  # no limit by position, as in models without positional embeddings


def _tokenize(
    files: Sequence[FetchedFile], tokenizer: "PreTrainedTokenizerBase", settings: DataSettings, target: Path
) -> TokenizedData:
    data = tokenize_files(
        [(file.path, file.source.uri) for file in files],
        tokenizer,
        loss_on=settings.loss_on,
        target=target,
        report=lambda rows: logger.debug("%d rows read", rows),
    )
    if data.eos_supervised_rows == 0:
        logger.warning(
            "no row ends in %s, which is what generation stops at: the model won't learn to stop", tokenizer.eos_token
        )
    for name, shape, rows in zip(data.names, data.shapes, data.rows_per_file, strict=True):
        logger.info("%s: %d rows of shape %s", name, rows, shape or "unknown")
    return data


def _max_length(settings: DataSettings, data: TokenizedData, context_tokens: int) -> tuple[int, str]:
    if settings.max_length == "auto":
        why = f"auto: 99 % of the rows fit, {int(data.lengths_tokens.max())} is the longest"
        return choose_max_length(data.lengths_tokens, context_tokens), why
    if settings.max_length > context_tokens:
        raise ConfigError(
            f"SFT_DATA__MAX_LENGTH={settings.max_length}: the base model's context is {context_tokens} tokens",
            hint=f"use at most {context_tokens}, or leave it at auto",
        )
    return settings.max_length, setting_source(settings, "max_length")


def _select(data: TokenizedData, settings: DataSettings, max_length: int, *, setting: str) -> NDArray[np.int64]:
    selection = select_rows(data, max_length=max_length, truncation=settings.truncation)
    total = len(data.lengths_tokens)
    if selection.dropped_too_long:
        logger.warning(
            "%d of %d rows are longer than %d tokens and left out", selection.dropped_too_long, total, max_length
        )
    if selection.truncated:
        logger.warning("%d of %d rows are cut to %d tokens", selection.truncated, total, max_length)
    if selection.dropped_unsupervised:
        logger.warning(
            "%d of %d rows are left out: nothing of the answer is within %d tokens",
            selection.dropped_unsupervised,
            total,
            max_length,
        )
    if len(selection.indices) == 0:
        raise DataError(
            f"{setting}: none of the {total} rows fits into {max_length} tokens, the shortest has "
            f"{data.lengths_tokens.min()}",
            hint="raise SFT_DATA__MAX_LENGTH, or set SFT_DATA__TRUNCATION=keep_start",
        )
    return selection.indices


def _count_supervised(data: TokenizedData, rows: NDArray[np.int64], max_length: int) -> int:
    """Return the supervised tokens of the rows; of one that is cut, those before the cut."""
    whole = rows[data.lengths_tokens[rows] <= max_length]
    cut = rows[data.lengths_tokens[rows] > max_length]
    labels = pa.ipc.open_file(pa.memory_map(str(data.path))).read_all()["labels"]
    kept = (labels[int(row)].values.to_numpy()[1:max_length] for row in cut)
    return int(data.supervised_tokens[whole].sum()) + sum(int((part != NOT_SUPERVISED).sum()) for part in kept)


def _describe_files(files: Sequence[FetchedFile], data: TokenizedData) -> list[DataFile]:
    return [
        DataFile(file.source.uri, file.source.etag, file.sha256, file.source.size_bytes, rows)
        for file, rows in zip(files, data.rows_per_file, strict=True)
    ]
