"""What a run reads: the data files and the base model, found in their stores and fetched."""

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job.data import is_readable
from job.errors import ConfigError, DataError, NotFoundError
from job.log import format_bytes, logger, transfer_progress
from job.manifest import hash_file, make_run_id
from job.settings import Settings
from job.settings_groups import ModelSettings
from job.storage import Store, StoredFile, open_store

# Pickled weights (.bin, .pt) are never read. Mistral publishes its weights a second time as consolidated.safetensors.
_MODEL_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
_DUPLICATE_WEIGHTS = "consolidated"
MODEL_FOLDER = "model"  # in the work folder


@dataclass(frozen=True)
class FetchedFile:
    """A data file that is here: where it came from, where it lies, and its content's sha256."""

    source: StoredFile
    path: Path
    sha256: str


@dataclass(frozen=True)
class BaseModel:
    """A base model found in its store. `hub_revision` is the commit for a Hub model, None elsewhere."""

    id: str
    revision: str
    hub_revision: str | None
    store: Store
    files: tuple[StoredFile, ...]

    def fetch_configuration(self, folder: Path) -> Path:
        """Fetch all but the weights, enough for tokenizing and planning; return the folder that the model is in."""
        files = [file for file in self.files if not _is_weights(file)]
        paths = self._fetch(files, folder, "base model's configuration")
        return next(path.parent for path in paths if path.name == "config.json")

    def fetch_weights(self, folder: Path) -> None:
        """Fetch the weights, given the same folder, to where the configuration is."""
        self._fetch([file for file in self.files if _is_weights(file)], folder, "base model")

    def _fetch(self, files: list[StoredFile], folder: Path, label: str) -> list[Path]:
        with transfer_progress(label, sum(file.size_bytes for file in files)) as progress:
            return self.store.fetch(files, folder, progress)


@dataclass(frozen=True)
class Inputs:
    """All that a run reads, and the name of the run that follows from it."""

    run_id: str
    train: list[FetchedFile]
    evaluation: list[FetchedFile]
    base_model: BaseModel


def fetch_data(uri: str, *, setting: str, folder: Path) -> list[FetchedFile]:
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
    total_bytes = sum(file.size_bytes for file in files)
    with transfer_progress("data", total_bytes) as progress:
        paths = store.fetch(files, folder, progress)
    logger.info("%s: %d file%s, %s", uri, len(files), "s" if len(files) > 1 else "", format_bytes(total_bytes))
    return [FetchedFile(file, path, hash_file(path)) for file, path in zip(files, paths, strict=True)]


def find_base_model(settings: ModelSettings) -> BaseModel:
    """Look the base model up in its store, without fetching it.

    Raises NotFoundError when it has no configuration or no safetensors weights, and the store's errors.
    """
    uri = _model_uri(settings)
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


def _model_uri(settings: ModelSettings) -> str:
    """Return the URI of a base model: a Hub id where it is neither a URI nor a path."""
    model_id = settings.id
    is_path = model_id.startswith(("/", ".", "~")) or Path(model_id).is_dir()
    if "://" in model_id or is_path:
        if settings.revision is not None and not model_id.startswith("hf://"):
            raise ConfigError(
                f"SFT_MODEL__REVISION={settings.revision}: SFT_MODEL__ID={model_id} isn't a Hub model, so it has none",
                hint="leave SFT_MODEL__REVISION out",
            )
        uri = model_id
    else:
        uri = f"hf://{model_id}"
    return f"{uri}@{settings.revision}" if settings.revision else uri


def _is_model_file(path: str) -> bool:
    return "/" not in path and PurePosixPath(path).suffix in _MODEL_SUFFIXES and not path.startswith(_DUPLICATE_WEIGHTS)


def _is_weights(file: StoredFile) -> bool:
    return file.path.endswith(".safetensors")


def find_inputs(settings: Settings, work_dir: Path) -> Inputs:
    """Fetch the data, find the base model, and name the run that they make with the settings.

    Raises the stores' errors, DataError and ConfigError.
    """
    data_dir = work_dir / "data"
    for leftover in (data_dir, work_dir / MODEL_FOLDER):  # of another run, with other files
        shutil.rmtree(leftover, ignore_errors=True)
    base_model = find_base_model(settings.model)
    train = [
        file
        for index, source in enumerate(settings.data.uri)
        for file in fetch_data(source.uri, setting="SFT_DATA__URI", folder=data_dir / f"train-{index}")
    ]
    evaluation = []
    if settings.data.eval_uri is not None:
        evaluation = fetch_data(settings.data.eval_uri, setting="SFT_DATA__EVAL_URI", folder=data_dir / "eval")
    run_id = make_run_id(
        settings, [file.sha256 for file in train], [file.sha256 for file in evaluation], base_model.revision
    )
    return Inputs(run_id, train, evaluation, base_model)
