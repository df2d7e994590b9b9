"""One worker process, started as `python -m job.train.worker FOLDER JOB_PID` by `accelerate launch`, or by the job
itself where it is the only one.

It reads the plan from the folder, checks that it runs the way the plan says, trains, and writes how it ended to a file.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from job.disk_full import is_disk_full
from job.errors import INTERNAL, OK, PREEMPTED, RESOURCES, UNAVAILABLE, JobError
from job.handover import RunFolder, WorkerInputs, WorkerOutcome, write_whole
from job.log import logger, redact, setup_logging
from job.phases import begin_phases, enter_phase
from job.plan import TrainPlan
from job.processes import die_with_parent
from job.train.heartbeat import Pulse, dump_stacks_when_asked
from job.train.spared_imports import leave_out_libraries

_STOP_REQUEST_S = 2.0  # the job may have got the signal a moment later

_RESERVE_BYTES = 65_536


def main(folder: RunFolder, job_pid: int) -> int:
    """Train, and leave a WorkerOutcome whatever happens; return the exit code."""
    die_with_parent()
    launcher_pid = os.getppid()  # or the job's own, where it needs none
    if job_pid not in (launcher_pid, psutil.Process(launcher_pid).ppid()):  # it died before the line above
        return INTERNAL.code
    rank = int(os.environ.get("RANK", "0"))
    begin_phases("importing", folder.phases if rank == 0 else None)
    dump_stacks_when_asked(folder.stacks(rank))
    _leave_word_on_sigterm(folder, rank)
    _redirect_output(folder, rank)
    inputs = WorkerInputs.model_validate_json(folder.inputs.read_bytes())
    setup_logging(inputs.log_format if rank == 0 else "text", inputs.log_level)  # others' is shown when they fail
    reserve = folder.root / f"reserve-{rank}"  # its room is for the outcome, should the disk be full
    step = 0

    def remember_step(finished: int) -> None:
        nonlocal step
        step = finished

    def train_as_planned() -> None:
        plan = TrainPlan.model_validate_json(folder.plan.read_bytes())
        leave_out_libraries(plan, trains=True, report_to=inputs.report_to)
        from job.train.run import train  # torch and transformers, seconds
        from job.train.trackers import Trackers

        reserve.write_bytes(bytes(_RESERVE_BYTES))
        pulse = Pulse(folder, rank=rank)
        with Trackers(plan, inputs.report_to if rank == 0 else []) as trackers:
            train(plan, inputs, folder, rank=rank, remember_step=remember_step, pulse=pulse, trackers=trackers)

    outcome = carry_out(train_as_planned, rank=rank)
    enter_phase("ending workers")
    stopped = outcome.code == PREEMPTED.code
    outcome = outcome.model_copy(update={"step": step, "stopped": stopped})
    reserve.unlink(missing_ok=True)
    write_whole(folder.outcome(rank), outcome.model_dump_json())
    # All stop at the same step, but not at the same moment, and the launcher ends the others when one has failed.
    return OK.code if stopped else outcome.code


def carry_out(action: Callable[[], None], *, rank: int) -> WorkerOutcome:
    """Carry out what this process was started for, and return how it ended, whatever happens."""
    code, message, hint, out_of_memory = OK.code, "", "", False
    _mute_libraries()
    try:
        action()
    except JobError as error:
        code, message, hint = error.exit_code.code, error.message, error.hint
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must learn of it
        code, message, hint, out_of_memory = _explain(error)
        if not is_disk_full(error):
            logger.error("%s", redact(traceback.format_exc()))
    return WorkerOutcome(
        rank=rank, code=code, message=message, hint=hint, step=0, time_s=time.time(), out_of_memory=out_of_memory
    )


def _mute_libraries() -> None:
    """Leave out what libraries warn of that nobody can change."""
    # Names that transformers 5 deprecates are the only ones that all of its versions in our range know.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # torch's compiler
    # It has a line for every layer and step, since LLM.int8 computes in float16, and asks for a package of kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _leave_word_on_sigterm(folder: RunFolder, rank: int) -> None:
    """On SIGTERM, write an outcome and end, unless the job has been told to stop or is within two seconds.

    When a worker dies, torchrun ends the others in this way, which must not look as if they had died like it. But a
    platform may send the signal to every process at once: then the job makes a StopRequest of it, and the signal
    itself is of no account, for all processes must stop at the same step. A thread waits for the signal, because
    Python's handlers wait for the main thread, and that may be deep in a CUDA or gloo call.
    """

    def wait_for_it() -> NoReturn:
        while True:
            signal.sigwait({signal.SIGTERM})
            if _appears(folder.stop_request, within_s=_STOP_REQUEST_S):
                continue
            outcome = WorkerOutcome(
                rank=rank, code=PREEMPTED.code, message="ended by SIGTERM", hint="", step=0, time_s=time.time()
            )
            if not folder.outcome(rank).exists():  # else it has failed by itself, and is on its way out
                write_whole(folder.outcome(rank), outcome.model_dump_json())
            os._exit(PREEMPTED.code)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may ignore it, and what is ignored can't be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit it
    threading.Thread(target=wait_for_it, name="sigterm", daemon=True).start()


def _appears(path: Path, *, within_s: float) -> bool:
    until_s = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.05)
    return True


def _redirect_output(folder: RunFolder, rank: int) -> None:
    """Send everything that rank 0 says to the job's stderr, and everything that others say to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        os.dup2(1, 2)
        return
    with folder.worker_log(rank).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _explain(error: Exception) -> tuple[int, str, str, bool]:
    """Return code, message, hint and whether smaller steps may do, for an error that no one foresaw by name."""
    import torch.distributed as dist

    from job.train.out_of_memory import describe_shortage

    shortage = describe_shortage(error)
    if shortage is not None:
        return RESOURCES.code, shortage, "", True  # the job knows the remedies
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if is_disk_full(error):
        return RESOURCES.code, f"no space left on the disk: {text}", "give SFT_RUNTIME__WORK_DIR more room", False
    # gloo raises plain RuntimeErrors
    if isinstance(error, dist.DistError) or "Connection closed by peer" in text or "Connection reset by peer" in text:
        return UNAVAILABLE.code, f"another worker is out of reach: {text}", "see why it ended, above", False
    return INTERNAL.code, f"{type(error).__name__}: {text}", "please report it, with the traceback above", False


def _end(code: int) -> NoReturn:
    """End the process at once: gloo's threads, asked to end while the other workers go away, sometimes abort it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main(RunFolder(Path(sys.argv[1])), int(sys.argv[2])))
