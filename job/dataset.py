"""The data set of a run: files tokenised, rows judged, chosen and split, counted for the plan and the X-ray."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.choices import setting_source
from job.data import (
    AppliedTemplate,
    Encoders,
    Integers,
    Piece,
    RowOptions,
    Selection,
    SourceFile,
    TokenizedData,
    TurnEnd,
    XRay,
    adopt_turn_end,
    apply_template,
    check_options,
    choose_max_length,
    count_copies,
    find_duplicates,
    find_template,
    load_tokenizer,
    select_rows,
    split_rows,
    tokenize_files,
)
from job.data.split import TooLong
from job.data.xray import FileRows, count_duplicates, count_lengths, count_overlap, decode_samples
from job.errors import ConfigError
from job.handover import SampleInputs
from job.inputs import InputFile, Inputs
from job.limits import refuse_bad_rows, refuse_dropped_rows
from job.log import transfer_progress
from job.manifest import DataFile
from job.memory.model_shape import read_model_shape
from job.plan import DataFacts
from job.prompts import choose_samples
from job.quantization import find_stored_quantization
from job.settings import Settings
from job.settings_groups import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a configuration says how many positions the model has, by family.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True)
class Dataset:
    """Token files with the segments to use of them (see `job.data.split`); `evaluation` is None when the held-out rows
    are of `train`."""

    tokenizer: "PreTrainedTokenizerBase"
    template: AppliedTemplate | None  # None: the base model's own
    train: TokenizedData
    evaluation: TokenizedData | None
    train_segments: Integers  # (N, 3)
    eval_segments: Integers  # (M, 3)
    samples: SampleInputs | None
    facts: DataFacts
    xray: XRay
    files: list[DataFile]

    def bad_row_files(self) -> list[Path]:
        """Return the files of the rows that were set aside."""
        sets = [self.train, self.evaluation] if self.evaluation is not None else [self.train]
        return [data.bad_rows_path for data in sets if data.bad_rows]


def prepare_dataset(
    settings: Settings,
    inputs: Inputs,
    model_folder: Path,
    folder: Path,
    *,
    processes: int,
    keep_bad_rows: Callable[[Path], str],
) -> Dataset:
    """Tokenise the files with the base model's tokenizer on so many processes, choose maximum length and rows, split.

    `keep_bad_rows` takes the file of all bad rows where they end the job, and returns where it is kept.
    Raises DataError for rows that can't be learned from, ConfigError for a length beyond the model's context, a chat
    template that doesn't fit, or a broken configuration.
    """
    configuration = _read_configuration(settings.model.id, model_folder)
    stored_quantization = find_stored_quantization(settings.model.id, configuration)
    with Encoders(processes) as encoders:
        if not folder.exists():  # else it is all tokenised, most likely
            encoders.start(inputs.size_bytes)
        tokenizer = load_tokenizer(model_folder)
        template = None if inputs.chat_template is None else apply_template(tokenizer, inputs.chat_template)
        tokenize = partial(_tokenize, settings.data, tokenizer, encoders, folder, keep_bad_rows)
        train = tokenize(inputs.train, "URI")
        evaluation = tokenize(inputs.evaluation, "EVAL_URI") if inputs.evaluation else None
    context_tokens = read_context_tokens(configuration)
    max_length, source = _max_length(settings.data, train, context_tokens)
    chosen = _choose(settings, inputs, train, evaluation, max_length)
    row_tokens = chosen.train[:, 2] - chosen.train[:, 1]
    facts = DataFacts(
        model_revision=inputs.base_model.revision,
        model_type=str(configuration.get("model_type", "unknown")),
        shape=read_model_shape(configuration, inputs.base_model.weights_bytes()),
        max_length_tokens=max_length,
        max_length_source=source,
        truncation=settings.data.truncation,
        train_rows=len(chosen.train),
        eval_rows=len(chosen.held_out),
        train_tokens=int(row_tokens.sum()),
        row_tokens=row_tokens,
        supervised_tokens=chosen.supervised_tokens,
        chat_template=_name_template(inputs, tokenizer),
        new_tokens=[] if template is None else [token.text for token in template.new_tokens],
        stored_quantization=stored_quantization,
    )
    turn_end = adopt_turn_end(tokenizer, train, model_folder)
    samples = choose_samples(  # the turn's end must be known
        settings.eval,
        inputs.prompts,
        tokenizer,
        model_folder,
        row_format=next((one for one in train.formats if one is not None), None),
        held_out=train if evaluation is None else evaluation,
        segments=chosen.held_out,
        context_tokens=context_tokens,
    )
    shown = decode_samples(train, chosen.train, tokenizer)
    xray = _make_xray(inputs, train, evaluation, chosen, facts, turn_end, shown)
    files = _describe_files(inputs.train, train)
    files += _describe_files(inputs.evaluation, evaluation) if evaluation is not None else []
    return Dataset(tokenizer, template, train, evaluation, chosen.train, chosen.held_out, samples, facts, xray, files)


def _tokenize(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    encoders: Encoders,
    folder: Path,
    keep_bad_rows: Callable[[Path], str],
    files: Sequence[InputFile],
    setting: str,
) -> TokenizedData:
    """Tokenise the files that SFT_DATA__`setting` names."""
    sources = [SourceFile(file.path, file.uri, file.sha256) for file in files]
    with transfer_progress("tokenizing", sum(file.size_bytes for file in files)) as progress:
        report = _add_up_to(progress)
        data = tokenize_files(
            sources, tokenizer, row_options(settings), folder=folder / setting, encoders=encoders, report=report
        )
    refuse_bad_rows(data, settings, f"SFT_DATA__{setting}", keep_bad_rows)
    return data


@dataclass(frozen=True)
class _Chosen:
    """The segments that are trained on, as often as their weights say, and those that are held out."""

    train: Integers  # (N, 3)
    held_out: Integers  # (M, 3)
    supervised_tokens: int  # of the training segments
    too_long: TooLong


def _choose(
    settings: Settings, inputs: Inputs, train: TokenizedData, evaluation: TokenizedData | None, max_length: int
) -> _Chosen:
    selection = _select(train, settings.data, max_length, "SFT_DATA__URI")
    if evaluation is None:
        is_train = _split(train, selection, settings)
        held_out = selection.segments[~is_train]
    else:
        is_train = np.ones(len(selection.segments), dtype=np.bool_)
        held_out = _select(evaluation, settings.data, max_length, "SFT_DATA__EVAL_URI").segments
    segments, supervised = selection.segments[is_train], selection.supervised_tokens[is_train]
    weights = np.repeat([file.weight for file in inputs.train], train.rows_per_file)  # (rows,)
    copies = count_copies(segments, weights[segments[:, 0]], seed=settings.train.seed)
    return _Chosen(np.repeat(segments, copies, axis=0), held_out, int((supervised * copies).sum()), selection.too_long)


def _make_xray(
    inputs: Inputs,
    train: TokenizedData,
    evaluation: TokenizedData | None,
    chosen: _Chosen,
    facts: DataFacts,
    turn_end: TurnEnd,
    samples: tuple[tuple[Piece, ...], ...],
) -> XRay:
    held_out_digests = (train if evaluation is None else evaluation).digests[chosen.held_out[:, 0]]
    return XRay(
        files=tuple(
            FileRows(file.uri, "no rows" if row_format is None else row_format.describe(), rows, file.weight)
            for file, row_format, rows in zip(inputs.train, train.formats, train.rows_per_file, strict=True)
        ),
        read=train.rows_read,
        kept=len(train.lengths_tokens),
        skipped=train.bad_reasons,
        too_long=chosen.too_long,
        max_length_tokens=facts.max_length_tokens,
        truncation=facts.truncation,
        train=facts.train_rows,
        held_out=facts.eval_rows,
        held_out_in_train=count_overlap(held_out_digests, train.digests[chosen.train[:, 0]]),
        tokens=facts.train_tokens,
        supervised_tokens=facts.supervised_tokens,
        lengths=count_lengths(train.lengths_tokens),
        turn_end=turn_end,
        duplicates=count_duplicates(train.digests),
        with_oddity=train.rows_with,
        samples=samples,
    )


def _describe_files(files: Sequence[InputFile], data: TokenizedData) -> list[DataFile]:
    return [
        DataFile(file.uri, file.etag, file.sha256, file.size_bytes, rows, file.weight)
        for file, rows in zip(files, data.rows_per_file, strict=True)
    ]


def row_options(settings: DataSettings) -> RowOptions:
    """Return how the settings want rows to be read. Raises ConfigError where they can't be, whatever the rows."""
    options = RowOptions(settings.loss_on, settings.columns, settings.template)
    check_options(options)
    return options


def _add_up_to(progress: Callable[[int], None]) -> Callable[[int, int], None]:
    """Return a function that takes the rows and bytes read so far, for one that takes each piece's bytes."""
    reported_bytes = 0

    def report(_: int, read_bytes: int) -> None:
        nonlocal reported_bytes
        progress(read_bytes - reported_bytes)
        reported_bytes = read_bytes

    return report


def _split(data: TokenizedData, selection: Selection, settings: Settings) -> "np.ndarray":
    """Say of each segment (K,) whether it is trained on; the others are held out, all of a row together."""
    rows = np.unique(selection.segments[:, 0])
    fraction = None if settings.data.eval_fraction == "auto" else settings.data.eval_fraction
    repeated = find_duplicates(data.digests)[rows]
    _, held_out = split_rows(rows, repeated=repeated, fraction=fraction, seed=settings.train.seed)
    is_train: np.ndarray = ~np.isin(selection.segments[:, 0], held_out)
    return is_train


def _name_template(inputs: Inputs, tokenizer: "PreTrainedTokenizerBase") -> str:
    if inputs.chat_template is not None:
        return inputs.chat_template.name
    return "the tokenizer has none" if find_template(tokenizer) is None else "the tokenizer's own"


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


def _max_length(settings: DataSettings, data: TokenizedData, context_tokens: int) -> tuple[int, str]:
    longest = int(data.lengths_tokens.max())
    if settings.max_length == "auto":
        chosen = choose_max_length(data.lengths_tokens, context_tokens)
        why = "the base model's context" if chosen == context_tokens else "99 % of the rows fit"
        return chosen, f"auto: {why}, {longest} is the longest"
    if settings.max_length > context_tokens:
        raise ConfigError(
            f"SFT_DATA__MAX_LENGTH={settings.max_length}: the base model's context is {context_tokens} tokens",
            hint=f"use at most {context_tokens}, or leave it at auto",
        )
    return settings.max_length, setting_source(settings, "max_length")


def _select(data: TokenizedData, settings: DataSettings, max_length: int, setting: str) -> Selection:
    selection = select_rows(data, max_length=max_length, truncation=settings.truncation)
    refuse_dropped_rows(selection, data, settings, max_length, setting)
    return selection
