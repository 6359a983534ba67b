"""What a base can bear, tried on the job's own rows before a step is spent.

Owns: the two shortcuts that are exact on known architectures and silently wrong on odd ones: packing, and running the
head apart from the backbone. Must only read.
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

#: Relative error of the head's logits, over all tokens.
TOLERANCE = 0.1
#: Relative error of each token's logits, packed against solo: what rounding in the compute type comes to, and more. The
#: worst token of SmolLM2-135M has 4e-6 in fp32, 0.04 in bf16, 0.08 in bf16 on an nf4 base; wrong positions give 0.8.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25}
#: LLM.int8() picks its outlier columns over the whole batch, so its logits depend on the company: 0.08 to 0.2.
TOLERANCE_INT8 = 0.4
TRIED_ROWS = 4
TRIED_TOKENS = 256


def layout_of(recipe: Recipe, base: Base, rows: Sequence[Row], encoder: Encoder) -> tuple[Layout, list[str]]:
    """What a run and its proof share, or the one would not find the other's numbers: `layout` for this recipe."""
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
    """The fastest layout that gives the right numbers, and a warning for each shortcut that had to be given up.

    A classifier takes none: it reads a row off at one position, and its rows are padded. `checkpointing` is the
    recipe's; None leaves it to the device: on a CPU memory is plentiful and time is not.
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
            warnings.append("this base's head does more than a projection: logits are taken whole, which needs memory")
        if packing and not _packing_is_exact(base, tried):
            packing = False
            warnings.append("packed rows leak into each other with this base's attention: rows are padded instead")
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
        ours = to_logits.projection(backbone(base.model, batch)).float()
    except (AttributeError, TypeError):
        return False
    to_logits.bend(ours)
    return _error(ours, own_logits(base.model, batch)) < TOLERANCE


def _packing_is_exact(base: Base, rows: Sequence[Encoded]) -> bool:
    """Documents after the first must not notice which one that is, and must come out as they do alone.

    The first question is asked of one shape, so that its answer is exact: a leak may be smaller than rounding is.
    """
    first, *others = rows if len(rows) > 1 else [*rows, *rows]
    packed = own_logits(base.model, _batch(base, [first, *others], packing=True))[0, len(first) :]
    alone = torch.cat([own_logits(base.model, _batch(base, [row], packing=False))[0] for row in others])
    if getattr(base.model, "is_loaded_in_8bit", False):
        return _error(packed, alone) < TOLERANCE_INT8
    stranger = Encoded(first.line, first.ids[::-1] // 2, first.trained)
    beside = own_logits(base.model, _batch(base, [stranger, *others], packing=True))[0, len(first) :]
    errors = (packed - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    return torch.equal(packed, beside) and float(errors.max()) < TOLERANCES[base.compute_dtype]


def _batch(base: Base, rows: Sequence[Encoded], *, packing: bool) -> Batch:
    return collate([list(rows)], packing=packing, pad=0).to(base.device)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm())
