"""Waiting for a store that is out of reach, where hours of work are at stake: beyond the retries of each request."""

import time
from collections.abc import Callable
from typing import TypeVar

from job.errors import TakenOverError, UnavailableError
from job.log import logger

PATIENCE_S = 300.0
FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0

Result = TypeVar("Result")


def insist(act: Callable[[], Result]) -> Result:
    """Do something with a store; where it is out of reach, again and again for five minutes, with growing pauses,
    none shorter than it asks for.

    Raises the last UnavailableError then, and all other errors at once, TakenOverError among them; a signal ends a
    pause.
    """
    away_since_s: float | None = None  # an upload that failed may have taken longer than that
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return act()
        except TakenOverError:
            raise
        except UnavailableError as error:
            now_s = time.monotonic()
            away_since_s = now_s if away_since_s is None else away_since_s
            left_s = PATIENCE_S - (now_s - away_since_s)
            if left_s <= 0:
                raise
            pause_s = min(max(pause_s, error.retry_after_s), left_s)
            logger.warning(
                "%s; trying again in %.0f s, and for up to %.0f s in all", error.message, pause_s, PATIENCE_S
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
