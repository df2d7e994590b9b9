"""What happens in each round of the soak, drawn from a seed: which job, when and how it is killed, which faults."""

import random
from dataclasses import dataclass, replace
from signal import SIGKILL, SIGTERM, Signals
from typing import Literal

from fault_proxy import FaultKind, Rule

STEPS = 24
ROWS = 50  # 12 1/2 steps of a batch of 4: a pass ends within a step
BATCH = 4
CHECKPOINT_STEPS = 3
KILLED_STARTS = {1: 3, 2: 4, 3: 2, 4: 1}  # with how often each number is drawn

Victim = Literal["parent", "launcher", "worker", "all"]


@dataclass(frozen=True)
class Configuration:
    """Under what the job trains. The adapters of two of them need not be bitwise equal."""

    engine: str
    processes: int

    @property
    def name(self) -> str:
        return f"{self.engine} x {self.processes}"


ZERO2 = Configuration("zero2", 2)
CONFIGURATIONS = {Configuration("ddp", 1): 14, Configuration("ddp", 2): 4, ZERO2: 2}  # with how often each is drawn


@dataclass(frozen=True)
class Moment:
    """When to strike: `delay_s` seconds after the job has said something, or has sent a request whose method and path
    match, or, with neither, after it was started."""

    line: str = ""
    request: Rule | None = None  # it holds the request up, so that the moment lasts
    delay_s: float = 0.0


@dataclass(frozen=True)
class Kill:
    """A signal for one of the job's processes, or for all."""

    victim: Victim
    number: Signals
    moment: Moment


@dataclass(frozen=True)
class Start:
    """One start of the job: on the disk that the last one left, or as on another node; killed or not."""

    on_fresh_disk: bool
    kill: Kill | None
    faults: tuple[Rule, ...]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What the proxy does: the rule that the killer waits for comes first."""
        request = self.kill.moment.request if self.kill else None
        return self.faults if request is None else (request, *self.faults)


@dataclass(frozen=True)
class Round:
    """A job that is started until it has published; the last start is killed by nobody and, if need be, repeated."""

    number: int
    configuration: Configuration
    starts: tuple[Start, ...]


# Faults that pass. What they hit is tried again: by the client, by the job, or by its next start.
_PASSING: tuple[tuple[FaultKind, float], ...] = (
    ("internal_error", 0.05),
    ("slow_down", 0.05),
    ("too_many_requests", 0.05),
    ("reset_before", 0.05),
    ("reset_after", 0.05),
    ("reset_within", 0.05),
    ("truncated", 0.05),
    ("flip_answer", 0.05),
    ("flip_upload", 0.05),
    ("latency", 0.1),
)


def draw_round(seed: int, number: int) -> Round:
    """Draw a round; the same for the same seed and number."""
    chance = random.Random(f"{seed} {number}")
    [configuration] = chance.choices(list(CONFIGURATIONS), list(CONFIGURATIONS.values()))
    [count] = chance.choices(list(KILLED_STARTS), list(KILLED_STARTS.values()))
    killed = [_draw_start(chance) for _ in range(count)]
    last = Start(chance.random() < 0.5, None, _draw_faults(chance))
    return Round(number, configuration, (*killed, last))


def calm(start: Start) -> Start:
    """Return a start without kill and faults that follows this one: it must end well."""
    return replace(start, kill=None, faults=())


def _draw_start(chance: random.Random) -> Start:
    moment, trains = _draw_moment(chance)
    victims: dict[Victim, int] = {"parent": 5, "all": 2}
    if trains:
        victims |= {"worker": 2, "launcher": 1}
    [victim] = chance.choices(list(victims), list(victims.values()))
    number = chance.choice((SIGKILL, SIGTERM))
    return Start(chance.random() < 0.5, Kill(victim, number, moment), _draw_faults(chance))


def _draw_faults(chance: random.Random) -> tuple[Rule, ...]:
    if chance.random() < 0.5:
        return ()
    kinds = chance.sample(_PASSING, 3)
    return tuple(Rule(kind, probability=probability, seconds=0.5) for kind, probability in kinds)


def _draw_moment(chance: random.Random) -> tuple[Moment, bool]:
    """Draw a moment, and say whether there are workers then."""
    which = chance.choices(
        ("at any time", "phase", "worker starts", "step", "checkpoint", "publishing"), (2, 2, 2, 6, 4, 4)
    )[0]
    if which == "at any time":
        return Moment(delay_s=chance.uniform(0, 10)), False
    if which == "phase":
        phase = chance.choice(("reading the inputs", "tokenizing", "fetching the base model"))
        return Moment(line=f"== {phase}", delay_s=chance.uniform(0, 0.5)), False
    if which == "worker starts":
        return Moment(line="== training", delay_s=chance.uniform(0, 6)), True
    if which == "step":
        return Moment(line=f"step {chance.randint(1, STEPS)}/", delay_s=chance.uniform(0, 0.2)), True
    if which == "checkpoint":
        path = chance.choice((r"/checkpoint/.*\.safetensors", r"/checkpoint/.*checkpoint\.json", "/checkpoint/"))
        method = "DELETE" if path == "/checkpoint/" else "PUT"
        return _draw_request(chance, method, path, after=chance.randint(0, 3)), True
    method, path = chance.choice(
        (
            ("PUT", "/adapter_model.safetensors"),
            ("PUT", "/tokenizer.json"),
            ("GET", "/adapter_model.safetensors"),
            ("PUT", "/manifest.json"),
            ("PUT|DELETE", "/checkpoint/memory.json"),
        )
    )
    return _draw_request(chance, method, path), False


def _draw_request(chance: random.Random, method: str, path: str, *, after: int = 0) -> Moment:
    delay_s = chance.uniform(0, 1)
    # Half of these kills come while the request is held up before the server, the others after it has gone through.
    rule = Rule("latency", method=method, path=path, after=after, times=1, seconds=chance.choice((0.0, delay_s + 1)))
    return Moment(request=rule, delay_s=delay_s)
