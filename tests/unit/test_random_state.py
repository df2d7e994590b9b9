"""The state of random number generators survives its way into a checkpoint and back."""

import random

import numpy as np
import torch

from job.train.random_state import read_random_state, restore_random_state, seed_anew


def draw() -> list[float]:
    """Draw from every generator; the normal numbers come in pairs, of which one is left over."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.normal()), float(np.random.random())]
    return [*numbers, *torch.rand(2).tolist(), torch.randn(1).item()]


def test_the_same_numbers_follow() -> None:
    seed_anew(1, 2, 3)
    draw()
    states = {name: state.clone() for name, state in read_random_state("cpu").items()}
    assert all(state.dtype == torch.uint8 for state in states.values())
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    restore_random_state(states)
    assert [draw(), draw()] == expected


def test_states_are_as_long_with_a_number_left_over_as_without() -> None:
    seed_anew(1, 2, 3)
    before = read_random_state("cpu")
    draw()
    after = read_random_state("cpu")
    assert {name: len(state) for name, state in before.items()} == {name: len(state) for name, state in after.items()}


def test_a_new_seed_is_each_rank_and_steps_own() -> None:
    drawn = []
    for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)):
        seed_anew(*key)
        drawn.append(tuple(draw()))
    assert len(set(drawn)) == 4
    seed_anew(1, 2, 3)
    assert tuple(draw()) == drawn[0]
