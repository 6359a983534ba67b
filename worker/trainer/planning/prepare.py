"""Check the dataset and resolve the recipe, before the job is queued for training: `prepare` → Plan.

Owns: the counts of a plan and its warnings. Must not load a model: it runs in seconds on a worker without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from shared.errors import TrainingFailed
from shared.estimation.defaults import CARVE_FROM_ROWS
from shared.estimation.fallback import Level, fallback_levels
from shared.estimation.memory_model import FULL_BYTES
from shared.schemas.results import Plan, Recipe
from worker.trainer.data import labels
from worker.trainer.data.dataset import Split, load, split
from worker.trainer.data.encoding import Encoder, longest_document
from worker.trainer.data.statistics import data_warnings, statistics
from worker.trainer.planning import exports, recipe, sizing
from worker.trainer.protocol import Task


def prepare(task: Task, *, tick: Callable[[], None] = lambda: None) -> Plan:
    """Plan a job. `tick` is called with each row that is read.

    Raises TrainingFailed: a file, a base or a setting that cannot be trained on, or a job that fits on no device.
    """
    base = recipe.read_traits(task.base_dir)
    recipe.check_method(task.method.type, base)
    if task.trainer.full_finetuning:
        _check_size(task)
    encoder = Encoder(task.base_dir)
    exports.check(task, encoder)
    dataset = load(task, encoder, tick=tick)
    classes = labels.find(dataset.train, dataset.validation) if task.method.type == "classification" else None
    longest = longest_document([*dataset.train, *(dataset.validation or [])])
    length = recipe.max_length(task.trainer, base, longest)
    rows = split(dataset, length, seed=task.seed)
    resolved, warnings = recipe.resolve(
        task.method,
        task.lora,
        task.trainer,
        task.quantization,
        seed=task.seed,
        base=base,
        size=recipe.Size(len(rows.train), longest, max(map(len, rows.train))),
        labels=classes,
    )
    sized = sizing.size(task, resolved, rows.train)
    apart = rows.heldout if rows.heldout_source != "training_file" else []
    found = statistics(dataset, encoder, max_length=length, train=rows.train, heldout=apart, classes=classes)
    return Plan(
        rows=len(dataset.train),
        heldout_rows=len(rows.heldout),
        tokens=sum(map(len, rows.train)),
        trained_tokens=sum(row.trained_tokens for row in rows.train),
        longest_row=longest,
        truncated_rows=rows.truncated,
        dropped_rows=rows.dropped,
        warnings=[
            *encoder.warnings(),
            *_row_warnings(rows, length),
            *data_warnings(found, dataset.validation_report, heldout_rows=len(rows.heldout)),
            *(labels.label_warnings(found.labels, rows.train) if classes else []),
            *warnings,
            *sized.warnings,
        ],
        recipe=sized.recipe,
        data=found,
        fit=sized.fit,
        fallback_levels=_fallback_levels(sized.recipe, longest=max(map(len, rows.train))),
    )


def _fallback_levels(recipe: Recipe, *, longest: int) -> int:
    widest = Level(recipe.micro_batch, bool(recipe.gradient_checkpointing), recipe.packing)
    return len(fallback_levels(widest, longest=longest))


def _check_size(task: Task) -> None:
    """Raises TrainingFailed if full fine-tuning of the base needs more memory than the server allows."""
    parameters, limit = task.base_parameters, task.full_finetuning_bytes
    if parameters is None or limit is None or FULL_BYTES * parameters <= limit:
        return
    raise TrainingFailed(
        f"full fine-tuning of this base needs {FULL_BYTES * parameters / 1e9:,.1f} GB, {FULL_BYTES} bytes for each of "
        f"its {parameters:,} parameters; this server allows {limit / 1e9:,.1f} GB",
        code="base_too_large",
        param="trainer.full_finetuning",
        hint=f"leave it out and train a LoRA, or choose a base of at most {limit // FULL_BYTES:,} parameters",
    )


def _row_warnings(rows: Split, length: int) -> list[str]:
    warnings = []
    if rows.truncated:
        warnings.append(f"{rows.truncated} rows are cut at {length:,} tokens (trainer.max_length)")
    if rows.dropped:
        warnings.append(f"{rows.dropped} rows are dropped: no trained token is left within {length:,} tokens")
    if rows.heldout_source == "training_file":
        warnings.append(
            f"with fewer than {CARVE_FROM_ROWS} rows none is held out: losses are measured on the training rows"
        )
    elif rows.dropped_heldout:
        warnings.append(f"{rows.dropped_heldout} rows of the validation file are dropped by the cut")
    return warnings
