"""A checkpoint: a folder with adapter, optimizer state, random generators and counters.

Owns: making a run resumable bit for bit. Tensors are stored as safetensors and everything else as JSON. Nothing is
pickled: checkpoints travel through a bucket, and loading one must never run code.
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

#: Tensors of base.safetensors, with the fields of RunState that they hold.
NATS = {"nats": "base_nats", "start": "start_nats"}


class RunState(BaseModel):
    """The progress of a run. `seconds` is the time spent in optimizer steps, over all attempts.

    `base` is the base's held-out score, and `base_nats` its loss on each held-out row; these are stored as an fp32
    tensor, because JSON would be large. `start` and `start_nats` are the same for the adapter from which training
    started. `fallback_level` is the index of the layout in use (`forward/fallback.py`), and `lanes` the number of CPU
    threads at the start of the run (`forward/threads.py`).
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
    """Python's and NumPy's generators. Torch's are tensors and are stored with the optimizer."""

    python: list[Any]
    numpy_key: list[int]
    numpy_rest: tuple[int, int, float]


class Stored(BaseModel):
    """The content of state.json."""

    run: RunState
    random: RandomState


def save(folder: Path, adapted: Adapted, optimizer: torch.optim.Optimizer, run: RunState, best: Tensors | None) -> Path:
    """Write a checkpoint to `folder`, atomically and synced to disk. An existing folder is replaced."""
    with disk.atomic_folder(folder) as partial:
        save_file(exact_tensors(adapted), partial / ADAPTER)
        save_file(_optimizer_tensors(adapted, optimizer) | torch_random(), partial / OPTIMIZER)
        if best is not None:
            save_file(best, partial / BEST)
        save_file({name: torch.tensor(getattr(run, field)) for name, field in NATS.items()}, partial / BASE)
        write_metrics(partial / METRICS, run.metrics)
        without_lists = run.model_copy(update={"metrics": [], "base_nats": [], "start_nats": []})
        stored = Stored(run=without_lists, random=_random_state())
        (partial / STATE).write_text(stored.model_dump_json(indent=1), encoding="utf-8")
    return folder


def load(
    folder: Path, adapted: Adapted, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> tuple[RunState, Tensors | None]:
    """Restore `adapted`, `optimizer` and every random generator; return the run's state and its best adapter.

    Raises ValueError if the checkpoint was made with another recipe.
    """
    stored = Stored.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    if stored.run.recipe != recipe:
        raise ValueError(
            f"the checkpoint {folder.name} was made with another recipe; it cannot be resumed with this one"
        )
    stored.run.metrics = read_metrics(folder / METRICS)
    if (base := folder / BASE).is_file():  # older checkpoints have no such file; the base is then scored again
        for name, tensor in load_file(base).items():
            setattr(stored.run, NATS[name], tensor.tolist())
    set_adapter(adapted, load_file(folder / ADAPTER))
    tensors = load_file(folder / OPTIMIZER)
    _restore_optimizer(adapted, optimizer, tensors)
    _restore_random(stored.random, tensors)
    best = folder / BEST
    return stored.run, load_file(best) if best.is_file() else None


def latest(run: RunState) -> Metrics:
    """The metrics of the current step: its training metrics merged with its evaluation, if there was one."""
    merged = Metrics(step=run.step, total_steps=run.recipe.total_steps)
    for metrics in run.metrics[-2:]:
        if metrics.step == run.step:
            merged = merged.model_copy(update=metrics.model_dump(exclude_none=True))
    return merged


def _optimizer_tensors(adapted: Adapted, optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state as flat tensors named `optimizer.<field>.<parameter>`."""
    return {
        f"optimizer.{field}.{name}": tensor.detach().to("cpu").contiguous()
        for name, parameter in trainable(adapted).items()
        for field, tensor in optimizer.state[parameter].items()
    }


def _restore_optimizer(adapted: Adapted, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restore AdamW with `load_state_dict`, which puts the step counter on the right device for each kind of AdamW.

    It numbers parameters group by group, and a group may have them in another order than the model.
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
