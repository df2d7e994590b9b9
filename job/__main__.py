"""The job, read top to bottom: settings -> inputs -> data set -> plan -> launch -> publish.

`sft-job` runs it, `sft-job check` does all that needs no training, `sft-job schema` prints the settings' JSON Schema.
This is the only place that turns an exception into an exit code.
"""

import argparse
import errno
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import job
from job.errors import CONFIG, INTERNAL, OK, PREEMPTED, RESOURCES, ConfigError, ExitCode, JobError
from job.log import find_terminal, logger, setup_logging
from job.nodes.node import Node, find_node
from job.outcome import Progress, format_outcome, write_termination_log
from job.settings import Settings, load_runtime_settings, load_settings
from job.settings_groups import RuntimeSettings
from job.stopping import StopSignal, acknowledge_stop, raise_on_stop_signals

# Whatever imports numpy, pyarrow, boto3 or transformers is imported in the functions that need it: a wrong setting is
# reported in under a second.
if TYPE_CHECKING:
    from job.nodes.peers import Peers
    from job.prepared import Prepared


_ALREADY_PUBLISHED = "is already published: nothing to do"
_HINTS = {  # for ends that bring none of their own
    PREEMPTED.code: "start it again: it begins anew",
    RESOURCES.code: "give SFT_RUNTIME__WORK_DIR more room",
    INTERNAL.code: "please report it, with the traceback above",
}


def run(settings: Settings, progress: Progress) -> str:
    """Train and publish; do nothing when this very run is already published. Return what was done, for the outcome."""
    from job.nodes.identity import describe_run, refuse_differences
    from job.nodes.peers import join_peers

    node = find_node(settings.parallel)
    with _own(settings.runtime.work_dir) as work_dir:
        prepared = prepare(settings, node, work_dir, progress)
        if prepared is None:
            return _ALREADY_PUBLISHED
        run_id, output = prepared.inputs.run_id, settings.output.uri
        with join_peers(node, run_id=run_id, output=output, explain=_explain) as peers:
            if node.nodes > 1:
                refuse_differences(peers.exchange(describe_run(prepared)))
            _train_and_publish(prepared, work_dir, peers, progress)
        return "is published"


def _train_and_publish(prepared: "Prepared", work_dir: Path, peers: "Peers", progress: Progress) -> None:
    from job.handover import RunFolder
    from job.inputs import MODEL_FOLDER
    from job.memory.ladder import train_within_memory
    from job.merge import check_room, merge_adapter
    from job.publish import publish_run
    from job.report import format_metrics

    settings = prepared.settings
    _log_phase("fetching the base model")
    prepared.inputs.base_model.fetch_weights(work_dir / MODEL_FOLDER)

    _log_phase("training")
    if settings.output.merge and peers.node_rank == 0:
        check_room(work_dir, prepared.inputs.base_model.weights_bytes())
    folder = prepared.hand_over(RunFolder(work_dir / "run"))
    try:
        prepared = train_within_memory(prepared, folder, peers)
    finally:
        progress.step = folder.read_last_step()

    if peers.node_rank > 0:
        _log_phase("publishing, which node 0 does")
        peers.wait_for_first_node()
        return
    logger.info("%s", format_metrics(folder.read_result()))
    if settings.output.merge:
        _log_phase("merging")
        merge_adapter(prepared, folder)

    _log_phase("publishing")
    publish_run(prepared, folder)


def check(settings: Settings, progress: Progress) -> str:
    """Do all that a run does before it fetches the weights and trains."""
    node = find_node(settings.parallel)
    with _own(settings.runtime.work_dir) as work_dir:
        if prepare(settings, node, work_dir, progress) is None:
            return _ALREADY_PUBLISHED
        logger.info("plan.json and xray.json are in %s", work_dir / "run")
        return "is ready to train"


def prepare(settings: Settings, node: Node, work_dir: Path, progress: Progress) -> "Prepared | None":
    """Do what `run` and `check` share, up to the printed plan; return None when this very run is already published.

    Every node does it by itself, but only node 0 writes to the output.
    """
    from job.dataset import prepare_dataset, row_options
    from job.handover import RunFolder
    from job.hardware import find_hardware
    from job.inputs import MODEL_FOLDER, find_inputs
    from job.limits import find_warnings
    from job.parallel import plan_parallel
    from job.plan import make_plan
    from job.prepared import Prepared
    from job.publish import check_slot, is_already_published, keep_bad_rows, open_slot
    from job.report import format_plan
    from job.report_xray import format_xray

    hardware = find_hardware()
    parallel = plan_parallel(settings, hardware)
    row_options(settings.data)  # a template that is none is refused before any download

    _log_phase("reading the inputs")
    if node.rank == 0:
        check_slot(settings.output.uri)
    inputs = find_inputs(settings, work_dir)
    slot = open_slot(settings.output.uri, inputs.run_id)
    progress.run_id, progress.output = inputs.run_id, slot.uri
    if is_already_published(slot, inputs.run_id, overwrite=settings.output.overwrite, merge=settings.output.merge):
        return None
    if node.rank == 0:
        slot.check_writable()

    _log_phase("tokenizing")
    model_folder = inputs.base_model.fetch_configuration(work_dir / MODEL_FOLDER)
    dataset = prepare_dataset(
        settings,
        inputs,
        model_folder,
        work_dir / "tokens",
        processes=hardware.cpu_cores,
        keep_bad_rows=lambda path: keep_bad_rows(slot, path) if node.rank == 0 else str(path),
    )
    terminal = find_terminal(settings.runtime.log_format)
    logger.info("the data:\n%s", format_xray(dataset.xray, terminal))
    warnings = find_warnings(dataset.xray)
    _log_warnings(warnings)
    plan = make_plan(settings, parallel, dataset.facts)
    progress.total_steps = plan.steps
    logger.info("run %s, the plan:\n%s", inputs.run_id, format_plan(plan, width=terminal.width))
    _log_warnings(plan.warnings)
    prepared = Prepared(settings, hardware, inputs, model_folder, dataset, plan, slot)
    prepared.write_down(RunFolder(work_dir / "run"), warnings)
    return prepared


def _log_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        logger.warning("%s", warning)


def _log_phase(name: str) -> None:
    logger.info("== %s", name)


@contextmanager
def _own(work_dir: Path) -> Iterator[Path]:
    """Make the work folder and keep other jobs out of it.

    Raises ConfigError when it can't be made or another job uses it.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = (work_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"SFT_RUNTIME__WORK_DIR={work_dir}: can't be used: {error.strerror}",
            hint="name a folder that can be written",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however this process ends
        except BlockingIOError as error:
            raise ConfigError(
                f"SFT_RUNTIME__WORK_DIR={work_dir}: another job is using it", hint="give each job a folder of its own"
            ) from error
        yield work_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the outcome is in the log and in the termination log."""
    command = _parse(arguments)
    runtime = load_runtime_settings()
    setup_logging(runtime.log_format, runtime.log_level)
    if command == "schema":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sft-job schema | head` is no error
        print(json.dumps(Settings.model_json_schema(), indent=2))
        return OK.code
    progress = Progress()
    ending, message, hint = _execute(command, progress)
    if ending is OK:
        logger.info("run %s %s (%s)", progress.run_id, message, progress.output)
    else:
        logger.error("%s", message)
        if hint:
            logger.error("remedy: %s", hint)
        logger.error("exit code %d (%s): %s", ending.code, ending.name, ending.when)
    _write_outcome(runtime, format_outcome(ending, message, hint, progress))
    return ending.code


def _execute(command: str, progress: Progress) -> tuple[ExitCode, str, str]:
    """Run a command; return how it ended, with message and hint."""
    raise_on_stop_signals()
    try:
        settings = load_settings()
        progress.output = settings.output.uri
        return OK, {"run": run, "check": check}[command](settings, progress), ""
    except (Exception, StopSignal) as error:  # noqa: BLE001 - the one place for what nobody foresaw
        acknowledge_stop()
        ending, message = _explain(error)
        if isinstance(error, JobError):
            progress.step = error.step if error.step is not None else progress.step
            return ending, message, error.hint
        if ending is INTERNAL:
            logger.exception("a bug in the job")
        return ending, message, _HINTS[ending.code]


def _explain(error: BaseException) -> tuple[ExitCode, str]:
    """Return the exit code that an exception means, and what there is to say of it."""
    if isinstance(error, JobError):
        return error.exit_code, error.message
    if isinstance(error, StopSignal):
        return PREEMPTED, f"stopped by {error}: nothing is published"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return RESOURCES, f"no space left on the disk: {error.filename}"
    return INTERNAL, f"{type(error).__name__}: {error}"


def _write_outcome(runtime: RuntimeSettings, outcome: str) -> None:
    asked_for = "termination_log" in runtime.model_fields_set
    write_termination_log(runtime.termination_log, outcome, was_asked_for=asked_for)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with the code for wrong settings, where argparse would end with 2."""
        hint = "`sft-job --help` lists the commands; all else is set by SFT_* variables"
        _write_outcome(load_runtime_settings(), format_outcome(CONFIG, message, hint, Progress()))
        self.print_usage(sys.stderr)
        self.exit(CONFIG.code, f"{self.prog}: {message}\nremedy: {hint}\n")


def _parse(arguments: Sequence[str] | None) -> str:
    parser = _Parser(prog="sft-job", description="Fine-tune a language model with LoRA, as the SFT_* variables say.")
    parser.add_argument("--version", action="version", version=f"sft-job {job.__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "check", "schema"),
        help="run (the default), check without training, or print the settings' JSON Schema",
    )
    command: str = parser.parse_args(arguments).command
    return command


def entrypoint() -> NoReturn:
    """Run the command line, and end without waiting for transfers that an error left behind."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entrypoint()
