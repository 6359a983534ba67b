"""What a run is about to do, in the words of its events: every number that "auto" came to.

Must not decide anything.
"""

from __future__ import annotations

from shared.schemas.results import Recipe
from worker.trainer.data.dataset import Split
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import Adapted


def lines(recipe: Recipe, rows: Split, base: Base, adapted: Adapted, layout: Layout) -> list[str]:
    """One an event."""
    trainable, total = adapted.get_nb_trainable_parameters()
    plus = "" if recipe.loraplus_lr_ratio is None else f" ({recipe.loraplus_lr_ratio:g} times that for B)"
    shape = f"LoRA r={recipe.r} alpha={recipe.alpha:g} on {recipe.target_modules}"
    what = "all weights" if recipe.full_finetuning else shape
    labels = recipe.labels or []
    head = f"{len(labels)} labels, from {', '.join(base.head)}: trained in full; such rows are never packed"
    return [
        f"{len(rows.train)} rows train, {len(rows.heldout)} are held out ({rows.heldout_source}); "
        f"{recipe.total_steps} steps of {recipe.batch_size} examples over {recipe.n_epochs} epochs",
        f"{what}: {trainable:,} of {total:,} parameters; "
        f"rate {recipe.learning_rate:.2e}{plus}, {recipe.schedule}, {recipe.warmup_steps} warm-up steps",
        f"base in {recipe.quantization.value} on {base.device.type}, computing in "
        f"{str(base.compute_dtype).removeprefix('torch.')}; {_held(recipe, layout)}",
        *([head] if labels else []),
    ]


def _held(recipe: Recipe, layout: Layout) -> str:
    if layout.packing:
        tokens = layout.micro_batch // layout.lanes * layout.lanes * layout.row
        return f"rows packed, at most {tokens:,} tokens at a time"
    return f"rows padded, {layout.micro_batch} at a time, at most {recipe.max_length} tokens each"
