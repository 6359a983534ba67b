"""A folder that holds all of a run: adapter, optimizer, random numbers, counters.

Owns: making a run bitwise resumable. Tensors go to safetensors and
the rest to JSON: a checkpoint travels through a bucket, and loading one must never run code, so nothing is pickled.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from shared import disk
from shared.schemas.results import Metrics, Recipe, Score
from worker.trainer.artifact.metrics_file import METRICS, read_metrics, write_metrics
from worker.trainer.model.adapter_weights import ADAPTER, Tensors, exact_tensors, set_adapter
from worker.trainer.model.base import trainable
from worker.trainer.model.full_weights import Adapted
from worker.trainer.training.random_state import set_torch_random, torch_random

BEST = "best.safetensors"
OPTIMIZER = "optimizer.safetensors"
BASE = "base.safetensors"
STATE = "state.json"

#: What base.safetensors calls the losses of each held-out row.
NATS = {"nats": "base_nats", "start": "start_nats"}


class RunState(BaseModel):
    """What a run has come to. `seconds` is time spent in optimizer steps, over all attempts.

    `fallback_level` is the rung of `ladder.py` that the run has come down to, `lanes` how many it began with.
    `base_nats` are each held-out row's loss by the base, which fp32 holds; with many rows they are too long for JSON.
    `start` and `start_nats` are the same of the adapter that the run began with.
    """

    recipe: Recipe
    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    base: Score | None = None
    base_nats: list[float] = []
    start: Score | None = None
    start_nats: list[float] = []
    evaluation_due: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    worse_evaluations: int = 0
    fallback_level: int = 0
    lanes: int = 1
    metrics: list[Metrics] = []


class RandomState(BaseModel):
    """Python's and NumPy's generators; torch's are tensors and lie beside the optimizer."""

    python: list[Any]
    numpy_key: list[int]
    numpy_rest: tuple[int, int, float]


class Stored(BaseModel):
    """state.json."""

    run: RunState
    random: RandomState


def save(folder: Path, adapted: Adapted, optimizer: torch.optim.Optimizer, run: RunState, best: Tensors | None) -> Path:
    """Write the folder; after this returns it is on the disk, whole. An older one of the same step is replaced."""
    with disk.atomic_folder(folder) as partial:
        save_file(exact_tensors(adapted), partial / ADAPTER)
        save_file(_optimizer_tensors(adapted, optimizer) | torch_random(), partial / OPTIMIZER)
        if best is not None:
            save_file(best, partial / BEST)
        save_file({name: torch.tensor(getattr(run, field)) for name, field in NATS.items()}, partial / BASE)
        write_metrics(partial / METRICS, run.metrics)
        lean = run.model_copy(update={"metrics": [], "base_nats": [], "start_nats": []})
        stored = Stored(run=lean, random=_random_state())
        (partial / STATE).write_text(stored.model_dump_json(indent=1), encoding="utf-8")
    return folder


def load(
    folder: Path, adapted: Adapted, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> tuple[RunState, Tensors | None]:
    """Put the run back into `adapted`, `optimizer` and every random generator.

    Raises ValueError for a checkpoint of another recipe.
    """
    stored = Stored.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    if stored.run.recipe != recipe:
        raise ValueError(f"the checkpoint {folder.name} was made by another recipe; it cannot be gone on from")
    stored.run.metrics = read_metrics(folder / METRICS)
    if (base := folder / BASE).is_file():  # older checkpoints have none, and the base is scored again
        for name, tensor in load_file(base).items():
            setattr(stored.run, NATS[name], tensor.tolist())
    set_adapter(adapted, load_file(folder / ADAPTER))
    tensors = load_file(folder / OPTIMIZER)
    _restore_optimizer(adapted, optimizer, tensors)
    _restore_random(stored.random, tensors)
    best = folder / BEST
    return stored.run, load_file(best) if best.is_file() else None


def latest(run: RunState) -> Metrics:
    """What is known at this step, the step's own line and its evaluation in one."""
    merged = Metrics(step=run.step, total_steps=run.recipe.total_steps)
    for metrics in run.metrics[-2:]:
        if metrics.step == run.step:
            merged = merged.model_copy(update=metrics.model_dump(exclude_none=True))
    return merged


def _optimizer_tensors(adapted: Adapted, optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state, flattened: `optimizer.<field>.<parameter>`."""
    return {
        f"optimizer.{field}.{name}": tensor.detach().to("cpu").contiguous()
        for name, parameter in trainable(adapted).items()
        for field, tensor in optimizer.state[parameter].items()
    }


def _restore_optimizer(adapted: Adapted, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Through `load_state_dict`, which knows where each kind of AdamW keeps its step counter.

    It counts parameters group by group, and a group need not have them in the model's order.
    """
    names = {parameter: name for name, parameter in trainable(adapted).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {
        i: {
            field: tensors[key]
            for field in ("step", "exp_avg", "exp_avg_sq")
            if (key := f"optimizer.{field}.{name}") in tensors
        }
        for i, name in enumerate(order)
    }
    optimizer.load_state_dict(state)


def _random_state() -> RandomState:
    version, words, gauss = random.getstate()
    _, key, *rest = np.random.get_state(legacy=True)
    return RandomState(
        python=[version, list(words), gauss],
        numpy_key=[int(word) for word in key],
        numpy_rest=(int(rest[0]), int(rest[1]), float(rest[2])),
    )


def _restore_random(state: RandomState, tensors: Tensors) -> None:
    version, words, gauss = state.python
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(("MT19937", np.array(state.numpy_key, dtype=np.uint32), *state.numpy_rest))
    set_torch_random(tensors)
