"""The base model's weights on their way: fetched beside other work, waited for, and what goes wrong is said then."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from job.errors import UnavailableError
from job.inputs import BaseModel
from job.phases import add_up_phases, begin_phases, phase
from job.weights import Weights

WAIT_S = 10


class Model:
    """A base model whose fetching does what a test says."""

    def __init__(self, fetch: Callable[[], None], size_bytes: int = 1000) -> None:
        self._fetch = fetch
        self._size_bytes = size_bytes
        self.threads: list[str] = []

    def fetch_weights(self, folder: Path) -> None:
        self.threads.append(threading.current_thread().name)
        self._fetch()

    def weights_bytes(self) -> int:
        return self._size_bytes


def make_weights(model: Model, folder: Path) -> Weights:
    return Weights(cast(BaseModel, model), folder)


def test_they_are_fetched_beside_other_work_and_waited_for(tmp_path: Path) -> None:
    goes_on = threading.Event()
    model = Model(lambda: cast(Any, goes_on.wait(WAIT_S)))
    weights = make_weights(model, tmp_path)
    weights.start(data_bytes=10)
    threading.Timer(0.2, goes_on.set).start()
    weights.fetch()
    assert goes_on.is_set()
    assert model.threads == ["weights"]
    weights.fetch()  # looks once more at what is there, for publishing
    assert model.threads == ["weights", "MainThread"]


def test_what_went_wrong_is_raised_when_they_are_needed(tmp_path: Path) -> None:
    def fail() -> None:
        raise UnavailableError("s3://models is out of reach", hint="try again")

    weights = make_weights(Model(fail), tmp_path)
    weights.start(data_bytes=0)
    with pytest.raises(UnavailableError, match="out of reach"):
        weights.fetch()


@pytest.mark.parametrize(("weights_share", "data_share"), [(1.1, 0.0), (0.1, 0.1)], ids=["weights", "tokens"])
def test_they_wait_for_their_turn_on_a_small_disk(tmp_path: Path, weights_share: float, data_share: float) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    model = Model(lambda: None, size_bytes=int(weights_share * free_bytes))
    weights = make_weights(model, tmp_path)
    weights.start(data_bytes=int(data_share * free_bytes))
    weights.fetch()
    assert model.threads == ["MainThread"]


def test_phases_are_those_of_the_main_thread() -> None:
    begin_phases("tokenizing", None)
    seen = []

    def fetch() -> None:
        with phase("download"):
            seen.append(add_up_phases())

    other = threading.Thread(target=fetch)
    other.start()
    other.join()
    assert ["download" in phases for phases in (*seen, add_up_phases())] == [False, False]
