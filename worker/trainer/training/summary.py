"""Describe a run: its settings as events at the start, and its report at the end.

Must not decide anything: it only describes numbers that other modules chose or measured.
"""

from __future__ import annotations

import traceback

import numpy as np

from shared.schemas.results import Recipe, Report, Sample
from worker.trainer.data.dataset import Split
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import report as reports
from worker.trainer.evaluation import samples
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import Adapted
from worker.trainer.system import free_memory
from worker.trainer.system.resource_errors import is_out_of_memory
from worker.trainer.training.memory_account import measured
from worker.trainer.training.run import Run


def decisions(recipe: Recipe, rows: Split, base: Base, adapted: Adapted, layout: Layout) -> list[str]:
    """Every setting of the run, with the numbers that "auto" was resolved to; one message for each event."""
    trainable, total = adapted.get_nb_trainable_parameters()
    plus = "" if recipe.loraplus_lr_ratio is None else f" ({recipe.loraplus_lr_ratio:g} times that for B)"
    shape = f"LoRA r={recipe.r} alpha={recipe.alpha:g} on {recipe.target_modules}"
    what = "all weights" if recipe.full_finetuning else shape
    labels = recipe.labels or []
    head = f"{len(labels)} labels; the head ({', '.join(base.head)}) is trained in full; rows are never packed"
    return [
        f"{len(rows.train)} training rows, {len(rows.heldout)} held-out rows ({rows.heldout_source}); "
        f"{recipe.total_steps} steps of {recipe.batch_size} examples over {recipe.n_epochs} epochs",
        f"training {what}: {trainable:,} of {total:,} parameters; "
        f"learning rate {recipe.learning_rate:.2e}{plus}, {recipe.schedule}, {recipe.warmup_steps} warm-up steps",
        f"base in {recipe.quantization.value} on {base.device.type}, computing in "
        f"{str(base.compute_dtype).removeprefix('torch.')}; {_micro_batches(recipe, layout)}",
        *([head] if labels else []),
    ]


def report(run: Run, encoder: Encoder, tuned: RowScores) -> Report:
    """Make the report of a finished run: base against tuned model, samples, cost and memory."""
    state = run.state
    assert state.base is not None
    start = None
    if state.start is not None:
        start = RowScores(state.start, np.array(state.start_nats, np.float32), tuned.weights)
    kept = state.best_step if run.best is not None else state.step
    found = reports.make(
        run.base,
        run.adapted,
        run.recipe,
        run.rows,
        before=RowScores(state.base, np.array(state.base_nats, np.float32), tuned.weights),
        start=start,
        after=tuned,
        samples=_samples(run, encoder),
        steps=state.step,
        kept_step=state.step if kept is None else kept,
        trained_tokens=state.trained_tokens,
        seconds=state.seconds,
        fit=measured(run.account, run.base.device, run.rows.train, run.recipe, run.layout),
    )
    run.log(f"held-out loss {found.base.loss:.4f} → {found.tuned.loss:.4f}: {found.change.verdict.value}")
    if found.start is not None and found.start_change is not None:
        verdict = found.start_change.verdict.value
        run.log(f"held-out loss of the adapter that training started from: {found.start.loss:.4f}: {verdict}")
    return found


def _samples(run: Run, encoder: Encoder) -> list[Sample]:
    """Samples by base and tuned model. If that fails there are none, and a warning: training and scores are done."""
    try:
        answers = [row.documents[0] for row in run.rows.heldout]
        if run.recipe.labels is not None:
            return samples.classified(run.base, run.adapted, answers, encoder, labels=run.recipe.labels)
        return samples.compare(run.base, run.adapted, answers, encoder, layout=run.layout, stopping=run.stopping)
    except Interrupted:
        raise
    except Exception as error:
        traceback.print_exc()
        memory = is_out_of_memory(error)
        reason = "out of memory while generating them" if memory else f"{type(error).__name__}: {error}"
    free_memory.free()
    run.log(f"no samples in the report: {reason}", "warn")
    return []


def _micro_batches(recipe: Recipe, layout: Layout) -> str:
    if layout.packing:
        tokens = layout.micro_batch // layout.lanes * layout.lanes * layout.row
        return f"rows packed, at most {tokens:,} tokens at a time"
    return f"rows padded, {layout.micro_batch} at a time, at most {recipe.max_length} tokens each"
