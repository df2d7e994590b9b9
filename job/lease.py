"""One job at a time works on a slot: a start leaves a lease there, `checkpoint/lease.json`, and keeps renewing it.

A second job that finds a lease watches it: renewed meanwhile, the first is at work, and the second ends; not renewed,
it is stale and taken over. No two clocks are compared, for machines disagree about the time: what counts is whether the
lease changes while it is watched. Every write is conditional on the version that was read, so of two jobs that do the
same at the same moment one is too late.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from job.errors import ConfigError, JobError, TakenOverError
from job.log import logger
from job.stopping import acknowledge_stop
from job.storage import Store

LEASE_PATH = "checkpoint/lease.json"
RENEWAL_S = 15.0
STALE_S = 45.0  # three renewals
_LOOK_S = 1.0
_RELEASE_S = 5.0  # a store that doesn't answer must not keep the job from ending within its grace period
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


class LeaseRecord(BaseModel):
    """What stands in the slot. `holder` is random, for each start; `renewals` counts, so that no two writes are alike.

    Whether the process still lives can be told on its own host, from the same boot (`boot_id`) and within the same
    `pid_namespace`: `pid` with the moment at which it was started (`process_start`, kernel ticks since the boot).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer job may say more

    run_id: str
    holder: str
    host: str
    pid: int
    boot_id: str
    pid_namespace: str
    process_start: int
    started_at: str
    renewals: int

    def describe(self) -> str:
        """Name the holder, for people."""
        return f"the job on {self.host} (pid {self.pid}), run {self.run_id}, started {self.started_at}"

    def encode(self) -> bytes:
        """Return the file's content."""
        return (self.model_dump_json(indent=2) + "\n").encode()


@contextmanager
def hold_slot(
    slot: Store,
    *,
    run_id: str,
    output: str | None = None,
    renewal_s: float = RENEWAL_S,
    stale_s: float = STALE_S,
    look_s: float = _LOOK_S,
) -> Iterator["Lease"]:
    """Keep other jobs off a slot for the block; wait up to `stale_s` seconds for one that may be dead.

    `output` is the slot's URI for messages, where the lease is kept elsewhere. Raises ConfigError, which names it, when
    another job works there, and what the store raises.
    """
    lease = Lease(slot, _describe_process(run_id), output=output or slot.uri, stale_s=stale_s, look_s=look_s)
    lease.acquire()
    lease.start(renewal_s)
    try:
        yield lease
    finally:
        lease.stop()


def drop_lease(slot: Store, run_id: str) -> None:
    """Remove the lease of a run that is published: its holder was killed, or is about to go. A failure is a warning."""
    try:
        found = slot.read_version(LEASE_PATH)
        record = None if found is None else _parse(found[0])
        if record is not None and record.run_id == run_id:
            slot.delete(LEASE_PATH)
    except JobError as error:
        logger.warning("%s stays behind: %s", LEASE_PATH, error.message)


class Lease:
    """This job's hold on a slot. One thread renews it, and releases it in the end."""

    def __init__(self, slot: Store, record: LeaseRecord, *, output: str, stale_s: float, look_s: float) -> None:
        self._slot = slot
        self._output = output
        self._record = record
        self._stale_s = stale_s
        self._look_s = look_s
        self._version: str | None = None  # of the file, as last written
        self._lost: LeaseRecord | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="lease", daemon=True)
        self._renewal_s = 0.0

    def check(self) -> None:
        """Raise UnavailableError when another job has taken the slot over: from then on nothing may be written there.

        A store that can't be read now says nothing about that, and is only warned of.
        """
        try:
            found = self._read()
        except JobError as error:
            logger.warning("the lease can't be looked at: %s", error.message)
        else:
            self._note(found)
        if self._lost is not None:
            raise TakenOverError(
                f"{self._output}: taken over by {self._lost.describe()}, for this one had not renewed its lease",
                hint="nothing, if that job goes on; it finds the checkpoints of this one",
            )

    def acquire(self) -> None:
        """Write the lease; wait, where there is one, until it is known whether its holder still works."""
        while True:
            found = self._slot.read_version(LEASE_PATH)
            version = None
            if found is not None:
                content, version = found
                held = _parse(content)
                if held is not None and _is_dead(held, self._record):
                    logger.info("taking over from %s, which has died", held.describe())
                elif not self._watch(held, version):
                    continue
            self._version = self._slot.swap(LEASE_PATH, self._record.encode(), version)
            if self._version is not None:
                return

    def start(self, renewal_s: float) -> None:
        """Renew the lease from now on."""
        self._renewal_s = renewal_s
        self._thread.start()

    def stop(self) -> None:
        """End the renewing, and give the slot free if it is still this job's."""
        acknowledge_stop()
        self._stop.set()
        self._thread.join(_RELEASE_S)
        if self._thread.is_alive():
            logger.warning("%s stays behind: the next start may wait for %g s", LEASE_PATH, self._stale_s)

    def _watch(self, held: LeaseRecord | None, version: str) -> bool:
        """Look at another job's lease until it counts as stale; return False when it is gone.

        Raises ConfigError when it is renewed.
        """
        holder = "a job whose lease can't be read" if held is None else held.describe()
        logger.info("waiting up to %g s to see whether %s, still works on %s", self._stale_s, holder, self._output)
        began_s = time.monotonic()
        while time.monotonic() - began_s < self._stale_s:
            time.sleep(self._look_s)
            found = self._slot.read_version(LEASE_PATH)
            if found is None:
                return False
            if found[1] != version:
                now = _parse(found[0])
                raise ConfigError(
                    f"SFT_OUTPUT__URI={self._output}: {holder if now is None else now.describe()}, works there",
                    hint="wait until it has ended, stop it, or publish elsewhere",
                )
        logger.warning("taking over from %s, which has not renewed its lease for %g s", holder, self._stale_s)
        return True

    def _serve(self) -> None:
        is_failing = False
        while not self._stop.wait(self._renewal_s) and self._lost is None:
            try:
                self._renew()
            except JobError as error:
                if not is_failing:
                    logger.warning("the lease can't be renewed, trying on: %s", error.message)
                is_failing = True
            else:
                if is_failing:
                    logger.info("the lease is renewed again")
                is_failing = False
        try:
            self._release()
        except JobError as error:
            logger.warning("%s stays behind: %s", LEASE_PATH, error.message)

    def _renew(self) -> None:
        for _ in range(2):
            self._record = self._record.model_copy(update={"renewals": self._record.renewals + 1})
            version = self._slot.swap(LEASE_PATH, self._record.encode(), self._version)
            if version is not None:
                self._version = version
                return
            # There is another job's lease, one of ours that seemed to fail, or none: somebody tidied up.
            found = self._slot.read_version(LEASE_PATH)
            self._note(None if found is None else _parse(found[0]))
            if self._lost is not None:
                return
            self._version = None if found is None else found[1]

    def _note(self, found: LeaseRecord | None) -> None:
        if found is not None and found.holder != self._record.holder and self._lost is None:
            self._lost = found
            logger.error("%s is taken over by %s", self._output, found.describe())

    def _read(self) -> LeaseRecord | None:
        found = self._slot.read_version(LEASE_PATH)
        return None if found is None else _parse(found[0])

    def _release(self) -> None:
        found = self._read()
        if found is not None and found.holder == self._record.holder:
            self._slot.delete(LEASE_PATH)


def _describe_process(run_id: str) -> LeaseRecord:
    return LeaseRecord(
        run_id=run_id,
        holder=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        boot_id=_BOOT_ID.read_text().strip(),
        pid_namespace=str(_PID_NAMESPACE.readlink()),
        process_start=_find_process_start(os.getpid()) or 0,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        renewals=0,
    )


def _is_dead(held: LeaseRecord, mine: LeaseRecord) -> bool:
    """Say whether a lease was written by a process of this very machine that lives no more."""
    is_here = (held.host, held.boot_id, held.pid_namespace) == (mine.host, mine.boot_id, mine.pid_namespace)
    return is_here and _find_process_start(held.pid) != held.process_start


def _find_process_start(pid: int) -> int | None:
    """Return when a process was started, in kernel ticks since the boot; None for one that is no more.

    It tells a process from a later one of the same id (proc(5): field 22 of /proc/PID/stat; field 3 is its state).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # after the name, which may hold anything
    return None if fields[0] == "Z" else int(fields[19])


def _parse(content: bytes) -> LeaseRecord | None:
    try:
        return LeaseRecord.model_validate_json(content)
    except ValidationError:
        logger.warning("%s holds no lease that this job can read", LEASE_PATH)
        return None
