"""The fallback levels of a run: what it changes, one step at a time, when memory runs out.

First fewer rows at a time, then activations recomputed in the backward pass, then no packing. Every level gives the
same gradient up to rounding, because a loss is divided by the tokens of its whole optimizer step. The planner counts
the levels and the trainer steps down through them; both call `fallback_levels`. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.estimation.defaults import PACK_LENGTH


@dataclass(frozen=True, slots=True)
class Level:
    """The settings of one level; `micro_batch` counts rows, packed ones if `packing`."""

    micro_batch: int
    checkpointing: bool
    packing: bool


def fallback_levels(widest: Level, *, longest: int, can_checkpoint: bool = True) -> list[Level]:
    """All levels from `widest` down. `longest` is the longest example in tokens.

    The micro-batch is halved down to one row. Then activations are recomputed, unless they are already or the model
    does not support it (`can_checkpoint`). A packed row is up to PACK_LENGTH tokens long even if every example is
    shorter; then one example without packing is the last level.
    """
    sizes = [widest.micro_batch >> i for i in range(widest.micro_batch.bit_length())]
    found = [Level(size, widest.checkpointing, widest.packing) for size in sizes]
    if can_checkpoint and not widest.checkpointing:
        found.append(Level(found[-1].micro_batch, True, widest.packing))
    if widest.packing and longest < PACK_LENGTH:
        found.append(Level(found[-1].micro_batch, found[-1].checkpointing, False))
    return found
