"""How sure a difference is, from the rows that it was measured on.

Owns: the paired bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Pure arithmetic
on arrays, with a generator of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
#: The middle 95 % of the resampled means.
QUANTILES = (0.025, 0.975)
#: Numbers drawn at once: 8 MB of them, however many rows there are.
BLOCK = 2**20


def interval(
    sums: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % percentile interval of `sums.sum() / weights.sum()`, both (rows,), had other rows been drawn.

    Rows are drawn with replacement, as many as there are, and each brings its sum and its weight: tokens of a row are
    not independent of each other, rows are. None for a single row, which can be drawn in one way only.
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
