"""The search for the tilt by which a budget is divided."""

import pytest

from bayesprune.prune.channels.calibrated import best_tilt


@pytest.mark.parametrize(("lowest", "expected"), [(1.8, 2), (-1.2, -1), (0.2, 0), (9, 3), (-9, -3)])
def test_the_tilt_is_found_on_either_side(lowest, expected):
    tried = []

    def loss(tilt: float) -> float:
        tried.append(tilt)
        return (tilt - lowest) ** 2

    assert best_tilt(loss) == expected
    assert len(tried) == len(set(tried)) <= 7


def test_a_step_up_that_does_not_pay_hides_no_better_one():
    losses = {0: 0.343, 1: 0.349, 2: 0.31, 3: 0.30}
    assert best_tilt(lambda tilt: losses[int(tilt)]) == 3


def test_a_tilt_that_changes_nothing_is_none():
    assert best_tilt(lambda tilt: 1.0) == 0
