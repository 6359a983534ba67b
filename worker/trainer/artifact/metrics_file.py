"""Read and write metrics.jsonl: one JSON object on a line, for each step and each evaluation."""

from __future__ import annotations

from pathlib import Path

from shared.schemas.results import Metrics

METRICS = "metrics.jsonl"


def write_metrics(path: Path, metrics: list[Metrics]) -> None:
    path.write_text("".join(m.model_dump_json(exclude_none=True) + "\n" for m in metrics), encoding="utf-8")


def read_metrics(path: Path) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
