"""The steps down, what is remembered of them, and that all nodes go down together."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job.errors import ConfigError, OutOfMemoryError, ResourcesError, UnavailableError
from job.handover import RunFolder
from job.hardware import Hardware
from job.memory.estimate import estimate_memory
from job.memory.found import MemoryFound, apply_memory_found, keep_memory_found, recall_memory_found
from job.memory.ladder import give_up, train_within_memory
from job.memory.model_shape import ModelShape
from job.memory.setup import pick_setup
from job.memory.smaller_plan import take_smaller_step
from job.nodes.board import AttemptEndedError
from job.nodes.node import Node
from job.nodes.peers import Peers
from job.plan import TrainPlan
from job.prepared import Prepared
from job.storage.local import LocalStore

PlanFor = Callable[..., TrainPlan]
Step = tuple[int, int, float, str]  # micro batch, accumulation, checkpointing, loss
MEMORY = Path("checkpoint") / "memory.json"


def step_of(plan: TrainPlan) -> Step:
    return plan.micro_batch_size, plan.gradient_accumulation_steps, plan.gradient_checkpointing, plan.loss


def all_steps(plan: TrainPlan) -> Iterator[TrainPlan]:
    smaller: TrainPlan | None = plan
    while smaller is not None:
        yield smaller
        smaller = take_smaller_step(smaller)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (
            {"TRAIN__MICRO_BATCH_SIZE": 8},
            [
                (8, 1, 0, "full"),
                (4, 2, 0, "full"),
                (2, 4, 0, "full"),
                (1, 8, 0, "full"),
                (1, 8, 1, "full"),
                (1, 8, 1, "chunked"),
            ],
        ),
        (
            {"TRAIN__MICRO_BATCH_SIZE": 6, "TRAIN__GLOBAL_BATCH_SIZE": 12, "TRAIN__GRADIENT_CHECKPOINTING": "true"},
            [(6, 2, 1, "full"), (3, 4, 1, "full"), (1, 12, 1, "full"), (1, 12, 1, "chunked")],
        ),
        (
            {"TRAIN__MICRO_BATCH_SIZE": 5, "TRAIN__GLOBAL_BATCH_SIZE": 30, "PARALLEL__PROCESSES": 3},
            [
                (5, 2, 0, "full"),
                (2, 5, 0, "full"),
                (1, 10, 0, "full"),
                (1, 10, 1, "full"),
                (1, 10, 1, "chunked"),
            ],
        ),
        (
            {"TRAIN__MICRO_BATCH_SIZE": 1, "TRAIN__GRADIENT_CHECKPOINTING": "true", "TRAIN__LOSS": "chunked"},
            [(1, 8, 1, "chunked")],
        ),
    ],
)
def test_every_step_is_smaller_and_the_global_batch_stays(
    plan_for: PlanFor, settings: dict[str, Any], steps: list[Step]
) -> None:
    plans = list(all_steps(plan_for(**{"TRAIN__LOSS": "full"} | settings)))
    assert [step_of(plan) for plan in plans] == steps
    for before, after in pairwise(plans):
        assert after.warnings[:-1] == before.warnings
        assert after.micro_batch_size * after.gradient_accumulation_steps * after.world_size == before.global_batch_size
        changes = {"micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "loss"}
        kept = changes | {"sources", "warnings"}
        assert after.model_dump(exclude=kept) == before.model_dump(exclude=kept)
        new = {name for name in after.sources if after.sources[name] != before.sources[name]}
        assert new == {name for name in changes if getattr(after, name) != getattr(before, name)} - {
            "gradient_accumulation_steps"
        }


def test_a_number_that_was_asked_for_is_named(plan_for: PlanFor) -> None:
    asked = list(all_steps(plan_for(TRAIN__MICRO_BATCH_SIZE=4)))
    assert asked[1].warnings[-1] == (
        "out of memory with SFT_TRAIN__MICRO_BATCH_SIZE=4: trying 2 x 4 (micro batch x accumulation); the global batch "
        "stays 8"
    )
    assert asked[2].warnings[-1].startswith("out of memory with micro batch=2: ")
    assert asked[1].sources["micro_batch_size"] == "out of memory at 4"


# The loop, with workers that are played


@dataclass
class OtherNodes(Peers):
    """Two nodes, of which the other says in each exchange what the test wants."""

    answers: list[Any]
    rank: int = 0
    given: list[Any] = field(default_factory=list)
    interrupts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(Node(self.rank, 2, "localhost", 1, 1.0))

    def exchange(self, value: Any) -> list[Any]:
        self.given.append(json.loads(json.dumps(value)))
        other = self.answers.pop(0)
        return [value, other] if self.rank == 0 else [other, value]

    def interrupt(self, reason: str) -> None:
        self.interrupts.append(reason)


class Workers:
    """Stands for an attempt: fails as told, in order, and looks at the folder each time."""

    def __init__(self, folder: RunFolder, *failures: Exception | None) -> None:
        self._folder = folder
        self._failures = list(failures)
        self.plans: list[TrainPlan] = []

    def __call__(self, prepared: Prepared) -> None:
        plan, folder = prepared.plan, self._folder
        assert TrainPlan.model_validate_json(folder.plan.read_bytes()) == plan
        assert {path.name for path in folder.root.iterdir()} == {"plan.json", "xray.json", "inputs.json", "adapter"}
        assert list(folder.adapter.iterdir()) == []
        self.plans.append(plan)
        for path in (folder.metrics, folder.outcome(0), folder.worker_log(1), folder.adapter / "adapter_model"):
            path.write_text("of this attempt")
        failure = self._failures.pop(0)
        if failure is not None:
            raise failure


class Handed(Prepared):
    """A prepared run whose inputs for the workers are one file."""

    def hand_over(self, folder: RunFolder) -> RunFolder:
        folder.adapter.mkdir()
        folder.inputs.write_text("{}")
        return folder


@pytest.fixture
def prepare(
    plan_for: PlanFor, machine: Callable[..., Hardware], small_shape: ModelShape, tmp_path: Path
) -> Callable[..., Prepared]:
    """A run in tmp_path/run whose slot is tmp_path/slot."""

    def make(*, run_id: str = "run", hardware: Hardware | None = None, **settings: object) -> Prepared:
        slot = LocalStore(str(tmp_path / "slot"), setting="SFT_OUTPUT__URI")
        inputs, nothing = cast(Any, SimpleNamespace(run_id=run_id)), cast(Any, None)
        dataset = cast(Any, SimpleNamespace(facts=SimpleNamespace(shape=small_shape, row_tokens=None)))
        plan = plan_for(**({"TRAIN__MICRO_BATCH_SIZE": 4, "TRAIN__LOSS": "full"} | settings))
        prepared = Handed(nothing, hardware or machine(), inputs, tmp_path, nothing, dataset, plan, slot, nothing, slot)
        folder = RunFolder(tmp_path / "run")
        shutil.rmtree(folder.root, ignore_errors=True)
        folder.root.mkdir()
        folder.plan.write_text(plan.model_dump_json())
        folder.xray.write_text("{}")
        folder.inputs.write_text("{}")
        folder.adapter.mkdir()
        return prepared

    return make


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., tuple[Workers, Prepared | ResourcesError]]:
    """Train with workers that fail as told; return them, and what came of it."""

    def run(
        prepared: Prepared, *failures: Exception | None, peers: Peers | None = None
    ) -> tuple[Workers, Prepared | ResourcesError]:
        folder = RunFolder(tmp_path / "run")
        workers = Workers(folder, *failures)
        alone = Peers(Node(0, 1, "", 1, 1.0))
        try:
            return workers, train_within_memory(prepared, folder, peers or alone, workers)
        except ResourcesError as error:
            return workers, error

    return run


def test_goes_down_until_it_fits(prepare: Any, play: Any, tmp_path: Path) -> None:
    workers, done = play(prepare(), OutOfMemoryError("one"), OutOfMemoryError("two"), None)
    assert [plan.micro_batch_size for plan in workers.plans] == [4, 2, 1]
    assert done.plan == workers.plans[-1]
    found = json.loads((tmp_path / "slot" / MEMORY).read_text())
    assert found == {
        "run_id": "run",
        "device": "CPU, 64.0 GiB",
        "engine": "ddp",
        "world_size": 1,
        "micro_batch_size": 1,
        "gradient_checkpointing": 0.0,
        "loss": "full",
    }


def test_without_a_shortage_nothing_is_written(prepare: Any, play: Any, tmp_path: Path) -> None:
    prepared = prepare()
    workers, done = play(prepared, None)
    assert done is prepared
    assert len(workers.plans) == 1
    assert not (tmp_path / "slot").exists()


def test_gives_up_with_what_was_tried_and_the_remedies(
    prepare: Any, play: Any, tmp_path: Path, small_shape: ModelShape
) -> None:
    last = OutOfMemoryError("out of GPU memory: 1 GiB")
    last.step = 7
    workers, error = play(prepare(), *[OutOfMemoryError("x")] * 4, last)
    setup = pick_setup(workers.plans[-1].model_dump())
    smallest_estimate = estimate_memory(setup, small_shape, workers.plans[0].memory.available_bytes)
    assert smallest_estimate.total_bytes < workers.plans[0].memory.total_bytes
    assert type(error) is ResourcesError
    assert error.message == (
        "out of memory after every smaller step was tried (micro batches of 4, 2, 1, gradient checkpointing, the "
        "chunked loss): out of GPU memory: 1 GiB; the last was 1 sequence of up to 512 tokens on 1 process, "
        f"org/model in float32; estimated: {smallest_estimate.describe()}"
    )
    assert error.hint == "lower SFT_DATA__MAX_LENGTH (it is 512), set SFT_QUANTIZATION=nf4, or give the job more memory"
    assert error.step == 7
    assert not (tmp_path / "slot" / MEMORY).exists()


def test_the_remedies_on_gpus(prepare: Any, play: Any, machine: Any) -> None:
    settings = {"TRAIN__MICRO_BATCH_SIZE": 1, "TRAIN__GRADIENT_CHECKPOINTING": "true"}
    changes = {"device": "cuda", "quantization": "nf4", "nodes": 2, "loss": "liger"}
    plan = prepare(**settings).plan.model_copy(update=changes)
    error = give_up([plan], OutOfMemoryError("x"))
    assert "(a micro batch of 1, gradient checkpointing, the liger loss)" in error.message
    assert "on each of 2 processes, org/model in nf4; estimated: " in error.message
    assert error.hint == (
        "lower SFT_DATA__MAX_LENGTH (it is 512), share the model among more GPUs by SFT_PARALLEL__ENGINE=zero3, or use "
        "a GPU with more memory"
    )


def test_a_model_whose_loss_can_not_be_chunked_has_come_to_the_end(prepare: Any, play: Any, tmp_path: Path) -> None:
    prepared = prepare(TRAIN__MICRO_BATCH_SIZE=1, TRAIN__GRADIENT_CHECKPOINTING="true")
    workers, error = play(prepared, OutOfMemoryError("all logits"), ConfigError("SFT_TRAIN__LOSS=chunked: no"))
    assert workers.plans[-1].loss == "chunked"
    assert "(a micro batch of 1, gradient checkpointing): all logits;" in error.message
    assert not (tmp_path / "slot" / MEMORY).exists()


def test_a_setting_that_is_wrong_is_no_shortage(prepare: Any, play: Any) -> None:
    with pytest.raises(ConfigError, match="wrong"):
        play(prepare(), ConfigError("wrong"))


# Several nodes


def test_a_node_with_memory_left_goes_down_with_the_others(prepare: Any, play: Any, tmp_path: Path) -> None:
    for rank, has_written in ((0, True), (1, False)):
        short = {"out_of_memory": "out of GPU memory"}
        peers = OtherNodes([None, short, {"out_of_memory": None}], rank=rank)
        workers, done = play(prepare(), AttemptEndedError("node 1: out of memory"), None, peers=peers)
        assert [plan.micro_batch_size for plan in workers.plans] == [4, 2]
        assert done.plan.micro_batch_size == 2
        assert peers.given == [None, {"out_of_memory": None}, {"out_of_memory": None}]
        assert (tmp_path / "slot" / MEMORY).exists() == has_written
        (tmp_path / "slot" / MEMORY).unlink(missing_ok=True)


def test_a_node_without_memory_says_so(prepare: Any, play: Any) -> None:
    peers = OtherNodes([None, {"out_of_memory": None}, {"out_of_memory": None}])
    play(prepare(), OutOfMemoryError("mine"), None, peers=peers)
    assert peers.given[1] == {"out_of_memory": "mine"}
    assert peers.interrupts == ["mine"]


def test_a_peer_that_is_gone_for_another_reason_ends_the_run(prepare: Any, play: Any) -> None:
    peers = OtherNodes([None])
    with pytest.raises(UnavailableError, match="a peer is gone"):
        play(prepare(), UnavailableError("a peer is gone"), peers=peers)


def test_all_nodes_begin_with_what_the_first_one_found(prepare: Any, play: Any) -> None:
    prepared = prepare()
    found = recall_after_keeping(prepared, micro_batch_size=1).model_dump()
    peers = OtherNodes([found, {"out_of_memory": None}], rank=1)
    workers, _ = play(prepared, None, peers=peers)
    assert [plan.micro_batch_size for plan in workers.plans] == [1]
    assert peers.given[0] is None  # though it could read it, too


# What is remembered


def recall_after_keeping(prepared: Prepared, **values: object) -> MemoryFound:
    """Keep a changed plan, and return what is recalled of it."""
    changed = prepared.plan.model_copy(update=values)
    keep_memory_found(Handed(**{**vars(prepared), "plan": changed}))
    found = recall_memory_found(prepared)
    assert found is not None
    return found


def test_a_retry_starts_with_what_was_found(prepare: Any, play: Any) -> None:
    play(prepare(), OutOfMemoryError("one"), None)
    workers, done = play(prepare(), None)
    assert [plan.micro_batch_size for plan in workers.plans] == [2]
    assert done.plan.gradient_accumulation_steps == 4
    assert done.plan.sources["micro_batch_size"] == "an earlier start ran out of memory"
    assert done.plan.warnings[-1].endswith("starting with what it found, micro_batch_size 2")


def test_another_run_machine_engine_or_number_of_processes_is_left_aside(prepare: Any, machine: Any) -> None:
    prepared = prepare()
    recall_after_keeping(prepared, micro_batch_size=1)
    assert recall_memory_found(prepare()) is not None
    assert recall_memory_found(prepare(run_id="other")) is None
    assert recall_memory_found(prepare(hardware=machine(gpus=1))) is None
    assert recall_memory_found(prepare(PARALLEL__PROCESSES=2)) is None
    other = prepared.plan.model_copy(update={"engine": "zero3"})
    assert recall_memory_found(Handed(**{**vars(prepared), "plan": other})) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 1}', "\udcff"])
def test_a_broken_file_is_left_aside(
    prepare: Any, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "slot" / MEMORY
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert recall_memory_found(prepare()) is None
    assert "checkpoint/memory.json is of no use" in caplog.text


def test_a_slot_that_can_not_be_written_costs_a_warning(
    prepare: Any, play: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "slot").write_text("a file where the slot should be")
    _, done = play(prepare(), OutOfMemoryError("one"), None)
    assert done.plan.micro_batch_size == 2
    assert "can't be kept" in caplog.text


def test_a_plan_never_goes_up(plan_for: PlanFor) -> None:
    plan = plan_for(TRAIN__MICRO_BATCH_SIZE=2, TRAIN__GRADIENT_CHECKPOINTING="true", TRAIN__LOSS="chunked")
    found = {"run_id": "run", "device": "CPU", "engine": "ddp", "world_size": 1, "loss": "full"}
    higher = MemoryFound.model_validate(found | {"micro_batch_size": 4, "gradient_checkpointing": 0.0})
    assert apply_memory_found(plan, higher) is plan
    undividable = MemoryFound.model_validate(found | {"micro_batch_size": 3, "gradient_checkpointing": 1.0})
    bigger = plan_for(TRAIN__MICRO_BATCH_SIZE=4, TRAIN__LOSS="full")
    assert step_of(apply_memory_found(bigger, undividable)) == (4, 2, 1, "full")
    lowest = MemoryFound.model_validate(
        found | {"micro_batch_size": 1, "gradient_checkpointing": 1.0, "loss": "chunked"}
    )
    assert step_of(apply_memory_found(bigger, lowest)) == (1, 8, 1, "chunked")


@dataclass
class LostNode(OtherNodes):
    """The other node is lost when it is asked how its attempt has ended."""

    def exchange(self, value: Any) -> list[Any]:
        if not self.answers:
            raise UnavailableError("node 1 is gone")
        return super().exchange(value)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_node_lost_after_training_costs_no_adapter(prepare: Any, tmp_path: Path, is_trained: bool) -> None:
    prepared, folder = prepare(), RunFolder(tmp_path / "run")

    def attempt(_: Prepared) -> None:
        if is_trained:
            folder.trained.touch()

    if is_trained:
        assert train_within_memory(prepared, folder, LostNode([None]), attempt) is prepared
    else:
        with pytest.raises(UnavailableError, match="node 1 is gone"):
            train_within_memory(prepared, folder, LostNode([None]), attempt)
