"""A run that hangs is ended, by the name of the rank that holds up the others; one that is slow, or frozen, is not."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGSTOP

import psutil
import pytest

from job.errors import InternalError, UnavailableError
from job.handover import RunFolder, WorkerOutcome
from job.train.heartbeat import Pulse
from job.watchdog import Watchdog

LIMIT_S = 60.0
WORKER = """
import sys, threading, time
from pathlib import Path
from job.train.heartbeat import dump_stacks_when_asked

def wait_in_a_collective():
    print(flush=True)
    time.sleep(600)

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
dump_stacks_when_asked(Path(sys.argv[1]))
wait_in_a_collective()
"""


class Run:
    """An attempt at training by two workers, in a time that a test lets pass."""

    def __init__(self, root: Path, ranks: range = range(2), *, several_nodes: bool = False) -> None:
        self.folder = RunFolder(root)
        self.now_s = 1000.0
        self.watchdog = Watchdog(
            self.folder, ranks, limit_s=LIMIT_S, several_nodes=several_nodes, clock=lambda: self.now_s
        )
        self.pulses = {rank: Pulse(self.folder, rank=rank) for rank in ranks}
        self.workers: dict[int, subprocess.Popen[bytes]] = {}

    def start_workers(self) -> None:
        """Start processes, which do nothing, for a watchdog that will ask for their stacks."""
        for rank in self.pulses:
            command = [sys.executable, "-c", WORKER, str(self.folder.stacks(rank))]
            self.workers[rank] = subprocess.Popen(command, stdout=subprocess.PIPE)
        for worker in self.workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"\n"

    def beat(self, *ranks: int, step: int) -> None:
        for rank in ranks:
            self.pulses[rank].beat(step)

    def end(self, rank: int, code: int) -> None:
        outcome = WorkerOutcome(rank=rank, code=code, message="", hint="", step=1, time_s=0)
        self.folder.outcome(rank).write_text(outcome.model_dump_json())

    def watch(self, seconds: float) -> bool:
        """Let time pass, and look once a second; say whether there was nothing to wait for in the end."""
        is_over = False
        for _ in range(round(seconds)):
            self.now_s += 1.0
            is_over = self.watchdog.check()
        return is_over

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.communicate()


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """Two workers on one node, or as the test asks for by its parameter."""
    made = Run(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


def test_the_rank_that_is_behind_is_named_and_all_show_their_stacks(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start_workers()
    run.beat(0, 1, step=7)
    run.beat(0, step=7)
    assert not run.watch(LIMIT_S - 1)
    with pytest.raises(InternalError) as caught:
        run.watch(2)
    assert caught.value.message == (
        "rank 1 has finished no micro batch for 1 min: stopped in step 7, and rank 0 waits for it"
    )
    assert "SFT_RUNTIME__HANG_MINUTES" in caught.value.hint
    for rank in (0, 1):
        [stacks] = [text for text in caplog.messages if text.startswith(f"the threads of rank {rank}")]
        assert stacks.index("in wait_in_a_collective") < stacks.index("_bootstrap_inner")  # the main thread comes first
        assert run.workers[rank].wait(timeout=5) == -9
    assert "rank 1: in step 7, 1 beats, silent for 60 s" in caplog.messages


def test_a_stopped_process_is_the_cause_however_far_it_has_come(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start_workers()
    run.beat(0, 1, step=3)
    run.workers[0].send_signal(SIGSTOP)
    while psutil.Process(run.workers[0].pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    with pytest.raises(InternalError, match=r"rank 0 .* in step 3 \(its process is stopped\), and rank 1 waits"):
        run.watch(LIMIT_S + 1)
    assert any(text.startswith("the threads of rank 1") for text in caplog.messages)


@pytest.mark.parametrize("run", [{"ranks": range(2, 4), "several_nodes": True}], indirect=True)
def test_on_several_nodes_the_cause_may_be_another(run: Run) -> None:
    run.start_workers()
    run.beat(2, 3, step=0)
    with pytest.raises(UnavailableError, match=r"ranks 2 and 3 have finished no .* stopped before the first step$"):
        run.watch(LIMIT_S + 1)


def test_beats_of_one_rank_don_t_hide_the_silence_of_another(run: Run) -> None:
    run.start_workers()
    run.beat(0, 1, step=1)
    for _ in range(3):
        run.watch(LIMIT_S / 4)
        run.beat(1, step=2)
    with pytest.raises(InternalError, match=r"rank 0 has finished no micro batch for 1 min: stopped in step 1$"):
        run.watch(LIMIT_S / 4 + 1)


def test_who_waits_for_a_slower_rank_does_not_hang(run: Run) -> None:
    run.beat(0, 1, step=1)
    for _ in range(2):
        run.beat(0, step=1)  # it goes on until the end of the step
        run.beat(0, step=1)
        for _ in range(2):
            assert not run.watch(LIMIT_S - 2)
            run.beat(1, step=1)  # it comes as far as the other in the end


def test_slow_steps_are_no_hang(run: Run) -> None:
    for step in range(1, 6):
        run.beat(0, 1, step=step)
        assert not run.watch(LIMIT_S - 2)


def test_loading_takes_its_time(run: Run) -> None:
    assert not run.watch(599)
    with pytest.raises(InternalError, match=r"ranks 0 and 1 did not begin to train within 10 min"):
        run.watch(1)


def test_a_machine_that_stood_still_has_not_hung(run: Run) -> None:
    run.beat(0, 1, step=1)
    run.watch(LIMIT_S / 2)
    run.now_s += 100 * LIMIT_S
    assert not run.watch(LIMIT_S / 2 - 5)
    with pytest.raises(InternalError):
        run.watch(5)


def test_workers_that_are_done_may_take_a_while_to_end_but_not_for_ever(run: Run) -> None:
    run.beat(0, 1, step=9)
    run.watch(LIMIT_S - 10)
    run.end(1, 0)
    run.beat(0, step=9)  # it saves the adapter, alone
    assert not run.watch(LIMIT_S - 10)
    run.end(0, 0)
    assert not run.watch(LIMIT_S)
    assert run.watch(1)


def test_a_failure_is_not_taken_for_the_hang_that_it_caused(run: Run) -> None:
    run.beat(0, 1, step=9)
    run.end(0, 80)
    assert not run.watch(LIMIT_S)
    assert run.watch(1)
