"""A minimal task: only its two paths are real, so no child can train it."""

from __future__ import annotations

from pathlib import Path

from worker.trainer.protocol import Task


def task(base: Path, training: Path) -> Task:
    return Task(
        base_dir=str(base),
        base_name="acme/none",
        base_revision="1",
        training_file=str(training),
        validation_file=None,
        method={},
        lora={},
        quantization="none",
        trainer={},
        seed=0,
        max_row_bytes=1000,
    )
