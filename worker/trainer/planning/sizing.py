"""Micro-batch and checkpointing chosen by the memory of the workers there are, and the verdict if none is enough.

Owns: what "auto" comes to where devices are known, and `plan.fit`. Arithmetic alone: must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InvalidRequest, TrainingFailed
from shared.estimation import architecture, memory_model
from shared.estimation.architecture import Architecture
from shared.estimation.memory_model import Setup
from shared.schemas.memory import Kind, KnownDevice, PlannedFit, PredictedPeak
from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Row
from worker.trainer.data.packing import Heaviest, heaviest
from worker.trainer.protocol import Task

#: "auto" leaves a tenth of a device alone: an uncorrected prediction is up to 5 % off, and memory has gaps.
SHARE = 0.9
GB = 1e9


@dataclass(frozen=True, slots=True)
class Sized:
    """A recipe with nothing left at "auto", as far as devices are known; `fit` is None for an unknown architecture."""

    recipe: Recipe
    fit: PlannedFit | None
    warnings: list[str]


def size(task: Task, recipe: Recipe, rows: Sequence[Row]) -> Sized:
    """Raises TrainingFailed: even one row at a time is too much for every device that has reported itself."""
    base = known_architecture(task.base_dir, recipe)
    try:
        if base is None:
            return Sized(recipe, None, [])
        plan = _Plan(task, base, rows)
        chosen = _choose(plan, recipe)
        peaks = [_peak(plan, chosen, device) for device in task.devices] or _unknown(plan, chosen)
    except InvalidRequest:  # a target that we do not know of: whether it is there, PEFT says
        return Sized(recipe, None, [])
    found = plan.heaviest(chosen)
    return Sized(chosen, PlannedFit(rows=found.rows, length=found.length, peaks=peaks), _warnings(chosen, peaks))


def known_architecture(base_dir: str, recipe: Recipe) -> Architecture | None:
    """The base's, as the recipe trains it, if fit.py can do arithmetic on both: it knows no full fine-tuning."""
    if recipe.full_finetuning:
        return None
    try:
        base = architecture.read_config(json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8")))
    except InvalidRequest:
        return None
    return base if recipe.labels is None else architecture.classifier(base, labels=len(recipe.labels))


def setup(recipe: Recipe, found: Heaviest, *, kind: Kind, checkpointing: bool) -> Setup:
    """The heaviest micro-batch as fit.py takes it, its padding included."""
    return Setup(
        quantization=recipe.quantization,
        r=recipe.r,
        micro_batch=found.rows,
        max_length=found.length,
        target_modules=recipe.target_modules,
        use_dora=recipe.use_dora,
        dropout=recipe.dropout,
        packing=False,
        checkpointing=checkpointing,
        device=kind,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a choice is made about."""

    task: Task
    base: Architecture
    rows: Sequence[Row]

    def heaviest(self, recipe: Recipe) -> Heaviest:
        return heaviest(self.rows, recipe, packing=recipe.packing, micro_batch=recipe.micro_batch)

    def setup(self, recipe: Recipe, kind: Kind) -> Setup:
        checkpointing = recipe.gradient_checkpointing
        on = kind == "cuda" if checkpointing is None else checkpointing
        return setup(recipe, self.heaviest(recipe), kind=kind, checkpointing=on)

    def peak(self, recipe: Recipe, device: KnownDevice) -> int:
        return memory_model.peak_memory(self.base, self.setup(recipe, device.kind), device.weighings).total


def _choose(plan: _Plan, recipe: Recipe) -> Recipe:
    """What the narrowest of those devices can bear that can bear the job at all: any of them may get it."""
    found = [_widest(plan, recipe, device) for device in plan.task.devices]
    if bearable := [one for one in found if one is not None]:
        return recipe.model_copy(
            update={
                "micro_batch": min(one.micro_batch for one in bearable),
                "gradient_checkpointing": any(one.gradient_checkpointing for one in bearable),
            }
        )
    least = _least(plan, recipe)
    if plan.task.devices and all(plan.peak(least, device) > device.memory_bytes for device in plan.task.devices):
        raise _too_large(plan, least)
    # Too much is asked for, or it is close: when memory runs out, the trainer narrows the micro-batch by itself.
    return least if plan.task.devices and plan.task.trainer.micro_batch == "auto" else recipe


def _widest(plan: _Plan, recipe: Recipe, device: KnownDevice) -> Recipe | None:
    for micro_batch, checkpointing in _candidates(plan, recipe, device.kind):
        tried = recipe.model_copy(update={"micro_batch": micro_batch, "gradient_checkpointing": checkpointing})
        if plan.peak(tried, device) <= SHARE * device.memory_bytes:
            return tried
    return None


def _candidates(plan: _Plan, recipe: Recipe, kind: Kind) -> Iterator[tuple[int, bool]]:
    """Micro-batches and checkpointing, the best first.

    A GPU takes as many rows as it can hold; on a CPU more than the recipe has are hardly faster. Checkpointing costs a
    forward pass in three, which a GPU pays sooner than go below the recipe's rows; a CPU is nearly as fast with fewer.
    """
    asked, wish = plan.task.trainer.micro_batch, plan.task.trainer.gradient_checkpointing
    most = recipe.batch_size if kind == "cuda" else recipe.micro_batch
    rows = [most >> i for i in range(most.bit_length())] if asked == "auto" else [asked]
    enough = min(recipe.micro_batch, most) if kind == "cuda" and asked == "auto" else 1
    for checkpointing in (False, True) if wish == "auto" else (wish,):
        for micro_batch in rows:
            if checkpointing or wish != "auto" or micro_batch >= enough:
                yield micro_batch, checkpointing


def _least(plan: _Plan, recipe: Recipe) -> Recipe:
    """What the trainer comes down to by itself when memory runs out."""
    wish = plan.task.trainer.gradient_checkpointing
    checkpointing = True if wish == "auto" else wish
    return recipe.model_copy(update={"micro_batch": 1, "gradient_checkpointing": checkpointing})


def _peak(plan: _Plan, recipe: Recipe, device: KnownDevice) -> PredictedPeak:
    memory = memory_model.peak_memory(plan.base, plan.setup(recipe, device.kind), device.weighings)
    return PredictedPeak(
        kind=device.kind,
        name=device.name,
        memory_bytes=device.memory_bytes,
        computed_bytes=memory.total - memory.correction,
        predicted_bytes=memory.total,
        fits=memory.total <= device.memory_bytes,
    )


def _unknown(plan: _Plan, recipe: Recipe) -> list[PredictedPeak]:
    """No worker has said what it has: the peak on either kind of device."""
    kinds: tuple[Kind, ...] = ("cuda", "cpu")
    totals = {kind: memory_model.peak_memory(plan.base, plan.setup(recipe, kind)).total for kind in kinds}
    return [PredictedPeak(kind=kind, computed_bytes=total, predicted_bytes=total) for kind, total in totals.items()]


def _too_large(plan: _Plan, least: Recipe) -> TrainingFailed:
    """With the one change that would make it fit on the device that comes closest."""
    device = min(plan.task.devices, key=lambda one: plan.peak(least, one) / one.memory_bytes)
    needed, tried = plan.peak(least, device), plan.setup(least, device.kind)
    change = memory_model.change(plan.base, tried, device.memory_bytes, device.weighings)
    if change is None:
        smallest = memory_model.smallest(plan.base, tried, device.weighings)
        hint = f"no single change is enough; with all of them it takes {smallest / GB:.1f} GB: take a smaller base"
    else:
        hint = f"{change.param} = {str(change.value).lower()} would fit: {change.total / GB:.1f} GB"
    return TrainingFailed(
        f"the longest row alone needs {needed / GB:.1f} GB; the workers have {_had(plan.task.devices)}",
        code="does_not_fit",
        param=change.param if change else "model",
        hint=hint,
    )


def _had(devices: Sequence[KnownDevice]) -> str:
    return ", ".join(f"{device.memory_bytes / GB:.1f} GB ({device.name})" for device in devices)


def _warnings(recipe: Recipe, peaks: Sequence[PredictedPeak]) -> list[str]:
    tight = [peak for peak in peaks if peak.fits is False]
    return [
        f"micro-batch {recipe.micro_batch} needs about {peak.predicted_bytes / GB:.1f} GB, and {peak.name} has "
        f"{(peak.memory_bytes or 0) / GB:.1f}: there, memory will run out and less be done at a time"
        for peak in tight
    ]
