"""Every way the job can end, as one table, and the exceptions that lead there.

`JobError` and its children carry the exit code; only `job.__main__` turns an exception into one. The README's table and
the chart's podFailurePolicy are generated from `EXIT_CODES`. Codes are those of sysexits.h where one fits; 1 is
never used on purpose, because it is what an uncaught Python error returns.

    JobError
    |- DataError           65  the data can't be trained on
    |- NotFoundError       66  data, model or revision not found
    |- UnavailableError    69  a store, the Hub or a peer out of reach after retries
    |  |- DamagedError         a file that isn't what it was when it was written
    |  `- TakenOverError       another job holds the slot
    |- InternalError       70  a bug in the job
    |  `- RefusedError          an adapter that isn't what was trained, or can't be loaded
    |- ResourcesError      71  out of GPU memory, host memory or disk
    |  `- OutOfMemoryError     where smaller steps may need less
    |- PreemptedError      75  told to stop
    |- DeniedError         77  credentials missing, refused or insufficient
    |- ConfigError         78  a setting is wrong, unknown or impossible
    `- DivergedError       80  the loss became NaN or infinite, or exploded
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

RetryPolicy = Literal["done", "fail", "retry", "retry_uncounted"]

# What a Kubernetes Job does with a pod that ended so.
KUBERNETES_ACTION: dict[RetryPolicy, str] = {
    "done": "Complete",
    "fail": "FailJob",
    "retry": "retry, counted",
    "retry_uncounted": "retry, not counted",
}


@dataclass(frozen=True)
class ExitCode:
    """One row of the table: the process's exit status, its short name, when it is used and whether to try again."""

    code: int
    name: str
    when: str
    retry: RetryPolicy


OK = ExitCode(0, "ok", "published and read back, or the same run was already published", "done")
DATA = ExitCode(65, "data", "the data can't be trained on", "fail")
NO_INPUT = ExitCode(66, "no_input", "data, model or revision not found", "fail")
UNAVAILABLE = ExitCode(69, "unavailable", "S3, the Hub or a peer node out of reach after retries", "retry")
INTERNAL = ExitCode(70, "internal", "a bug in the job", "retry")
RESOURCES = ExitCode(
    71, "resources", "out of GPU memory, host memory or disk, after every smaller step was tried", "fail"
)
PREEMPTED = ExitCode(
    75,
    "preempted",
    "told to stop; a start with the same settings goes on from the newest checkpoint",
    "retry_uncounted",
)
DENIED = ExitCode(77, "denied", "credentials missing, refused or insufficient", "fail")
CONFIG = ExitCode(78, "config", "a setting is wrong, unknown or impossible", "fail")
DIVERGED = ExitCode(80, "diverged", "the loss became NaN or infinite, or exploded", "fail")

EXIT_CODES: tuple[ExitCode, ...] = (
    OK,
    DATA,
    NO_INPUT,
    UNAVAILABLE,
    INTERNAL,
    RESOURCES,
    PREEMPTED,
    DENIED,
    CONFIG,
    DIVERGED,
)


class JobError(Exception):
    """An end of the job that was foreseen: what went wrong (`message`) and what to do about it (`hint`)."""

    exit_code: ClassVar[ExitCode] = INTERNAL

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.step: int | None = None  # the optimizer step at which training ended, where it had begun


class DataError(JobError):
    """The data can't be trained on."""

    exit_code = DATA


class NotFoundError(JobError):
    """Data, model, revision or bucket isn't there."""

    exit_code = NO_INPUT


class UnavailableError(JobError):
    """A store, the Hub or a peer is out of reach, after retries. One that asks for a pause says how long: 0 is not."""

    exit_code = UNAVAILABLE

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class TakenOverError(UnavailableError):
    """Another job holds the slot now: waiting changes nothing."""


class DamagedError(UnavailableError):
    """A file in a store isn't what it was when it was written, however often it is fetched."""


class InternalError(JobError):
    """The job broke one of its own promises."""

    exit_code = INTERNAL


class RefusedError(InternalError):
    """A fresh process can't load an adapter, or finds another than was trained."""


class ResourcesError(JobError):
    """Memory or disk ran out."""

    exit_code = RESOURCES


class OutOfMemoryError(ResourcesError):
    """Memory ran out where smaller steps may need less."""


class PreemptedError(JobError):
    """The job was told to stop."""

    exit_code = PREEMPTED


class DeniedError(JobError):
    """Credentials are missing, refused or insufficient."""

    exit_code = DENIED


class ConfigError(JobError):
    """A setting is wrong, unknown or impossible."""

    exit_code = CONFIG


class DivergedError(JobError):
    """The loss left the numbers."""

    exit_code = DIVERGED


ERROR_BY_CODE: dict[int, type[JobError]] = {error.exit_code.code: error for error in JobError.__subclasses__()}
