"""The soak: jobs that are killed at random moments, amid faults of the store, and started again until all is published.

`make soak` runs it. Data and slot are in a real S3 server behind the fault proxy. After every start the slot is looked
at: whatever is published must be whole, and in the end equal, bit for bit, to what a run without kills and faults
publishes. What is random follows from the seed; at which instruction a signal strikes doesn't.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from base_model import get_tiny_model
from fault_proxy import FaultProxy
from job_cli import job_environment, run_job
from running_job import RunningJob, is_alive
from seaweed import SeaweedFS
from soak_rounds import (
    BATCH,
    CHECKPOINT_STEPS,
    ROWS,
    STEPS,
    Configuration,
    Kill,
    Round,
    Start,
    calm,
    draw_round,
)
from soak_table import Killed, Lost, RoundResult, format_results, is_clean

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

BUCKET = "soak"
CALM_STARTS = 4  # after those of the round: one must publish, the next must find that
START_TIMEOUT_S = 180.0
GONE_WITHIN_S = 15.0
POLL_S = 0.02
_STEP = re.compile(r" step (\d+)/\d+ ")
_PHASE = re.compile(r"^.*== (.*)$", re.MULTILINE)


@dataclass
class Lane:
    """Where one round after the other runs: with its own proxy, folder and processor core."""

    proxy: FaultProxy
    folder: Path
    core: int

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that keeps a job on the core; results of one thread and of two differ in the last bits."""
        return ("taskset", "--cpu-list", str(self.core))


@dataclass
class Watched:
    """What one start of the job did. Times are those at which its output was read, on the monotonic clock."""

    victim: str = ""  # "" if none was killed
    phase: str = ""  # in which it was
    killed_s: float = 0.0
    steps_s: dict[int, float] = field(default_factory=dict)  # when each step had ended
    left: int = 0  # processes that outlived it
    hung: bool = False
    code: int = 0
    output: str = ""
    outcome: dict[str, Any] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)


class Soak:
    """A server with data in it, and the adapters that uninterrupted runs have published, by configuration."""

    def __init__(self, server: SeaweedFS, client: "S3Client", model: Path) -> None:
        self._server = server
        self._client = client
        self._model = model
        self._references: dict[Configuration, str] = {}
        client.create_bucket(Bucket=BUCKET)
        rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(ROWS)]
        for name, part in (("a", rows[: ROWS // 2]), ("b", rows[ROWS // 2 :])):
            body = "".join(json.dumps(row) + "\n" for row in part).encode()
            client.put_object(Bucket=BUCKET, Key=f"data/{name}.jsonl", Body=body)

    def make_reference(self, lane: Lane, configuration: Configuration) -> None:
        """Train a configuration without kills and faults."""
        slot = f"reference-{configuration.engine}-{configuration.processes}"
        environment = self._environment(lane, configuration, slot, lane.folder / "work-reference")
        ended = run_job(environment, prefix=lane.prefix)
        if ended.code != 0:
            raise RuntimeError(f"the run without kills and faults ended with {ended.code}:\n{ended.output}")
        self._references[configuration] = self._hash(f"{slot}/adapter_model.safetensors")

    def run_round(self, lane: Lane, one: Round, logs: Path | None) -> RoundResult:
        """Start a job as the round says, and then until it has published; see to all that must hold."""
        result = RoundResult(one.number, one.configuration.name)
        slot = f"round-{one.number}-{secrets.token_hex(2)}"
        last_killed: Watched | None = None
        work_dir = lane.folder
        starts = [*one.starts, *[calm(one.starts[-1])] * CALM_STARTS]
        for index, start in enumerate(starts):
            if start.on_fresh_disk or index == 0:
                work_dir = lane.folder / f"work-{index}"
            watched = self._start(lane, one.configuration, start, slot, work_dir)
            if logs is not None:
                (logs / f"round-{one.number}-start-{index}.log").write_text(watched.output)
            _judge(result, start, watched)
            self._judge_slot(result, slot)
            last_killed = _count_lost(result, watched, last_killed)
            if watched.code == 0 and "is already published" in watched.output:
                result.finished = True
                break
        self._judge_end(result, one.configuration, slot)
        for folder in lane.folder.glob("work-*"):
            shutil.rmtree(folder)
        return result

    def _start(self, lane: Lane, configuration: Configuration, start: Start, slot: str, work_dir: Path) -> Watched:
        environment = self._environment(lane, configuration, slot, work_dir)
        environment["AWS_ENDPOINT_URL_S3"] = lane.proxy.endpoint
        Path(environment["SFT_RUNTIME__TERMINATION_LOG"]).unlink(missing_ok=True)
        lane.proxy.set_rules(start.rules)
        faults_before = lane.proxy.count_faults()
        with RunningJob(environment, *lane.prefix) as job:
            watched = _watch(job, start.kill, lane.proxy)
        watched.code, watched.output = job.process.returncode, job.output
        watched.faults = lane.proxy.count_faults() - faults_before
        if start.kill is not None and start.kill.moment.request is not None:
            watched.faults -= Counter(latency=1)  # the killer's own
        if job.log.exists():
            watched.outcome = json.loads(job.log.read_bytes())
        return watched

    def _environment(self, lane: Lane, configuration: Configuration, slot: str, work_dir: Path) -> dict[str, str]:
        return self._server.environment() | job_environment(
            lane.folder,
            MODEL__ID=self._model,
            DATA__URI=f"s3://{BUCKET}/data/",
            DATA__EVAL_FRACTION=0,
            OUTPUT__URI=f"s3://{BUCKET}/{slot}",
            TRAIN__MAX_STEPS=STEPS,
            TRAIN__GLOBAL_BATCH_SIZE=BATCH,
            TRAIN__LOGGING_STEPS=1,
            CHECKPOINT__EVERY_STEPS=CHECKPOINT_STEPS,
            PARALLEL__ENGINE=configuration.engine,
            PARALLEL__PROCESSES=configuration.processes,
            RUNTIME__WORK_DIR=work_dir,
        )

    def _judge_slot(self, result: RoundResult, slot: str) -> None:
        """A manifest, whenever there is one, lists files that are there and whole."""
        manifest = self._read(f"{slot}/manifest.json")
        if manifest is None:
            return
        wrong = [
            file["path"]
            for file in json.loads(manifest)["files"]
            if self._hash(f"{slot}/{file['path']}") != file["sha256"]
        ]
        if wrong:
            result.corrupt_publications += 1
            result.violations.append(f"the manifest is there, and these are not as it says: {', '.join(wrong)}")

    def _judge_end(self, result: RoundResult, configuration: Configuration, slot: str) -> None:
        if not result.finished:
            result.violations.append("it never came to its end")
            return
        result.equal = self._hash(f"{slot}/adapter_model.safetensors") == self._references[configuration]
        manifest = json.loads(self._read(f"{slot}/manifest.json") or b"{}")
        expected = {f"{slot}/{file['path']}" for file in manifest["files"]} | {f"{slot}/manifest.json"}
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{slot}/")["Contents"]
        if beside := {item["Key"] for item in listed} - expected:
            result.violations.append(f"left in the slot: {', '.join(sorted(beside))}")

    def _read(self, key: str) -> bytes | None:
        try:
            return self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        except self._client.exceptions.NoSuchKey:
            return None

    def _hash(self, key: str) -> str:
        content = self._read(key)
        return "none" if content is None else hashlib.sha256(content).hexdigest()


def _watch(job: RunningJob, kill: Kill | None, proxy: FaultProxy) -> Watched:
    """Wait until the job has ended, and kill it at the moment that is meant."""
    watched = Watched()
    started_s = time.monotonic()
    before = len(proxy.faults())
    strikes_s: float | None = None
    known: list[psutil.Process] = []
    while job.process.poll() is None:
        now_s = time.monotonic()
        for step in _STEP.findall(job.output):
            watched.steps_s.setdefault(int(step), now_s)
        if kill is not None and strikes_s is None and _has_come(kill, job, proxy, before):
            strikes_s = now_s + kill.moment.delay_s
        if kill is not None and strikes_s is not None and now_s >= strikes_s:
            watched.phase, watched.killed_s = _name_phase(job.output), now_s
            known = job.descendants()
            watched.victim, victims = _choose_victims(kill, job, known)
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(kill.number)
            kill = None
        if now_s - started_s > START_TIMEOUT_S:
            watched.hung = True
            break
        time.sleep(POLL_S)
    if not watched.hung:
        watched.left = _wait_for_the_last(job, known)
    return watched


def _has_come(kill: Kill, job: RunningJob, proxy: FaultProxy, faults_before: int) -> bool:
    moment = kill.moment
    if moment.request is not None:
        struck = proxy.faults()[faults_before:]
        return any(
            fault.kind == "latency"
            and re.fullmatch(moment.request.method, fault.method)
            and re.search(moment.request.path, fault.path)
            for fault in struck
        )
    return moment.line in job.output


def _choose_victims(
    kill: Kill, job: RunningJob, descendants: Sequence[psutil.Process]
) -> tuple[str, list[psutil.Process]]:
    """Return which processes the signal is for, and what they are: the parent where there is none of those meant."""
    parent = psutil.Process(job.process.pid)
    with contextlib.suppress(StopIteration, psutil.Error):
        if kill.victim == "launcher":
            return kill.victim, [job.launcher()]
        if kill.victim == "worker":
            return kill.victim, [job.worker(0)]
    if kill.victim == "all":
        return kill.victim, [parent, *descendants]
    return "parent", [parent]


def _wait_for_the_last(job: RunningJob, known: Sequence[psutil.Process]) -> int:
    """Return how many of a job's processes are alive some time after its end."""
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while alive := [process for process in {*known, *job.strays()} if is_alive(process)]:
        if time.monotonic() > deadline_s:
            return len(alive)
        time.sleep(POLL_S)
    return 0


def _name_phase(output: str) -> str:
    phases = _PHASE.findall(output)
    if not phases:
        return "starting"
    if phases[-1] == "training":
        return "training: steps" if _STEP.search(output) else "training: workers start"
    return str(phases[-1])


def _judge(result: RoundResult, start: Start, watched: Watched) -> None:
    """Note how a start ended, and whether it may end so."""
    result.codes.append(watched.code)
    result.faults.update(watched.faults)
    result.leftover_processes += watched.left
    if watched.left:
        result.violations.append(f"{watched.left} processes outlived start {len(result.codes)}")
    if watched.hung:
        result.violations.append(f"start {len(result.codes)} did not end within {START_TIMEOUT_S:g} s")
        return
    if start.kill is not None and watched.victim:
        result.kills.append(Killed(watched.phase, watched.victim, start.kill.number.name))
    elif start.kill is not None:
        result.kills_too_late += 1
    if watched.code not in _allowed_codes(start, watched):
        message = watched.outcome.get("message", "it left no word")
        result.violations.append(f"start {len(result.codes)} ended with {watched.code}: {message}")
    if watched.code >= 0 and watched.outcome.get("code") != watched.code:
        result.violations.append(f"start {len(result.codes)} ended with {watched.code}, but says {watched.outcome}")


def _allowed_codes(start: Start, watched: Watched) -> set[int]:
    codes = {0}  # it was all but done
    if start.faults:
        codes.add(69)
    if start.kill is None or not watched.victim:
        return codes
    if watched.victim in ("worker", "launcher"):
        return codes | {70}
    return codes | {-SIGKILL if start.kill.number == SIGKILL else 75}


def _count_lost(result: RoundResult, watched: Watched, last_killed: Watched | None) -> Watched | None:
    """Note what a start had to do again of what the last one did that was killed while it trained; return the start
    whose work the next one may have to do again."""
    if last_killed is not None and (watched.steps_s or watched.code == 0):
        resumed = min(watched.steps_s) - 1 if watched.steps_s else STEPS
        steps = max(0, max(last_killed.steps_s) - resumed)
        # A step that the killed start had found done before it is as good as its first.
        since_s = last_killed.steps_s.get(resumed, min(last_killed.steps_s.values()))
        result.lost.append(Lost(steps, last_killed.killed_s - since_s if steps else 0.0))
        last_killed = None
    return watched if watched.victim and watched.steps_s else last_killed


@contextlib.contextmanager
def open_lanes(server: SeaweedFS, folder: Path, jobs: int, seed: int) -> Iterator[list[Lane]]:
    """Make so many lanes, each with a core of its own as long as there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        lanes = []
        for index in range(jobs):
            proxy = stack.enter_context(FaultProxy(server.endpoint, seed=seed))
            lane = Lane(proxy, folder / f"lane-{index}", cores[index % len(cores)])
            lane.folder.mkdir()
            lanes.append(lane)
        yield lanes


def soak(
    rounds: Sequence[Round],
    *,
    seed: int,
    jobs: int,
    logs: Path | None = None,
    note: Callable[[list[RoundResult]], None] = lambda _: None,
) -> list[RoundResult]:
    """Run the rounds, so many beside each other, and return what came of them; a line is printed for each, and `note`
    is told of all so far."""
    results: list[RoundResult] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        server = stack.enter_context(SeaweedFS(folder / "server"))
        client = stack.enter_context(contextlib.closing(server.client()))
        lanes = stack.enter_context(open_lanes(server, folder, jobs, seed))
        free: SimpleQueue[Lane] = SimpleQueue()
        for lane in lanes:
            free.put(lane)
        one_soak = Soak(server, client, get_tiny_model())

        def on_a_lane(act: Callable[[Lane], RoundResult | None]) -> RoundResult | None:
            lane = free.get()
            try:
                return act(lane)
            finally:
                free.put(lane)

        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        needed = sorted({one.configuration for one in rounds}, key=lambda configuration: configuration.name)
        list(pool.map(on_a_lane, [partial(one_soak.make_reference, configuration=one) for one in needed]))
        for result in pool.map(on_a_lane, [partial(one_soak.run_round, one=one, logs=logs) for one in rounds]):
            assert result is not None
            print(result.describe(), flush=True)
            results.append(result)
            note(results)
    return results


def main() -> int:
    """Run the soak and print its table; return 1 if anything was that must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first round; each is drawn by its own")
    parser.add_argument("--jobs", type=int, default=2, help="rounds beside each other")
    parser.add_argument("--logs", type=Path, help="a folder for the output of every start")
    parser.add_argument("--write", type=Path, help="a file for the table, as Markdown")
    arguments = parser.parse_args()
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    rounds = [draw_round(arguments.seed, arguments.first + index) for index in range(arguments.rounds)]
    began_s = time.monotonic()

    def write_table(results: list[RoundResult]) -> None:
        if arguments.write is not None:  # after each round: hours of them may end before their time
            table = format_results(results, arguments.seed, time.monotonic() - began_s)
            arguments.write.write_text(table + "\n", encoding="utf-8")

    results = soak(rounds, seed=arguments.seed, jobs=arguments.jobs, logs=arguments.logs, note=write_table)
    print(format_results(results, arguments.seed, time.monotonic() - began_s))
    return 0 if is_clean(results) else 1


if __name__ == "__main__":
    sys.exit(main())
