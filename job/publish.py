"""The adapter goes to its slot: laid out, uploaded, read back, loaded by a process that knows nothing of the training,
and only then described and listed in a manifest."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from job.accept import ADAPTER_CONFIG, Acceptance, name_base_model
from job.accept_process import ready_to_accept
from job.commit import publish_in_one_commit
from job.handover import RunFolder
from job.lease import Lease
from job.log import find_terminal, logger
from job.memory.found import forget_memory_found
from job.phases import add_up_phases, enter_phase, phase
from job.prepared import Prepared
from job.record import PAGES, make_manifest, record_run
from job.report.pages import write_pages
from job.report.text import format_result
from job.serving import EngineVerdict, judge_engines, read_facts, vllm_command
from job.slot import has_merged
from job.upload import publish

_QUARANTINE = "quarantine.jsonl"  # the rows of a run that skipped them


def publish_run(prepared: Prepared, folder: RunFolder, lease: Lease) -> None:
    """Lay everything that belongs to the trained adapter beside it, and publish it to the run's slot.

    Raises what `publish` raises, and RefusedError when what was read back isn't what was trained.
    """
    slot, run_id, overwrite = prepared.slot, prepared.inputs.run_id, prepared.settings.output.overwrite
    with ready_to_accept(prepared, folder) as accept:
        _lay_out(prepared, folder)
        complete = partial(_complete, prepared, folder, accept)
        if slot.takes_commits:
            publish_in_one_commit(
                slot, folder.adapter, complete, run_id=run_id, overwrite=overwrite, check_lease=lease.check
            )
        else:
            publish(
                slot,
                folder.adapter,
                _list_files(folder.adapter),
                complete,
                run_id=run_id,
                later=PAGES,
                overwrite=overwrite,
                check_lease=lease.check,
            )
    enter_phase("uploading")
    prepared.checkpoints.clear(run_id)
    forget_memory_found(prepared.workplace)


def _lay_out(prepared: Prepared, folder: RunFolder) -> None:
    _name_base_model(folder.adapter, prepared)
    prepared.dataset.tokenizer.save_pretrained(folder.adapter)
    for source in (folder.plan, folder.xray, folder.metrics, folder.evaluation):
        if source.exists():  # an evaluation that failed leaves none
            shutil.copy(source, folder.adapter)
    with (folder.adapter / folder.metrics.name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": folder.read_last_step(), "phases": add_up_phases()}) + "\n")
    _set_aside(prepared.dataset.bad_row_files(), folder.adapter / _QUARANTINE)


def _judge_serving(prepared: Prepared, adapter_folder: Path) -> tuple[list[EngineVerdict], str | None]:
    config = json.loads((adapter_folder / ADAPTER_CONFIG).read_bytes())
    dataset = prepared.dataset
    facts = read_facts(
        config, vocabulary_size=dataset.facts.shape.vocabulary_size, stored=dataset.facts.stored_quantization
    )
    command = vllm_command(
        facts,
        base=config["base_model_name_or_path"],
        revision=config["revision"],
        slot=prepared.slot.uri,
        own_tokenizer=dataset.xray.turn_end.adopted is not None,
        own_template=dataset.template is not None,
        is_merged=has_merged(_list_files(adapter_folder)),
    )
    if command is not None and prepared.settings.output.pull_request:
        command = f"# once the pull request is merged:\n{command}"
    return judge_engines(facts), command


def _complete(
    prepared: Prepared, folder: RunFolder, accept: Callable[[Path], Acceptance], read_back: Path
) -> dict[str, Any]:
    """Have what was read back, or is to be committed, accepted, write what describes it, and return the manifest."""
    with phase("accepting"):
        acceptance = accept(read_back)
    if acceptance.skipped is not None:
        logger.warning("%s", acceptance.describe())
    enter_phase("report")
    engines, command = _judge_serving(prepared, folder.adapter)
    record = record_run(prepared, folder, acceptance=acceptance, engines=engines, serve_command=command)
    pages = write_pages(record, folder.adapter)
    logger.info("the result:\n%s", format_result(record, find_terminal(prepared.settings.runtime.log_format)))
    return make_manifest(record, pages)


def _list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _set_aside(sources: list[Path], target: Path) -> None:
    """Write the rows that were skipped, if any were, into one file that is published with the adapter."""
    if not sources:
        return
    with target.open("wb") as writer:
        for source in sources:
            with source.open("rb") as reader:
                shutil.copyfileobj(reader, writer)


def _name_base_model(adapter_folder: Path, prepared: Prepared) -> None:
    """Name the base model in adapter_config.json as the user did, in place of the local path it was loaded from."""
    path = adapter_folder / ADAPTER_CONFIG
    config = json.loads(path.read_bytes())
    name, revision = name_base_model(prepared.plan.model_id, prepared.plan.model_revision)
    config |= {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
