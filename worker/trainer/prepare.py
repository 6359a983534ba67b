"""The dataset checked and the recipe resolved, before any worker is held: `prepare` → Plan.

Owns: what is counted and warned of. Must not import torch's models: it runs on a worker that has no GPU, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import TrainingFailed
from shared.protocol import Task
from shared.schemas import Plan
from worker.trainer import data, recipe
from worker.trainer.encoding import Encoded, Encoder


@dataclass(frozen=True, slots=True)
class Rows:
    """What is trained on and what is scored, cut to the recipe's length; and what the cut cost."""

    train: list[Encoded]
    heldout: list[Encoded]
    heldout_source: data.HeldoutSource
    truncated: int
    dropped: int
    dropped_heldout: int


def prepare(task: Task) -> Plan:
    """Raises TrainingFailed for a file or a setting that cannot be trained on."""
    base = recipe.architecture(task.base_dir)
    dataset = data.load(task, Encoder(task.base_dir))
    longest = max(map(len, [*dataset.train, *dataset.heldout]))
    length = recipe.max_length(task.trainer, base, longest)
    rows = usable(dataset, length)
    resolved, warnings = recipe.resolve(
        task.hyperparameters,
        task.lora,
        task.trainer,
        task.quantization,
        seed=task.seed,
        base=base,
        size=recipe.Size(len(rows.train), longest),
    )
    return Plan(
        rows=dataset.rows,
        heldout_rows=len(rows.heldout),
        tokens=sum(map(len, rows.train)),
        trained_tokens=sum(row.trained_tokens for row in rows.train),
        longest_row=longest,
        truncated_rows=rows.truncated,
        dropped_rows=rows.dropped,
        warnings=[*_row_warnings(rows, length), *warnings],
        recipe=resolved,
    )


def usable(dataset: data.Dataset, max_length: int) -> Rows:
    """The rows that survive the cut. Raises TrainingFailed where none does."""
    train, heldout = data.fit(dataset.train, max_length), data.fit(dataset.heldout, max_length)
    for fitted, param in ((train, "training_file"), (heldout, "validation_file")):
        if not fitted.kept:
            raise TrainingFailed(
                f"no row has a trained token within its first {max_length:,} tokens",
                code=f"invalid_{param}",
                param=param,
                hint="raise trainer.max_length, or shorten what comes before the answers",
            )
    return Rows(train.kept, heldout.kept, dataset.heldout_source, train.truncated, train.dropped, heldout.dropped)


def _row_warnings(rows: Rows, length: int) -> list[str]:
    warnings = []
    if rows.truncated:
        warnings.append(f"{rows.truncated} rows are cut at {length:,} tokens (trainer.max_length)")
    if rows.dropped:
        warnings.append(f"{rows.dropped} rows are dropped: nothing trained is left within {length:,} tokens")
    if rows.heldout_source == "training_file":
        warnings.append(
            f"under {data.CARVE_FROM_ROWS} rows none is held out: losses are measured on the training rows themselves"
        )
    elif rows.dropped_heldout:
        warnings.append(f"{rows.dropped_heldout} held-out rows are dropped by the cut")
    return warnings
