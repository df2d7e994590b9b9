"""A proxy before an S3 server that injects faults: mitmproxy, in an environment of its own, with fault_addon.py in it.

`make .cache/mitmproxy-venv/.installed` makes that environment. Nothing here needs pytest.
"""

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from seaweed import die_with_parent

ENVIRONMENT = Path(__file__).parent.parent.parent / ".cache" / "mitmproxy-venv"
READY_TIMEOUT_S = 60.0
FaultKind = Literal[
    "internal_error",  # 500
    "slow_down",  # 503
    "too_many_requests",  # 429
    "expired_token",  # 403
    "clock_skew",  # 403
    "access_denied",  # 403
    "reset_before",  # the connection is reset before the server has the request
    "reset_after",  # it is reset when the server has done what it was asked
    "reset_within",  # it is reset in the middle of the answer's body
    "truncated",  # it is closed in the middle of the answer's body
    "stall",  # no answer comes for so many seconds, and then the connection is closed; the server has no part in it
    "latency",  # the request reaches the server so many seconds later
    "flip_answer",  # one bit of an object is another when it arrives
    "flip_upload",  # one bit of the request's body is another
]


@dataclass(frozen=True)
class Rule:
    """A fault, and the requests that it strikes: those whose method matches the regular expression as a whole and whose
    path, query included, matches somewhere; after the first so many; so many times at most, each with a probability."""

    kind: FaultKind
    method: str = ".*"
    path: str = ""
    probability: float = 1.0
    after: int = 0
    times: int | None = None
    seconds: float = 0.0  # of latency and stall


@dataclass(frozen=True)
class Fault:
    """One fault that struck, and when (seconds since the epoch)."""

    kind: FaultKind
    method: str
    path: str
    time_s: float


class FaultProxy:
    """A running proxy at `endpoint` before the server at `server_endpoint`; use it as a context manager."""

    def __init__(self, server_endpoint: str, rules: Sequence[Rule] = (), seed: int = 0) -> None:
        self.endpoint = ""
        self._server_endpoint = server_endpoint
        self._rules = rules
        self._seed = seed
        self._folder = tempfile.TemporaryDirectory(prefix="fault-proxy-")
        self._process: subprocess.Popen[bytes] | None = None
        self._faults: list[Fault] = []
        self._read_bytes = 0

    def __enter__(self) -> Self:
        program = ENVIRONMENT / "bin" / "mitmdump"
        if not program.exists():
            raise RuntimeError(f"{program} is missing: make {ENVIRONMENT.relative_to(Path.cwd())}/.installed")
        self.set_rules(self._rules)
        options = {
            "confdir": ENVIRONMENT / "configuration",  # its certificates, which take a while to make
            "mode": f"reverse:{self._server_endpoint}",
            "listen_host": "127.0.0.1",
            "listen_port": 0,
            "keep_host_header": "true",  # requests are signed for the host that the client sees
            "connection_strategy": "lazy",
            "flow_detail": 0,
            "fault_folder": self._folder.name,
            "fault_seed": self._seed,
        }
        settings = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
        parent = os.getpid()
        with (self._root / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "--quiet", "--scripts", str(Path(__file__).with_name("fault_addon.py")), *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - it calls the kernel and nothing else
            )
        try:
            self.endpoint = f"http://127.0.0.1:{self._wait_for_port()}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Follow these rules from now on, and count anew what they match; requests under way keep their fault."""
        partial = self._root / "rules.partial"
        partial.write_text(json.dumps([asdict(rule) for rule in rules]))
        partial.replace(self._root / "rules.json")

    def faults(self) -> list[Fault]:
        """Return the faults that have struck so far."""
        path = self._root / "faults.jsonl"
        if path.exists():
            with path.open() as log:
                log.seek(self._read_bytes)
                new, whole, _ = log.read().rpartition("\n")  # the last line may be being written just now
            self._read_bytes += len(new + whole)
            self._faults += [Fault(**json.loads(line)) for line in new.splitlines()]
        return list(self._faults)

    def count_faults(self) -> Counter[str]:
        """Return how many faults of each kind have struck so far."""
        return Counter(fault.kind for fault in self.faults())

    def read_log(self) -> str:
        """Return what the proxy says of its own troubles."""
        return (self._root / "log").read_text(errors="replace")

    @property
    def _root(self) -> Path:
        return Path(self._folder.name)

    def _wait_for_port(self) -> int:
        assert self._process is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        path = self._root / "port"
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the fault proxy did not get ready: {self.read_log()}")
            time.sleep(0.05)
        return int(path.read_text())

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._folder.cleanup()
