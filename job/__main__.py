"""The job, read top to bottom: settings -> inputs -> data set -> plan -> launch -> publish.

`sft-job` runs it, `sft-job check` does all that needs no training, `sft-job schema` prints the settings' JSON Schema,
`verify` and `compare` look at what was published. Only here does an exception become an exit code.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from job.arguments import Command, parse_command
from job.disk_full import is_disk_full
from job.errors import INTERNAL, OK, PREEMPTED, RESOURCES, ExitCode, JobError
from job.log import event, find_terminal, log_warnings, logger, setup_logging
from job.nodes.node import Node, find_node
from job.outcome import Progress, format_outcome, log_outcome, write_outcome
from job.phases import enter_phase
from job.settings import Settings, load_runtime_settings, load_settings
from job.settings_runtime import RuntimeSettings
from job.stopping import GRACE_SHARE, StopSignal, acknowledge_stop, be_patient, raise_on_stop_signals
from job.work_dir import own_work_dir

# Whatever imports numpy, pyarrow, boto3 or transformers is imported in the functions that need it: a wrong setting is
# reported in under a second.
if TYPE_CHECKING:
    from job.handover import RunFolder
    from job.hardware import Hardware
    from job.lease import Lease
    from job.nodes.peers import Peers
    from job.prepared import Prepared

_ALREADY_PUBLISHED = "is already published: nothing to do"
_HINTS = {  # for ends that bring none of their own
    PREEMPTED.code: "start it again: it goes on from what is in the store",
    RESOURCES.code: "give SFT_RUNTIME__WORK_DIR more room",
    INTERNAL.code: "please report it, with the traceback above",
}


def run(settings: Settings, progress: Progress) -> str:
    """Train and publish; do nothing when this very run is already published. Return what was done, for the outcome."""
    from job.handover import RunFolder
    from job.hardware import find_hardware
    from job.lease import hold_slot
    from job.metrics_server import serve_metrics
    from job.nodes.identity import describe_run, refuse_differences
    from job.nodes.peers import join_peers
    from job.slot import is_finished

    started_s = time.monotonic()
    node = find_node(settings.parallel)
    with (
        own_work_dir(settings.runtime.work_dir) as work_dir,
        serve_metrics(settings.runtime.metrics_port, progress, RunFolder(work_dir / "run")),
    ):
        prepared = prepare(settings, find_hardware(), node, work_dir, progress, trains=True)
        if prepared is None:
            return _ALREADY_PUBLISHED
        enter_phase("listing")
        run_id, output = prepared.inputs.run_id, settings.output.uri
        with (
            join_peers(node, run_id=run_id, output=output, explain=_explain) as peers,
            hold_slot(prepared.workplace, run_id=run_id, output=prepared.slot.uri)
            if node.rank == 0
            else nullcontext() as lease,
        ):
            if node.nodes > 1:
                refuse_differences(peers.exchange(describe_run(prepared)))
            # By a job that held the slot until now.
            finished = node.rank == 0 and is_finished(
                prepared.slot, prepared.checkpoints, run_id, settings.output, nodes=node.nodes
            )
            if peers.exchange(finished)[0]:
                return _ALREADY_PUBLISHED
            max_hours = settings.runtime.max_hours
            deadline_s = None if max_hours is None else started_s + max_hours * 3600
            folder = prepared.hand_over(RunFolder(work_dir / "run"))
            trained = _train(prepared, folder, peers, lease, progress, deadline_s=deadline_s)
            _publish(trained, folder, peers, lease, progress)
        return "is published"


def _train(
    prepared: "Prepared",
    folder: "RunFolder",
    peers: "Peers",
    lease: "Lease | None",
    progress: Progress,
    *,
    deadline_s: float | None,
) -> "Prepared":
    """Train, unless an earlier start has done that; return what was prepared with the plan that was carried out.

    `lease` is node 0's hold on the slot; other nodes have none.
    """
    from job.attempt import attempt_training
    from job.checkpoints.resume import adopt_plan, fetch_finished, keep_finished
    from job.memory.ladder import train_within_memory
    from job.merge import check_room

    finished = None if lease is None else fetch_finished(prepared, folder)
    if peers.exchange(finished is not None)[0]:
        logger.info("an earlier start has trained it: publishing is left")
        return prepared if finished is None else replace(prepared, plan=finished)

    progress.enter("fetching the base model", phase="download")
    prepared.weights.fetch()
    progress.enter("training", phase="listing")
    if prepared.settings.output.merge and peers.node_rank == 0:
        check_room(folder.root, prepared.inputs.base_model.weights_bytes())
    prepared = adopt_plan(prepared, folder, peers)
    attempt = partial(
        attempt_training, folder=folder, peers=peers, lease=lease, progress=progress, deadline_s=deadline_s
    )
    try:
        prepared = train_within_memory(prepared, folder, peers, attempt)
    finally:
        progress.step = folder.read_last_step()
    if lease is not None:
        lease.check()
        keep_finished(prepared, folder)
    return prepared


def _publish(
    prepared: "Prepared", folder: "RunFolder", peers: "Peers", lease: "Lease | None", progress: Progress
) -> None:
    from job.merge import merge_adapter
    from job.publish import publish_run
    from job.report.text import format_metrics

    if lease is None:
        progress.enter("publishing, which node 0 does")
        peers.wait_for_first_node()
        return
    logger.info("%s", format_metrics(folder.read_result()))
    # They are here, unless an earlier start has trained the adapter, elsewhere.
    prepared.weights.fetch()
    if prepared.settings.output.merge:
        progress.enter("merging", phase="merging")
        merge_adapter(prepared, folder)
    progress.enter("publishing", phase="report")
    be_patient(prepared.settings.runtime.grace_seconds * GRACE_SHARE)
    publish_run(prepared, folder, lease)


def check(settings: Settings, progress: Progress, *, gpus: tuple[int, int] | None) -> str:
    """Do all that a run does before it fetches the weights and trains; `gpus` as in `job.arguments.Command`."""
    from job.hardware import assume_gpus, find_hardware

    hardware = find_hardware() if gpus is None else assume_gpus(find_hardware(), *gpus)
    node = find_node(settings.parallel)
    with own_work_dir(settings.runtime.work_dir) as work_dir:
        if prepare(settings, hardware, node, work_dir, progress, trains=False) is None:
            return _ALREADY_PUBLISHED
        logger.info("plan.json and xray.json are in %s", work_dir / "run")
        return "is ready to train"


def look_at(command: Command, runtime: RuntimeSettings, progress: Progress) -> str:
    """Carry out a command on published slots, which needs no settings but the runtime's; return what was found."""
    from job.compare import compare
    from job.verify import verify

    progress.output = command.uris[0]
    return compare(command.uris) if command.name == "compare" else verify(command.uris[0], runtime, progress)


def prepare(
    settings: Settings, hardware: "Hardware", node: Node, work_dir: Path, progress: Progress, *, trains: bool
) -> "Prepared | None":
    """Do what `run` and `check` share, up to the printed plan; return None when this very run is already published.

    Every node does it by itself, but only node 0 writes to the output. `trains`: the weights will be needed.
    """
    from job.checkpoints.resume import refuse_another_runs
    from job.dataset import prepare_dataset, row_options
    from job.handover import RunFolder
    from job.inputs import MODEL_FOLDER, find_inputs
    from job.lease import drop_lease
    from job.limits import find_warnings
    from job.parallel import plan_parallel
    from job.plan import make_plan
    from job.prepared import Prepared
    from job.report.plan import format_plan
    from job.report.xray import format_xray
    from job.slot import check_slot, is_finished, keep_bad_rows, open_checkpoints, open_slot, open_workplace
    from job.trackers import refuse_missing_trackers
    from job.weights import Weights

    refuse_missing_trackers(settings.runtime.report_to)
    parallel = plan_parallel(settings, hardware)
    row_options(settings.data)  # a template that is none is refused before any download

    progress.enter("reading the inputs", phase="listing")
    if node.rank == 0:
        check_slot(settings.output)
    inputs = find_inputs(settings, work_dir)
    slot = open_slot(settings.output, inputs.run_id)
    progress.run_id, progress.output = inputs.run_id, slot.uri
    workplace = open_workplace(slot, settings.checkpoint.uri, inputs.run_id, work_dir)
    checkpoints = open_checkpoints(settings.checkpoint.uri, workplace, inputs.run_id)
    if is_finished(slot, checkpoints, inputs.run_id, settings.output, nodes=node.nodes):
        if node.rank == 0:
            checkpoints.clear(inputs.run_id)  # a start that was killed after it had published has left them
            drop_lease(workplace, inputs.run_id)
        return None
    if node.rank == 0:
        if slot is not workplace:
            slot.check_writable()
        workplace.check_writable()
        checkpoints.store.check_writable()

    progress.enter("tokenizing", phase="tokenizing")
    model_folder = inputs.base_model.fetch_configuration(work_dir / MODEL_FOLDER)
    weights = Weights(inputs.base_model, work_dir / MODEL_FOLDER)
    if trains:
        weights.start(data_bytes=inputs.size_bytes)
    dataset = prepare_dataset(
        settings,
        inputs,
        model_folder,
        work_dir / "tokens",
        processes=hardware.cpu_cores,
        keep_bad_rows=lambda path: keep_bad_rows(workplace, path) if node.rank == 0 else str(path),
    )
    terminal = find_terminal(settings.runtime.log_format)
    logger.info("the data:\n%s", format_xray(dataset.xray, terminal), extra=event("data", **dataset.xray.counts()))
    warnings = find_warnings(dataset.xray)
    log_warnings(warnings)
    enter_phase("planning")
    plan = make_plan(settings, parallel, dataset.facts)
    progress.total_steps = plan.steps
    prepared = Prepared(settings, hardware, inputs, model_folder, weights, dataset, plan, slot, checkpoints, workplace)
    table = format_plan(plan, width=terminal.width)
    logger.info("run %s, the plan:\n%s", inputs.run_id, table, extra=event("plan", **prepared.outline()))
    log_warnings(plan.warnings)
    if node.rank == 0:
        refuse_another_runs(prepared)
    prepared.write_down(RunFolder(work_dir / "run"), warnings)
    return prepared


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the outcome is in the log and in the termination log."""
    command = parse_command(arguments)
    enter_phase("settings")
    runtime = load_runtime_settings()
    setup_logging(runtime.log_format, runtime.log_level)
    if command.name == "schema":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sft-job schema | head` is no error
        print(json.dumps(Settings.model_json_schema(), indent=2))
        return OK.code
    progress = Progress()
    ending, message, hint = _execute(command, runtime, progress)
    success = message if command.uris else f"run {progress.run_id} {message} ({progress.output})"
    log_outcome(ending, message, hint, progress, success=success)
    write_outcome(runtime, format_outcome(ending, message, hint, progress))
    return ending.code


def _execute(command: Command, runtime: RuntimeSettings, progress: Progress) -> tuple[ExitCode, str, str]:
    """Run a command; return how it ended, with message and hint."""
    raise_on_stop_signals(partial(_say_last_words, runtime, progress))
    try:
        if command.uris:
            return OK, look_at(command, runtime, progress), ""
        settings = load_settings()
        progress.output = settings.output.uri
        enter_phase("start")  # what is imported from here on
        if command.name == "check":
            return OK, check(settings, progress, gpus=command.gpus), ""
        return OK, run(settings, progress), ""
    except (Exception, StopSignal) as error:  # noqa: BLE001 - the one place for what nobody foresaw
        acknowledge_stop()
        ending, message = _explain(error)
        if isinstance(error, JobError):
            progress.step = error.step if error.step is not None else progress.step
            return ending, message, error.hint
        if ending is INTERNAL:
            logger.exception("a bug in the job")
        return ending, message, _HINTS[ending.code]


def _say_last_words(runtime: RuntimeSettings, progress: Progress, name: str) -> None:
    message = f"stopped at once by a second signal, {name}"
    write_outcome(runtime, format_outcome(PREEMPTED, message, _HINTS[PREEMPTED.code], progress))


def _explain(error: BaseException) -> tuple[ExitCode, str]:
    """Return the exit code that an exception means, and what there is to say of it."""
    if isinstance(error, JobError):
        return error.exit_code, error.message
    if isinstance(error, StopSignal):
        return PREEMPTED, f"stopped by {error}: nothing is published"
    if is_disk_full(error):
        return RESOURCES, f"no space left on the disk: {error}"
    return INTERNAL, f"{type(error).__name__}: {error}"


def entrypoint() -> NoReturn:
    """Run the command line, and end without waiting for transfers that an error left behind."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entrypoint()
