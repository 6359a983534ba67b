"""The interval is the textbook's where the textbook has one, and holds the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from worker.trainer.evaluation import bootstrap


def test_interval_of_normal_differences_is_the_textbooks() -> None:
    generator = np.random.default_rng(1)
    sums = generator.normal(-0.3, 1.0, 1000)
    found = bootstrap.interval(sums, np.ones(1000, np.int64), seed=7)
    half = 1.96 * sums.std() / np.sqrt(1000)
    assert found == pytest.approx((sums.mean() - half, sums.mean() + half), abs=0.01)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Rows of different lengths, each with a difference of its own; 95 of 100 are meant, and 50 rows are not many."""
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        weights = generator.integers(5, 60, 50)
        sums = weights * generator.normal(-0.3, 0.5, 50)
        low, high = bootstrap.interval(sums, weights, seed=seed, resamples=500) or (0.0, 0.0)
        held += low <= -0.3 <= high
    assert 175 <= held <= 199


def test_rows_count_by_their_tokens() -> None:
    """A long row that gained and a short one that lost as much a token: the mean is the long one's, three to one."""
    weights = np.array([30, 10] * 50)
    low, high = bootstrap.interval(np.array([-30.0, 10.0] * 50), weights, seed=0) or (0.0, 0.0)
    assert low < -0.5 < high < -0.2
    assert bootstrap.interval(-0.5 * weights, weights, seed=0) == (-0.5, -0.5)


def test_equal_scores_have_an_interval_of_nothing() -> None:
    assert bootstrap.interval(np.zeros(9), np.arange(1, 10), seed=0) == (0.0, 0.0)


def test_one_row_has_no_interval() -> None:
    assert bootstrap.interval(np.array([-3.0]), np.array([7]), seed=0) is None


def test_interval_is_a_function_of_its_seed_and_not_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, weights = np.random.default_rng(3).normal(size=40), np.full(40, 9)
    random_before = np.random.get_state(legacy=False)
    found = bootstrap.interval(sums, weights, seed=7)
    assert bootstrap.interval(sums, weights, seed=8) != found
    monkeypatch.setattr(bootstrap, "BLOCK", 40 * 7)
    assert bootstrap.interval(sums, weights, seed=7) == found
    assert str(np.random.get_state(legacy=False)) == str(random_before)
