"""`sft-job verify URI`: whether what was published is still there, whole, and loads."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from job.accept import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AcceptanceTask, find_wrong_config, name_base_model
from job.accept_process import find_lacking_memory, fresh_process
from job.adapter_file import find_odd_tensors, read_shapes
from job.errors import DataError, JobError, NotFoundError, RefusedError
from job.handover import RunFolder
from job.hardware import find_hardware
from job.inputs import find_base_model
from job.log import format_bytes, logger
from job.manifest import MANIFEST_NAME, hash_file
from job.memory.model_shape import read_model_shape
from job.outcome import Progress
from job.plan import TrainPlan
from job.settings_groups import ModelSettings
from job.settings_runtime import RuntimeSettings
from job.slot import has_merged, is_manifest
from job.storage import ReadableStore, StoredFile, open_store
from job.work_dir import refuse_work_dir

_SETTING = "URI"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def verify(uri: str, runtime: RuntimeSettings, progress: Progress) -> str:
    """Check a published slot, and print what was found; return what there is to say of it.

    Raises NotFoundError for a slot without a manifest, DataError that names what is damaged, and the store's errors.
    """
    store = open_store(uri, setting=_SETTING)
    progress.enter("looking at the slot")
    manifest = _read_manifest(store)
    progress.run_id = str(manifest["run_id"])
    files = manifest["files"]
    total_bytes = sum(file["bytes"] for file in files)
    print(f"{uri}: run {progress.run_id}, {len(files)} files, {format_bytes(total_bytes)}")
    with _scratch(runtime.work_dir) as scratch:
        adapter = Path(scratch) / "adapter"
        progress.enter("comparing the files")
        problems = _find_damage(store, files, adapter)
        problems |= {} if problems else _find_wrong_adapter(adapter, manifest)
        for name, problem in problems.items():
            print(f"  {name}: {problem}")
        if problems:
            raise _damaged(uri, list(problems))
        print("  every file is there, with the sha256 that the manifest lists")
        print("  the adapter has the tensors that its configuration promises")
        progress.enter("loading the adapter")
        not_tried = _load(adapter, manifest, runtime, Path(scratch), uri)
    base = manifest["base_model"]["id"]
    print(f"  it loads onto {base}" if not_tried is None else f"  whether it loads was not tried: {not_tried}")
    return f"run {progress.run_id} is whole at {uri}"


def _scratch(work_dir: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="verify-", dir=work_dir)
    except OSError as error:
        raise refuse_work_dir(work_dir, error) from error


def _read_manifest(store: ReadableStore) -> dict[str, Any]:
    content = store.read(MANIFEST_NAME)
    if content is None:
        raise NotFoundError(
            f"{store.uri}: there is no {MANIFEST_NAME}, so nothing is published there",
            hint="name the place of one run: what its SFT_OUTPUT__URI was, with {run_id} filled in",
        )
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if not is_manifest(manifest) or not _is_complete(manifest):
        raise _damaged(store.uri, [MANIFEST_NAME])
    return manifest  # type: ignore[no-any-return]


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    files, base = manifest["files"], manifest.get("base_model")
    if not isinstance(manifest.get("plan"), dict) or not isinstance(base, dict) or not {"id", "revision"} <= set(base):
        return False
    return all(_is_described(file) and _is_inside(file["path"]) for file in files)


def _is_described(file: Mapping[str, Any]) -> bool:
    texts = file["path"], file.get("sha256")
    return all(isinstance(text, str) for text in texts) and isinstance(file.get("bytes"), int)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts


def _find_damage(store: ReadableStore, listed: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Return what is wrong with each file of a slot; bring the whole ones, but the merged model, into a folder."""
    found = {file.path: file for file in store.find()}
    pickles = {name for name in found if name.endswith(_PICKLES)}
    ours = pickles & {file["path"] for file in listed}
    for name in sorted(pickles - ours):  # a repository on the Hub may have had it before
        print(f"  {name}: is a pickle, and not of this run: don't load it")
    problems = dict.fromkeys(sorted(ours), "is a pickle, which this job never publishes: don't load it")
    for file in listed:
        name = file["path"]
        problem = _compare(store, found.get(name), file, folder)
        if problem is not None:
            problems[name] = problem
    return problems


def _compare(store: ReadableStore, found: StoredFile | None, listed: Mapping[str, Any], folder: Path) -> str | None:
    if found is None:
        return "is missing"
    if found.size_bytes != listed["bytes"]:
        return f"has {found.size_bytes:,} bytes, and the manifest lists {listed['bytes']:,}"
    folder.mkdir(exist_ok=True)
    path = store.fetch([found], folder, lambda _: None)[0]  # one at a time: the disk may have room for no more
    sha256 = hash_file(path)
    target = folder / listed["path"]
    if sha256 != listed["sha256"] or has_merged([listed["path"]]):
        target.unlink(missing_ok=True)
    elif path != target:  # a store that doesn't fetch into the folder
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    return None if sha256 == listed["sha256"] else f"has sha256 {sha256}, and the manifest lists {listed['sha256']}"


def _find_wrong_adapter(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with the adapter's own files, although they are what was published."""
    listed = {file["path"] for file in manifest["files"]}
    if missing := {ADAPTER_CONFIG, ADAPTER_WEIGHTS} - listed:
        return dict.fromkeys(sorted(missing), "isn't listed by the manifest")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        wrong = find_wrong_config(config, manifest["plan"])
    except (ValueError, KeyError) as error:
        return {ADAPTER_CONFIG: f"can't be read: {error}"}
    if wrong is not None:
        return {ADAPTER_CONFIG: wrong}
    try:
        odd = find_odd_tensors(config, read_shapes(folder / ADAPTER_WEIGHTS))
    except ValueError as error:
        return {ADAPTER_WEIGHTS: f"isn't a safetensors file that is whole: {error}"}
    return {ADAPTER_WEIGHTS: "; ".join(odd)} if odd else {}


def _load(adapter: Path, manifest: Mapping[str, Any], runtime: RuntimeSettings, scratch: Path, uri: str) -> str | None:
    """Load the adapter onto its base model in a fresh process; return why that can't be tried, if it can't.

    Raises DataError for an adapter that can't be loaded.
    """
    try:
        plan = TrainPlan.model_validate(manifest["plan"])
    except ValidationError:
        return f"it was published by sft-job {manifest.get('job_version')}, whose plan this one can't read"
    task = _make_task(plan, runtime, scratch / "model")
    if isinstance(task, str):
        return task
    folder = RunFolder(scratch / "run")
    folder.root.mkdir()
    try:
        with fresh_process(task, folder) as process:
            return process.accept(adapter, limit_s=runtime.hang_minutes * 60).skipped
    except RefusedError as error:
        raise DataError(f"{uri}: {error.message}", hint=_damaged(uri, []).hint) from error


def _make_task(plan: TrainPlan, runtime: RuntimeSettings, model_folder: Path) -> AcceptanceTask | str:
    hardware = find_hardware()
    here = {
        "device": "cuda" if hardware.gpus else "cpu",
        "attn_implementation": "sdpa",
        "nodes": 1,
        "processes": 1,
        "threads_per_process": hardware.cpu_cores,
    }
    plan = plan.model_copy(update=here)
    name, revision = name_base_model(plan.model_id, plan.model_revision)
    try:
        base_model = find_base_model(ModelSettings(id=name, revision=revision))
        if base_model.revision != plan.model_revision:
            return f"the base model at {plan.model_id} is another one now"
        folder = base_model.fetch_configuration(model_folder)
        shape = read_model_shape(json.loads((folder / "config.json").read_bytes()), base_model.weights_bytes())
        lacking = find_lacking_memory(plan, shape, hardware)
        if lacking is not None:
            return lacking
        base_model.fetch_weights(model_folder)
    except JobError as error:
        return f"its base model isn't at hand: {error.message}"
    logger.info("the base model is at hand: %s", plan.model_id)
    return AcceptanceTask(
        plan=plan,
        model_folder=folder,
        new_token_ids={},
        rows=[],
        log_format=runtime.log_format,
        log_level=runtime.log_level,
    )


def _damaged(uri: str, names: list[str]) -> DataError:
    return DataError(
        f"{uri}: {len(names)} of what was published {'is' if len(names) == 1 else 'are'} damaged: {', '.join(names)}",
        hint="publish it again: delete manifest.json there, and start the run with the same settings",
    )
