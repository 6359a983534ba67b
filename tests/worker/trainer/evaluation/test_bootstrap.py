"""The interval equals the normal approximation for normal data, and contains the true value as often as it should."""

from __future__ import annotations

import numpy as np
import pytest

from worker.trainer.evaluation import bootstrap


def test_interval_of_normal_differences_equals_the_normal_approximation() -> None:
    generator = np.random.default_rng(1)
    sums = generator.normal(-0.3, 1.0, 1000)
    found = bootstrap.interval(sums, np.ones(1000, np.int64), seed=7)
    half = 1.96 * sums.std() / np.sqrt(1000)
    assert found == pytest.approx((sums.mean() - half, sums.mean() + half), abs=0.01)


def test_interval_contains_the_true_value_as_often_as_it_should() -> None:
    """Rows have different lengths and differences. 95 % are expected; with 50 rows somewhat fewer are allowed."""
    generator = np.random.default_rng(2)
    contained = 0
    for seed in range(200):
        weights = generator.integers(5, 60, 50)
        sums = weights * generator.normal(-0.3, 0.5, 50)
        low, high = bootstrap.interval(sums, weights, seed=seed, resamples=500) or (0.0, 0.0)
        contained += low <= -0.3 <= high
    assert 175 <= contained <= 199


def test_rows_are_weighted_by_their_tokens() -> None:
    """Long rows gain and short rows lose the same per token; long rows are three times as long, so the mean gains."""
    weights = np.array([30, 10] * 50)
    low, high = bootstrap.interval(np.array([-30.0, 10.0] * 50), weights, seed=0) or (0.0, 0.0)
    assert low < -0.5 < high < -0.2
    assert bootstrap.interval(-0.5 * weights, weights, seed=0) == (-0.5, -0.5)


def test_interval_of_equal_scores_is_zero() -> None:
    assert bootstrap.interval(np.zeros(9), np.arange(1, 10), seed=0) == (0.0, 0.0)


def test_one_row_has_no_interval() -> None:
    assert bootstrap.interval(np.array([-3.0]), np.array([7]), seed=0) is None


def test_interval_depends_on_the_seed_and_not_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, weights = np.random.default_rng(3).normal(size=40), np.full(40, 9)
    random_before = np.random.get_state(legacy=False)
    found = bootstrap.interval(sums, weights, seed=7)
    assert bootstrap.interval(sums, weights, seed=8) != found
    monkeypatch.setattr(bootstrap, "BLOCK", 40 * 7)
    assert bootstrap.interval(sums, weights, seed=7) == found
    assert str(np.random.get_state(legacy=False)) == str(random_before)
