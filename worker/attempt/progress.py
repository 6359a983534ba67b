"""How fast steps are trained, for the ETA on the job. Must not know rows."""

from __future__ import annotations

from typing import Any

from shared.schemas.results import Metrics


class Pace:
    """The mean time per step since this attempt's first step, evaluations and checkpoints included.

    Measured on this worker's own clock. Earlier attempts do not count towards the ETA of a resumed job.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._metrics: Metrics | None = None

    @property
    def step(self) -> int | None:
        """The last reported step, or None before the first."""
        return self._last[0] if self._last else None

    def add(self, metrics: Metrics, at: float) -> None:
        """Add a step or an evaluation that was received `at` (monotonic seconds)."""
        if self._last is None or metrics.step > self._last[0]:
            self._last = (metrics.step, at)
            self._first = self._first or self._last
        if metrics.tokens_per_second is not None or self._metrics is None:
            self._metrics = metrics

    def progress(self) -> dict[str, Any]:
        """Return the progress to store on the job row. Postgres adds the time: a worker's clock may be an hour off."""
        assert self._metrics is not None
        assert self._first is not None
        assert self._last is not None
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return {
            "step": self._metrics.step,
            "total_steps": self._metrics.total_steps,
            "tokens_per_second": self._metrics.tokens_per_second,
            "seconds_per_step": seconds / steps if steps else None,
        }
