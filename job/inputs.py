"""What a run reads: the data files, the base model and the chat template, found in their stores and fetched."""

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job.data import (
    SHIPPED_NAMES,
    ChatTemplate,
    clone_template,
    is_readable,
    load_tokenizer,
    read_template_file,
    shipped_template,
)
from job.downloads import Downloads, FetchedFile
from job.errors import ConfigError, DataError, NotFoundError
from job.log import format_bytes, logger
from job.manifest import make_run_id
from job.prompts import GivenPrompt, fetch_prompts
from job.settings import Settings
from job.settings_groups import ModelSettings
from job.storage import ReadableStore, StoredFile, open_store

# Pickled weights (.bin, .pt) are never read. Mistral publishes its weights a second time as consolidated.safetensors.
_MODEL_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
_DUPLICATE_WEIGHTS = "consolidated"
MODEL_FOLDER = "model"  # in the work folder


@dataclass(frozen=True)
class InputFile:
    """A data file that is here: where it came from and lies, its content's sha256, and its source's weight."""

    uri: str
    path: Path
    etag: str
    size_bytes: int
    sha256: str
    weight: float


@dataclass(frozen=True)
class BaseModel:
    """A base model found in its store. `hub_revision` is the commit for a Hub model, None elsewhere."""

    id: str
    revision: str
    hub_revision: str | None
    store: ReadableStore
    files: tuple[StoredFile, ...]

    def fetch_configuration(self, folder: Path) -> Path:
        """Fetch all but the weights, enough for tokenizing and planning; return the folder that the model is in."""
        files = [file for file in self.files if not _is_weights(file)]
        fetched = self._downloads(folder).fetch(files, "base model's configuration")
        return next(file.path.parent for file in fetched if file.path.name == "config.json")

    def fetch_weights(self, folder: Path) -> None:
        """Fetch the weights, given the same folder, to where the configuration is."""
        self._downloads(folder).fetch([file for file in self.files if _is_weights(file)], "base model")

    def weights_bytes(self) -> int:
        """Return the size of the weights."""
        return sum(file.size_bytes for file in self.files if _is_weights(file))

    def _downloads(self, folder: Path) -> Downloads:
        return Downloads(folder, self.store, list(self.files))


@dataclass(frozen=True)
class Inputs:
    """All that a run reads, and the name of the run that follows from it."""

    run_id: str
    train: list[InputFile]
    evaluation: list[InputFile]
    base_model: BaseModel
    chat_template: ChatTemplate | None  # None: the base model's own
    prompts: list[GivenPrompt]

    @property
    def size_bytes(self) -> int:
        """The size of all data files."""
        return sum(file.size_bytes for file in (*self.train, *self.evaluation))


def fetch_data(uri: str, *, weight: float, setting: str, folder: Path) -> list[InputFile]:
    """Fetch the data files that a URI names, in the order of their paths.

    Raises DataError when none has an ending that can be read, and the store's errors.
    """
    store = open_store(uri, setting=setting)
    found = store.find()
    files = [file for file in found if is_readable(file.path)]
    if not files:
        endings = sorted({PurePosixPath(file.path).suffix or file.path for file in found})
        raise DataError(
            f"{setting}={uri}: none of the {len(found)} files there is a data file (found {', '.join(endings[:10])})",
            hint="data files end in .jsonl, .json, .csv, .tsv, .parquet or .arrow; text also in .gz or .zst after that",
        )
    if len(files) < len(found):
        logger.info("%s: %d of %d files are data files", uri, len(files), len(found))
    downloads = Downloads(folder, store, files)
    fetched = downloads.fetch(files, "data")
    total_bytes = sum(file.size_bytes for file in files)
    logger.info("%s: %d file%s, %s", uri, len(files), "s" if len(files) > 1 else "", format_bytes(total_bytes))
    return [_describe(file, downloads.hash_file(file), weight) for file in fetched]


def _describe(file: FetchedFile, sha256: str, weight: float) -> InputFile:
    source = file.source
    return InputFile(source.uri, file.path, source.etag, source.size_bytes, sha256, weight)


def find_base_model(settings: ModelSettings) -> BaseModel:
    """Look the base model up in its store, without fetching it.

    Raises NotFoundError when it has no configuration or no safetensors weights, and the store's errors.
    """
    uri = _model_uri(settings.id, settings.revision)
    store = open_store(uri, setting="SFT_MODEL__ID")
    found = [file for file in store.find() if _is_model_file(file.path)]
    if not any(file.path == "config.json" for file in found):
        raise NotFoundError(
            f"SFT_MODEL__ID={settings.id}: there is no config.json, so it isn't a model in Hugging Face's form",
            hint="name the folder or prefix that holds config.json itself",
        )
    if not any(_is_weights(file) for file in found):
        raise NotFoundError(
            f"SFT_MODEL__ID={settings.id}: there are no safetensors weights",
            hint="pickled weights (.bin) are never read; convert them with save_pretrained",
        )
    revision = store.revision(found)
    hub_revision = revision if uri.startswith("hf://") else None
    return BaseModel(settings.id, revision, hub_revision, store, tuple(found))


def _model_uri(model_id: str, revision: str | None) -> str:
    """Return the URI of a model: a Hub id where it is neither a URI nor a path."""
    is_path = model_id.startswith(("/", ".", "~")) or Path(model_id).is_dir()
    if "://" in model_id or is_path:
        if revision is not None and not model_id.startswith("hf://"):
            raise ConfigError(
                f"SFT_MODEL__REVISION={revision}: SFT_MODEL__ID={model_id} isn't a Hub model, so it has none",
                hint="leave SFT_MODEL__REVISION out",
            )
        uri = model_id
    else:
        uri = f"hf://{model_id}"
    return f"{uri}@{revision}" if revision else uri


def find_chat_template(named: str | None, folder: Path) -> ChatTemplate | None:
    """Return the chat template that SFT_MODEL__CHAT_TEMPLATE names: shipped, in a .jinja file, or another model's.

    Raises ConfigError when it is none, and the store's errors.
    """
    if named is None:
        return None
    if named in SHIPPED_NAMES:
        return shipped_template(named)
    is_file = named.endswith(".jinja")
    if not is_file and "/" not in named and not Path(named).is_dir():
        near = difflib.get_close_matches(named, SHIPPED_NAMES, n=1)
        raise ConfigError(
            f"SFT_MODEL__CHAT_TEMPLATE={named}: no such chat template{f', did you mean {near[0]}?' if near else ''}",
            hint=f"use one of {', '.join(SHIPPED_NAMES)}, a .jinja file, or a model whose tokenizer has one",
        )
    store = open_store(named if is_file else _model_uri(named, None), setting="SFT_MODEL__CHAT_TEMPLATE")
    files = [file for file in store.find() if is_file or (_is_model_file(file.path) and not _is_weights(file))]
    fetched = Downloads(folder, store, files).fetch(files, "chat template") if files else []
    if is_file:
        return read_template_file(fetched[0].path, named)
    if not fetched:
        raise ConfigError(
            f"SFT_MODEL__CHAT_TEMPLATE={named}: there is no tokenizer",
            hint=f"name a model, a .jinja file, or one of {', '.join(SHIPPED_NAMES)}",
        )
    return clone_template(load_tokenizer(fetched[0].path.parent), named)


def _is_model_file(path: str) -> bool:
    return "/" not in path and PurePosixPath(path).suffix in _MODEL_SUFFIXES and not path.startswith(_DUPLICATE_WEIGHTS)


def _is_weights(file: StoredFile) -> bool:
    return file.path.endswith(".safetensors")


def find_inputs(settings: Settings, work_dir: Path) -> Inputs:
    """Fetch the data, find the base model, and name the run that they make with the settings.

    Raises the stores' errors, DataError and ConfigError.
    """
    data_dir = work_dir / "data"
    base_model = find_base_model(settings.model)
    chat_template = find_chat_template(settings.model.chat_template, work_dir / "chat-template")
    train = [
        file
        for index, source in enumerate(settings.data.uri)
        for file in fetch_data(
            source.uri, weight=source.weight, setting="SFT_DATA__URI", folder=data_dir / f"train-{index}"
        )
    ]
    for leftover in data_dir.glob("train-*"):  # of a run with more sources
        if int(leftover.name.removeprefix("train-")) >= len(settings.data.uri):
            shutil.rmtree(leftover, ignore_errors=True)
    evaluation = []
    if settings.data.eval_uri is not None:
        evaluation = fetch_data(
            settings.data.eval_uri, weight=1, setting="SFT_DATA__EVAL_URI", folder=data_dir / "eval"
        )
    prompts = fetch_prompts(settings.eval.prompts, work_dir / "prompts")
    run_id = make_run_id(
        settings,
        train=[(file.sha256, file.weight) for file in train],
        evaluation=[file.sha256 for file in evaluation],
        model_revision=base_model.revision,
        chat_template=None if chat_template is None else chat_template.text,
    )
    return Inputs(run_id, train, evaluation, base_model, chat_template, prompts)
