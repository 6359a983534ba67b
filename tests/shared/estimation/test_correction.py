"""Measured peaks of earlier runs correct the prediction of the next."""

from __future__ import annotations

import pytest

from shared.estimation.correction import corrected, correction
from shared.schemas.memory import Weighing


def weighing(computed: int, measured: int) -> Weighing:
    return Weighing(computed_bytes=computed, measured_bytes=measured)


def test_without_measurements_the_computed_peak_stays() -> None:
    assert corrected([], 12_345) == 12_345


def test_a_repeated_run_is_predicted_to_take_what_was_measured() -> None:
    runs = [weighing(1_000, 900), weighing(5_000, 5_100), weighing(20_000, 23_000)]
    assert [corrected(runs, run.computed_bytes) for run in runs] == [900, 5_100, 23_000]


def test_the_nearest_run_counts_and_of_equally_near_runs_the_newest() -> None:
    runs = [weighing(1_000, 1_100), weighing(1_000, 900), weighing(9_000, 9_900)]
    assert correction(runs, 2_000) == pytest.approx(1.1)
    assert correction(runs[1:], 4_000) == pytest.approx(0.9)
    assert correction(runs[1:], 6_000) == pytest.approx(1.1)


@pytest.mark.parametrize("measured", [10_000, 1])
def test_an_implausible_measurement_is_ignored(measured: int) -> None:
    assert correction([weighing(1_000, measured)], 1_000) == 1.0
    assert correction([weighing(1_000, measured), weighing(9_000, 9_900)], 1_000) == pytest.approx(1.1)
