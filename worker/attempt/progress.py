"""How fast steps come, for the ETA on the job. Must not know rows."""

from __future__ import annotations

from typing import Any

from shared.schemas.results import Metrics


class Pace:
    """The mean since this attempt's first step, evaluations and checkpoints included, on its own clock.

    A resumed job's ETA owes nothing to the attempts before.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._metrics: Metrics | None = None

    @property
    def step(self) -> int | None:
        """The last step that was heard of."""
        return self._last[0] if self._last else None

    def note(self, metrics: Metrics, at: float) -> None:
        """A step, or an evaluation, was heard of `at` (monotonic seconds)."""
        if self._last is None or metrics.step > self._last[0]:
            self._last = (metrics.step, at)
            self._first = self._first or self._last
        if metrics.tokens_per_second is not None or self._metrics is None:
            self._metrics = metrics

    def progress(self) -> dict[str, Any]:
        """What the job row keeps. When that was is Postgres's to say: a worker's clock may be an hour off."""
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
