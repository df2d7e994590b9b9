"""What the soak has seen, counted and put into a table of Markdown."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_PHASES = (
    "starting",
    "reading the inputs",
    "tokenizing",
    "fetching the base model",
    "training: workers start",
    "training: steps",
    "publishing",
)


@dataclass(frozen=True)
class Killed:
    """A kill that found the job running."""

    phase: str
    victim: str
    signal: str


@dataclass(frozen=True)
class Lost:
    """What one kill cost: the steps that the next start had to do again, and the seconds that they had taken."""

    steps: int
    seconds: float


@dataclass
class RoundResult:
    """What came of a round. `violations` are what must never be, in words."""

    number: int
    configuration: str
    codes: list[int] = field(default_factory=list)
    kills: list[Killed] = field(default_factory=list)
    kills_too_late: int = 0
    lost: list[Lost] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    finished: bool = False
    equal: bool = False
    corrupt_publications: int = 0
    leftover_processes: int = 0
    violations: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return the round in one line, with a line for each violation."""
        kills = ", ".join(f"{kill.signal} to {kill.victim} in {kill.phase}" for kill in self.kills) or "none in time"
        end = "equal" if self.equal else "NOT EQUAL" if self.finished else "NOT FINISHED"
        faults = self.faults.total()
        line = f"round {self.number}, {self.configuration}: ends {self.codes}, {faults} faults, kills: {kills}; {end}"
        return "\n".join([line, *(f"  VIOLATION: {violation}" for violation in self.violations)])


def is_clean(results: Iterable[RoundResult]) -> bool:
    """Say whether nothing happened that must not."""
    return all(result.finished and result.equal and not result.violations for result in results)


def format_results(results: Sequence[RoundResult], seed: int, seconds: float) -> str:
    """Return the tables, as Markdown."""
    kills = [kill for result in results for kill in result.kills]
    return "\n\n".join(
        [
            f"{len(results)} rounds, seed {seed}, {sum(len(result.codes) for result in results)} starts of the job, "
            f"{seconds / 60:.0f} minutes",
            _table(("", ""), _summarise(results)),
            _table(("kills while", "SIGKILL", "SIGTERM"), _count_kills(kills)),
            _table(("fault", "injected"), sorted(_sum(result.faults for result in results).items())),
        ]
    )


def _summarise(results: Sequence[RoundResult]) -> list[tuple[object, ...]]:
    lost = [lost for result in results for lost in result.lost]
    victims = Counter(kill.victim for result in results for kill in result.kills)
    configurations = Counter(result.configuration for result in results)
    return [
        ("rounds", _join(configurations)),
        ("kills", _join(victims)),
        ("kills that came too late, when the job had ended", sum(result.kills_too_late for result in results)),
        ("runs finished", f"{sum(result.finished for result in results)} of {len(results)}"),
        (
            "adapters bitwise equal to the uninterrupted one",
            f"{sum(result.equal for result in results)} of {len(results)}",
        ),
        ("corrupt or partial publications", sum(result.corrupt_publications for result in results)),
        ("leftover processes", sum(result.leftover_processes for result in results)),
        ("other violations", sum(len(result.violations) for result in results)),
        ("work lost per kill in training: steps", _spread([one.steps for one in lost], "")),
        ("work lost per kill in training: time", _spread([one.seconds for one in lost], " s")),
    ]


def _count_kills(kills: Sequence[Killed]) -> list[tuple[object, ...]]:
    count = Counter((kill.phase, kill.signal) for kill in kills)
    return [(phase, count[phase, "SIGKILL"], count[phase, "SIGTERM"]) for phase in _PHASES]


def _spread(values: Sequence[float], unit: str) -> str:
    if not values:
        return "none"
    median, mean = statistics.median(values), statistics.fmean(values)
    return f"median {median:.3g}{unit}, mean {mean:.3g}{unit}, most {max(values):.3g}{unit} ({len(values)} kills)"


def _join(counts: Counter[str]) -> str:
    return f"{counts.total()}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _sum(counts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
