"""How fast steps come, for the ETA on the job. Must not know rows."""

from __future__ import annotations

import time
from typing import Any

from shared.schemas import Metrics


class Pace:
    """Kept on this attempt's clock: a resumed job's ETA owes nothing to the attempts before."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None
        self._metrics: Metrics | None = None

    @property
    def step(self) -> int | None:
        """The last step that was heard of."""
        return self._last[0] if self._last else None

    def note(self, metrics: Metrics) -> None:
        """A step, or an evaluation, was heard of now."""
        now = time.monotonic()
        if self._last is not None and metrics.step > self._last[0]:
            per_step = (now - self._last[1]) / (metrics.step - self._last[0])
            old = self._seconds_per_step
            self._seconds_per_step = per_step if old is None else 0.8 * old + 0.2 * per_step
        if self._last is None or metrics.step > self._last[0]:
            self._last = (metrics.step, now)
        if metrics.tokens_per_second is not None or self._metrics is None:
            self._metrics = metrics

    def progress(self) -> dict[str, Any]:
        """What the job row keeps. When that was is Postgres's to say: a worker's clock may be an hour off."""
        assert self._metrics is not None
        return {
            "step": self._metrics.step,
            "total_steps": self._metrics.total_steps,
            "tokens_per_second": self._metrics.tokens_per_second,
            "seconds_per_step": self._seconds_per_step,
        }
