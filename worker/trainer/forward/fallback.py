"""The fallback levels as layouts for a base. The levels themselves are defined in `shared/estimation/fallback.py`."""

from __future__ import annotations

from dataclasses import replace

from shared.estimation.fallback import Level, fallback_levels
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base


def levels(widest: Layout, base: Base, *, longest: int) -> list[Layout]:
    """All layouts, from `widest` to the one that needs the least memory. `longest` is the longest example in tokens."""
    found = fallback_levels(
        Level(widest.micro_batch, widest.checkpointing, widest.packing),
        longest=longest,
        can_checkpoint=base.model.supports_gradient_checkpointing,
    )
    return [
        replace(
            widest,
            micro_batch=level.micro_batch,
            lanes=min(widest.lanes, level.micro_batch),
            checkpointing=level.checkpointing,
            packing=level.packing,
        )
        for level in found
    ]


def difference(wider: Layout, narrower: Layout) -> str:
    """Describe what changes from one level to the next lower one, as part of an event's message."""
    if wider.packing and not narrower.packing:
        return "one example a row, without packing"
    if wider.checkpointing != narrower.checkpointing:
        return "activations are recomputed in the backward pass"
    return f"micro-batch {wider.micro_batch} → {narrower.micro_batch}"
