"""Which sets are under way when, and by which weights."""

from __future__ import annotations

import threading

import pytest

from rl.ahead import Ahead, ScheduleConfig

WAIT = 20.0


class Drawn:
    """Notes what is drawn; a set is done when it is let go."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.changed = threading.Condition()
        self.held = threading.Event()
        self.held.set()

    def __call__(self, step: int, weights: str) -> int:
        with self.changed:
            self.asked.append((step, weights))
            self.changed.notify_all()
        assert self.held.wait(WAIT)
        return step

    def wait_for(self, count: int) -> list[tuple[int, str]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, WAIT)
            return sorted(self.asked)


def train(ahead: int, steps: int) -> tuple[list[int], list[tuple[int, str]]]:
    drawn = Drawn()
    sets = Ahead(drawn, ahead + 1 if ahead else 0, 0, steps)
    taken = [sets.take(step, step + ahead, f"v{step}") for step in range(steps)]
    sets.close()
    return taken, sorted(drawn.asked)


def test_in_sync_a_set_is_drawn_by_the_weights_before_it_and_no_thread_is_used():
    before = threading.active_count()
    taken, asked = train(0, 3)
    assert taken == [0, 1, 2]
    assert asked == [(0, "v0"), (1, "v1"), (2, "v2")]
    assert threading.active_count() == before


def test_one_step_ahead_every_set_but_the_first_is_one_version_old():
    taken, asked = train(1, 4)
    assert taken == [0, 1, 2, 3]
    assert asked == [(0, "v0"), (1, "v0"), (2, "v1"), (3, "v2")]


@pytest.mark.parametrize("ahead", [2, 3])
def test_further_ahead_no_set_is_older_than_allowed_and_none_is_drawn_twice(ahead: int):
    taken, asked = train(ahead, 7)
    assert taken == list(range(7))
    assert [step for step, _ in asked] == list(range(7))
    assert [step - int(weights[1:]) for step, weights in asked] == [
        min(step, ahead) for step in range(7)
    ]


def test_the_next_set_is_under_way_while_one_trains():
    drawn = Drawn()
    sets = Ahead(drawn, 2, 0, 5)
    sets.take(0, 1, "v0")
    drawn.held.clear()
    assert drawn.wait_for(2) == [(0, "v0"), (1, "v0")]  # set 0 trains now
    drawn.held.set()
    assert sets.take(1, 2, "v1") == 1
    sets.close()


def test_a_set_that_older_weights_shall_draw_is_begun_with_them():
    drawn = Drawn()
    sets = Ahead(drawn, 2, 3, 6)
    sets.start(3, "v2")
    assert sets.take(3, 4, "v3") == 3
    assert drawn.wait_for(2) == [(3, "v2"), (4, "v3")]
    sets.close()


def test_an_error_of_a_set_is_raised_where_it_is_taken():
    def fail(step: int, weights: str) -> int:
        raise ValueError(f"set {step}")

    sets = Ahead(fail, 2, 0, 3)
    with pytest.raises(ValueError, match="set 0"):
        sets.take(0, 1, "v0")
    sets.close()


def test_modes_say_how_far_they_run_ahead():
    modes = {mode: ScheduleConfig(mode=mode) for mode in ("sync", "one_step_ahead", "async")}
    assert {mode: config.ahead for mode, config in modes.items()} == {
        "sync": 0, "one_step_ahead": 1, "async": 2
    }  # fmt: skip
    assert ScheduleConfig(mode="async", max_staleness=5).ahead == 5
    assert [config.pinned for config in modes.values()] == [True, True, False]
    assert [config.stale for config in modes.values()] == [False, True, True]


def test_parts_of_a_set_are_under_way_together_and_never_those_of_the_next():
    config = ScheduleConfig(parts=4)
    assert config.threads == 4
    assert [config.until(number) for number in range(9)] == [3, 3, 3, 3, 7, 7, 7, 7, 11]
    assert [ScheduleConfig(mode="async").until(number) for number in range(3)] == [2, 3, 4]
    assert [ScheduleConfig().until(number) for number in range(3)] == [0, 1, 2]
