"""Confidence intervals for the difference of two scores on the same rows.

Owns: the paired bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). It is arithmetic
on arrays with a random generator of its own. Must not know about models.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
#: Ends of the interval: the middle 95 % of the resampled means.
QUANTILES = (0.025, 0.975)
#: Random indices drawn at a time: 8 MB, however many rows there are.
BLOCK = 2**20


def interval(
    sums: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean `sums.sum() / weights.sum()`, with both arrays (rows,).

    Each resample draws as many rows as there are, with replacement, and takes their sums and weights. Rows are
    resampled rather than tokens, because tokens of a row are not independent. None for a single row.
    """
    rows = len(sums)
    if rows < 2:
        return None
    generator = np.random.Generator(np.random.PCG64([seed, rows]))
    means = np.empty(resamples)
    size = max(1, BLOCK // rows)
    for start in range(0, resamples, size):
        drawn = generator.integers(rows, size=(min(size, resamples - start), rows))
        means[start : start + size] = sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(means, QUANTILES)
    return float(low), float(high)
