"""The way down when memory runs out: fewer rows at a time, then activations computed anew, then no packing.

Owns: the rungs. Every rung gives the same gradient but for rounding, because
a loss is divided by the tokens of its whole optimizer step. Must not know about steps or checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

from shared.estimation.defaults import PACK_LENGTH
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base


def rungs(widest: Layout, base: Base, *, longest: int) -> list[Layout]:
    """From the widest layout down: each halves a micro-batch. `longest` counts the tokens of an example.

    Then, if the base knows how, activations are no longer kept. Packed, the narrowest holds up to PACK_LENGTH tokens;
    where every example is shorter, one alone is the last resort.
    """
    sizes = [widest.micro_batch >> i for i in range(widest.micro_batch.bit_length())]
    found = [replace(widest, micro_batch=size, lanes=min(widest.lanes, size)) for size in sizes]
    if base.model.supports_gradient_checkpointing and not widest.checkpointing:
        found.append(replace(found[-1], checkpointing=True))
    if widest.packing and longest < PACK_LENGTH:
        found.append(replace(found[-1], packing=False))
    return found


def difference(wider: Layout, narrower: Layout) -> str:
    """What a step down changes, in the words of an event."""
    if wider.packing and not narrower.packing:
        return "rows hold one example each, unpacked"
    if wider.checkpointing != narrower.checkpointing:
        return "activations are computed anew in backward"
    return f"micro-batch {wider.micro_batch} → {narrower.micro_batch}"
