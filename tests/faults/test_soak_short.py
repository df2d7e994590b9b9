"""A few rounds of the soak: jobs that are killed amid faults, and started again, end in one whole and equal adapter."""

from collections import Counter
from signal import SIGKILL, SIGTERM

from soak import soak
from soak_rounds import CONFIGURATIONS, ZERO2, Kill, Moment, Round, Start, draw_round

SEED = 1


def test_rounds_follow_from_the_seed() -> None:
    assert [draw_round(SEED, number) for number in range(20)] == [draw_round(SEED, number) for number in range(20)]
    assert draw_round(SEED, 1) != draw_round(SEED, 2)
    assert draw_round(SEED, 1) != draw_round(SEED + 1, 1)


def test_all_that_can_happen_is_drawn() -> None:
    rounds = [draw_round(SEED, number) for number in range(200)]
    kills = [start.kill for one in rounds for start in one.starts if start.kill is not None]
    assert {one.configuration for one in rounds} == set(CONFIGURATIONS)
    assert {kill.victim for kill in kills} == {"parent", "launcher", "worker", "all"}
    assert min(Counter(kill.number for kill in kills).values()) > len(kills) / 3
    assert {start.on_fresh_disk for one in rounds for start in one.starts} == {True, False}
    assert all(one.starts[-1].kill is None for one in rounds)


def test_a_few_rounds() -> None:
    """One of them strikes for certain in the middle of training; the others are drawn."""
    certain = Round(
        0,
        ZERO2,
        (
            Start(on_fresh_disk=True, kill=Kill("worker", SIGKILL, Moment(line="step 8/")), faults=()),
            Start(on_fresh_disk=True, kill=Kill("parent", SIGTERM, Moment(line="step 15/")), faults=()),
            Start(on_fresh_disk=False, kill=None, faults=()),
        ),
    )
    results = soak([certain, draw_round(SEED, 1), draw_round(SEED, 2)], seed=SEED, jobs=2)
    assert [violation for result in results for violation in result.violations] == []
    assert all(result.finished and result.equal for result in results)
    assert results[0].codes == [70, 75, 0, 0]
    assert [kill.phase for kill in results[0].kills] == ["training: steps"] * 2
    assert results[0].lost[1].steps == 0  # SIGTERM leaves a checkpoint of the last step
