"""Check on the job's own rows, before training, which shortcuts give exact results on this base.

Owns: two shortcuts that are exact on common architectures and silently wrong on unusual ones: packing, and running the
head separately from the backbone. Must not change the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.estimation import defaults
from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Encoded, Encoder, Row
from worker.trainer.data.packing import packed_row_tokens
from worker.trainer.forward import threads
from worker.trainer.forward.batches import Batch, collate
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import backbone, head, own_logits
from worker.trainer.model.base import Base

#: Allowed relative error of the logits from the separate head, over all tokens.
TOLERANCE = 0.1
#: Allowed relative error of each token's logits, packed against alone: above rounding in the compute type. The worst
#: token of SmolLM2-135M has 4e-6 in fp32, 0.04 in bf16, 0.08 in bf16 on an nf4 base; wrong positions give 0.8.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25}
#: The same for LLM.int8(), which picks outlier columns over the whole batch: logits depend on the other rows, by 0.08
#: to 0.2.
TOLERANCE_INT8 = 0.4
#: The check runs on so many rows, cut to so many tokens.
TRIED_ROWS = 4
TRIED_TOKENS = 256


def layout_of(recipe: Recipe, base: Base, rows: Sequence[Row], encoder: Encoder) -> tuple[Layout, list[str]]:
    """Call `layout` with the recipe's settings. Training and proof both use it, so that their scores are comparable."""
    return layout(
        base,
        rows,
        packing=recipe.packing,
        micro_batch=recipe.micro_batch,
        pad=encoder.eos if recipe.labels is None else encoder.pad,
        lanes=threads.thread_limit(base, recipe),
        checkpointing=recipe.gradient_checkpointing,
    )


def layout(
    base: Base,
    rows: Sequence[Row],
    *,
    packing: bool,
    micro_batch: int,
    pad: int,
    lanes: int = 1,
    checkpointing: bool | None = None,
) -> tuple[Layout, list[str]]:
    """Find the fastest layout that gives exact results; return it with a warning for each shortcut that does not.

    A classifier uses neither shortcut: its rows are padded, and its head reads a single position of a row.
    `checkpointing` comes from the recipe; None means on for a GPU and off for a CPU, where time is scarcer than memory.
    """
    if checkpointing is None:
        checkpointing = defaults.checkpointing(base.device.type)
    checkpointing = checkpointing and base.model.supports_gradient_checkpointing
    if base.head:
        plain = Layout(
            packing=False, chunked=False, micro_batch=micro_batch, pad=pad, lanes=lanes, checkpointing=checkpointing
        )
        return plain, []
    tried = [document.cut(TRIED_TOKENS) for row in rows[:TRIED_ROWS] for document in row.documents]
    warnings = []
    base.model.eval()
    with torch.no_grad(), base.precision():
        chunked = _chunked_head_is_exact(base, tried[0])
        if not chunked:
            warnings.append(
                "this base's head does more than a projection: all logits are computed at once, which needs more memory"
            )
        if packing and not _packing_is_exact(base, tried):
            packing = False
            warnings.append("this base's attention leaks between documents of a packed row: rows are padded instead")
    base.model.train()
    found = Layout(
        packing=packing,
        chunked=chunked,
        micro_batch=micro_batch,
        pad=pad,
        row=packed_row_tokens(rows),
        lanes=lanes,
        checkpointing=checkpointing,
    )
    return found, warnings


def _chunked_head_is_exact(base: Base, row: Encoded) -> bool:
    batch = _batch(base, [row], packing=False)
    try:
        to_logits = head(base.model)
        logits = to_logits.projection(backbone(base.model, batch)).float()
    except (AttributeError, TypeError):
        return False
    to_logits.apply_in_place(logits)
    return _error(logits, own_logits(base.model, batch)) < TOLERANCE


def _packing_is_exact(base: Base, rows: Sequence[Encoded]) -> bool:
    """Check that documents packed behind another one get the same logits as alone.

    The second check replaces the first document by another of the same length: the logits of the rest must stay the
    same, bit for bit. It finds leaks that are smaller than rounding, because the shapes are equal.
    """
    first, *others = rows if len(rows) > 1 else [*rows, *rows]
    packed = own_logits(base.model, _batch(base, [first, *others], packing=True))[0, len(first) :]
    alone = torch.cat([own_logits(base.model, _batch(base, [row], packing=False))[0] for row in others])
    if getattr(base.model, "is_loaded_in_8bit", False):
        return _error(packed, alone) < TOLERANCE_INT8
    replaced = Encoded(first.line, first.ids[::-1] // 2, first.trained)
    again = own_logits(base.model, _batch(base, [replaced, *others], packing=True))[0, len(first) :]
    errors = (packed - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    return torch.equal(packed, again) and float(errors.max()) < TOLERANCES[base.compute_dtype]


def _batch(base: Base, rows: Sequence[Encoded], *, packing: bool) -> Batch:
    return collate([list(rows)], packing=packing, pad=0).to(base.device)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm())
