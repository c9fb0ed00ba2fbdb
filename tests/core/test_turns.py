"""Who has a turn, and what is read ahead of it."""

from __future__ import annotations

import threading

import pytest

from hdb_core.train.ahead import AHEAD, read_ahead
from hdb_core.train.settings import MOST
from hdb_core.train.turns import RUN, RUNS, person_at, turns_of


@pytest.mark.parametrize("count", [1, 5, RUN, RUN + 1, RUN * RUNS, 3 * RUN * RUNS + 77])
def test_everybody_has_a_turn_before_anyone_has_another(count):
    epochs = [[person_at(epoch * count + place, count, 7) for place in range(count)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    if count > 1:
        assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1]
        assert epochs[0] != [person_at(place, count, 8) for place in range(count)]


def test_turns_near_each_other_read_few_runs_of_people():
    count = 5 * RUN * RUNS
    window = [person_at(place, count, 0) for place in range(RUN * RUNS)]
    runs = {person // RUN for person in window}
    assert len(runs) == RUNS and max(runs) - min(runs) > RUNS  # few of them, from everywhere
    assert {person // RUN for person in window[:200]} == runs  # and well mixed


def test_any_seed_that_settings_take():
    """A date, for example: the product with two large numbers was too long for torch."""
    for seed in (20_261_129, MOST):
        assert sorted(person_at(place, 5, seed) for place in range(5)) == list(range(5))


def test_steps_follow_each_other():
    counts, together = [2] * 50, [turn.person for turn in turns_of(0, [2] * 50, 48, 3)[0]]
    apart = [turn.person for step in range(6) for turn in turns_of(step, counts, 8, 3)[0]]
    assert apart == together


def test_items_are_read_ahead_and_come_in_order():
    done, lock = [], threading.Event()

    def read(item):
        done.append(item)
        if item == AHEAD:
            lock.set()
        return 2 * item

    items = read_ahead(read, range(20))
    assert next(items) == (0, 0)
    assert lock.wait(10)  # though nobody has asked for it yet
    assert list(items) == [(item, 2 * item) for item in range(1, 20)]


def test_what_cannot_be_read_is_an_error_at_its_turn():
    def read(item):
        if item == 2:
            raise OSError("gone")
        return item

    items = read_ahead(read, range(5))
    assert [next(items)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_a_training_that_ends_early_leaves_no_thread():
    before = threading.active_count()
    items = read_ahead(str, range(50))
    next(items)
    items.close()
    assert threading.active_count() == before
