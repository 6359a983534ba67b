"""Choose micro-batch and checkpointing by the memory of the known workers, or refuse a job that fits on none of them.

Owns: `micro_batch` and `gradient_checkpointing` "auto" where devices are known, and `plan.fit`. Our code imports no
torch here; an import contract checks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InvalidRequest, TrainingFailed
from shared.estimation import architecture, defaults, memory_model
from shared.estimation.architecture import Architecture
from shared.estimation.memory_model import Setup
from shared.schemas.memory import Kind, KnownDevice, PlannedFit, PredictedPeak
from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Row
from worker.trainer.data.packing import Heaviest, heaviest
from worker.trainer.protocol import Task

GB = 1e9


@dataclass(frozen=True, slots=True)
class Sized:
    """A recipe with `micro_batch` and checkpointing chosen for the known devices.

    `fit` is None if the memory model cannot be applied; then the recipe is unchanged.
    """

    recipe: Recipe
    fit: PlannedFit | None
    warnings: list[str]


def size(task: Task, recipe: Recipe, rows: Sequence[Row]) -> Sized:
    """Fit a recipe to the devices in `task`. Raises TrainingFailed: a micro-batch of one row fits on none of them."""
    base = known_architecture(task.base_dir, recipe)
    try:
        if base is None:
            return Sized(recipe, None, [])
        plan = _Plan(task, base, rows)
        chosen = _choose(plan, recipe)
        peaks = [_peak(plan, chosen, device) for device in task.devices] or _unknown(plan, chosen)
    except InvalidRequest:  # a target module that the memory model does not know; PEFT checks whether it exists
        return Sized(recipe, None, [])
    found = plan.heaviest(chosen)
    return Sized(chosen, PlannedFit(rows=found.rows, length=found.length, peaks=peaks), _warnings(chosen, peaks))


def known_architecture(base_dir: str, recipe: Recipe) -> Architecture | None:
    """The base's architecture, with a classification head if the recipe trains one.

    None if the memory model does not apply: an unknown architecture, or full fine-tuning.
    """
    if recipe.full_finetuning:
        return None
    try:
        base = architecture.read_config(json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8")))
    except InvalidRequest:
        return None
    return base if recipe.labels is None else architecture.classifier(base, labels=len(recipe.labels))


def setup(recipe: Recipe, found: Heaviest, *, kind: Kind, checkpointing: bool) -> Setup:
    """The heaviest micro-batch as input of the memory model, padding included."""
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
    """What the choice depends on: the request, the base and the training rows."""

    task: Task
    base: Architecture
    rows: Sequence[Row]

    def heaviest(self, recipe: Recipe) -> Heaviest:
        return heaviest(self.rows, recipe, packing=recipe.packing, micro_batch=recipe.micro_batch)

    def setup(self, recipe: Recipe, kind: Kind) -> Setup:
        asked = recipe.gradient_checkpointing
        checkpointing = defaults.checkpointing(kind) if asked is None else asked
        return setup(recipe, self.heaviest(recipe), kind=kind, checkpointing=checkpointing)

    def peak(self, recipe: Recipe, device: KnownDevice) -> int:
        return memory_model.peak_memory(self.base, self.setup(recipe, device.kind), device.weighings).total


def _choose(plan: _Plan, recipe: Recipe) -> Recipe:
    """Settings that fit every device able to run the job, since any of them may get it."""
    found = [_largest(plan, recipe, device) for device in plan.task.devices]
    if fitting := [chosen for chosen in found if chosen is not None]:
        return recipe.model_copy(
            update={
                "micro_batch": min(chosen.micro_batch for chosen in fitting),
                "gradient_checkpointing": any(chosen.gradient_checkpointing for chosen in fitting),
            }
        )
    smallest = _smallest(plan, recipe)
    if plan.task.devices and all(plan.peak(smallest, device) > device.memory_bytes for device in plan.task.devices):
        raise _too_large(plan, smallest)
    # The user asks for too much, or it is close: when memory runs out, the trainer lowers the micro-batch by itself.
    return smallest if plan.task.devices and plan.task.trainer.micro_batch == "auto" else recipe


def _largest(plan: _Plan, recipe: Recipe, device: KnownDevice) -> Recipe | None:
    """The best candidate that fits on the device; None if there is none."""
    for micro_batch, checkpointing in _candidates(plan, recipe, device.kind):
        candidate = recipe.model_copy(update={"micro_batch": micro_batch, "gradient_checkpointing": checkpointing})
        if plan.peak(candidate, device) <= defaults.DEVICE_MEMORY_SHARE * device.memory_bytes:
            return candidate
    return None


def _candidates(plan: _Plan, recipe: Recipe, kind: Kind) -> Iterator[tuple[int, bool]]:
    """Micro-batches with checkpointing on or off, the best first.

    On a GPU the largest micro-batch is the fastest; on a CPU one above the recipe's is hardly faster. Checkpointing
    computes the forward twice, which is one of three passes. On a GPU that costs less than a micro-batch below the
    recipe's; on a CPU a smaller micro-batch is nearly as fast.
    """
    asked, asked_checkpointing = plan.task.trainer.micro_batch, plan.task.trainer.gradient_checkpointing
    most = recipe.batch_size if kind == "cuda" else recipe.micro_batch
    rows = [most >> i for i in range(most.bit_length())] if asked == "auto" else [asked]
    enough = min(recipe.micro_batch, most) if kind == "cuda" and asked == "auto" else 1
    for checkpointing in (False, True) if asked_checkpointing == "auto" else (asked_checkpointing,):
        for micro_batch in rows:
            if checkpointing or asked_checkpointing != "auto" or micro_batch >= enough:
                yield micro_batch, checkpointing


def _smallest(plan: _Plan, recipe: Recipe) -> Recipe:
    """The settings that the trainer itself falls back to when memory runs out."""
    asked = plan.task.trainer.gradient_checkpointing
    checkpointing = True if asked == "auto" else asked
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
    """The peak on each kind of device, where no worker has reported its device."""
    kinds: tuple[Kind, ...] = ("cuda", "cpu")
    totals = {kind: memory_model.peak_memory(plan.base, plan.setup(recipe, kind)).total for kind in kinds}
    return [PredictedPeak(kind=kind, computed_bytes=total, predicted_bytes=total) for kind, total in totals.items()]


def _too_large(plan: _Plan, smallest: Recipe) -> TrainingFailed:
    """An error with the single change that would make the job fit on the device that is the least short of memory."""
    device = min(plan.task.devices, key=lambda known: plan.peak(smallest, known) / known.memory_bytes)
    needed, setup_ = plan.peak(smallest, device), plan.setup(smallest, device.kind)
    change = memory_model.change(plan.base, setup_, device.memory_bytes, device.weighings)
    if change is None:
        minimum = memory_model.smallest(plan.base, setup_, device.weighings)
        hint = f"no single change is enough; with all of them it needs {minimum / GB:.1f} GB: take a smaller base"
    else:
        hint = f"{change.param} = {str(change.value).lower()} would fit: {change.total / GB:.1f} GB"
    return TrainingFailed(
        f"the longest row alone needs {needed / GB:.1f} GB; the workers have {_memory_of(plan.task.devices)}",
        code="does_not_fit",
        param=change.param if change else "model",
        hint=hint,
    )


def _memory_of(devices: Sequence[KnownDevice]) -> str:
    return ", ".join(f"{device.memory_bytes / GB:.1f} GB ({device.name})" for device in devices)


def _warnings(recipe: Recipe, peaks: Sequence[PredictedPeak]) -> list[str]:
    return [
        f"micro-batch {recipe.micro_batch} needs about {peak.predicted_bytes / GB:.1f} GB, and {peak.name} has "
        f"{(peak.memory_bytes or 0) / GB:.1f}: there, memory will run out and the micro-batch be lowered"
        for peak in peaks
        if peak.fits is False
    ]
