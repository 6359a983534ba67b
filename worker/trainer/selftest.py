"""What a base can bear, tried on the job's own rows before a step is spent.

Owns: the two shortcuts that are exact on known architectures and silently wrong on odd ones: packing, and running the
head apart from the backbone. Must only read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.trainer.batches import Batch, collate
from worker.trainer.encoding import Encoded
from worker.trainer.methods import sft
from worker.trainer.model import Base

#: Relative error of logits. Measured with SmolLM2-135M: bf16 rounding gives 0.0X, documents that see each other 0.Y.
TOLERANCE = 0.08
TRIED_ROWS = 3
TRIED_TOKENS = 256


def layout(
    base: Base, rows: Sequence[Encoded], *, packing: bool, micro_batch: int, pad: int
) -> tuple[sft.Layout, list[str]]:
    """The fastest layout that gives the right numbers, and a warning for each shortcut that had to be given up."""
    tried = [_cut(row) for row in sorted(rows, key=lambda row: (len(row), row.line))[-TRIED_ROWS:]]
    warnings = []
    base.model.eval()
    with torch.no_grad(), base.precision():
        chunked = _chunked_head_is_exact(base, tried[0])
        if not chunked:
            warnings.append("this base's head does more than a projection: logits are taken whole, which needs memory")
        if packing and not _packing_is_exact(base, tried, pad):
            packing = False
            warnings.append("packed rows leak into each other with this base's attention: rows are padded instead")
    base.model.train()
    return sft.Layout(packing=packing, chunked=chunked, micro_batch=micro_batch, pad=pad), warnings


def _chunked_head_is_exact(base: Base, row: Encoded) -> bool:
    batch = _batch(base, [row], packing=False)
    try:
        ours = sft.head(base.model)(sft.backbone(base.model, batch))
    except (AttributeError, TypeError):
        return False
    return _error(ours, sft.own_logits(base.model, batch)) < TOLERANCE


def _packing_is_exact(base: Base, rows: Sequence[Encoded], pad: int) -> bool:
    packed = sft.own_logits(base.model, _batch(base, rows, packing=True))[0]
    start = 0
    for row in rows:
        alone = sft.own_logits(base.model, _batch(base, [row], packing=False))[0]
        if not _error(packed[start : start + len(row)], alone) < TOLERANCE:
            return False
        start += len(row)
    return True


def _batch(base: Base, rows: Sequence[Encoded], *, packing: bool) -> Batch:
    return collate([list(rows)], packing=packing, pad=0).to(base.device)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm())


def _cut(row: Encoded) -> Encoded:
    return Encoded(row.line, row.ids[:TRIED_TOKENS], row.trained[:TRIED_TOKENS])
