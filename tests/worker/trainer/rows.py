"""Rows for tests: preferences as in a file, and encoded examples of given lengths."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from shared.estimation.defaults import PACK_LENGTH
from tests.worker.trainer.conftest import Rows
from worker.trainer.data.encoding import Encoded

lengths = st.lists(st.integers(2, 2 * PACK_LENGTH), min_size=1, max_size=40)


def examples_of(sizes: list[int]) -> list[Encoded]:
    generator = np.random.Generator(np.random.PCG64(len(sizes)))
    return [
        Encoded(i, generator.integers(0, 99, size).astype(np.int32), generator.random(size) < 0.7)
        for i, size in enumerate(sizes)
    ]


def preferences(count: int) -> Rows:
    """Preference rows in which a hat is always chosen over a cap."""
    return [
        {"prompt": f"Quote by N{i}: ", "chosen": "a felt hat" * (1 + i % 3), "rejected": "cap"} for i in range(count)
    ]
