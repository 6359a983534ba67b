"""Micro-batches side by side on a CPU, a thread each.

Owns: the threads, and how many a run may have. An operator that is split over cores waits for the slowest of them at
its end, thousands of times a step, and one that is not leaves the others idle; a micro-batch a thread does neither.
Each comes out as it would alone, bit for bit, and in its order. Must not be used where a forward pass changes what all
of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch

from shared.schemas.requests import Quantization
from shared.schemas.results import Recipe
from worker.trainer.forward.batches import Batch
from worker.trainer.model.base import Base, own_dropouts

#: Python's lock admits one thread at a time to what lies between the operators. Tried with two cores.
MOST = 4

T = TypeVar("T")


def thread_limit(base: Base, recipe: Recipe) -> int:
    """How many lanes this base can bear with this recipe; 1 on a GPU, which one stream keeps busy."""
    shares_state = (
        recipe.quantization is Quantization.INT8  # bitsandbytes keeps a product's outliers in the layer
        or recipe.method == "dpo"  # takes the adapter off for its reference, and so for all
        or any("dynamic" in str(kind) or "longrope" in str(kind) for kind in _rotary_kinds(base.model))
    )
    draws_random = recipe.dropout > 0 or own_dropouts(base.model)  # from one generator, in the order of arrival
    is_large = recipe.full_finetuning  # each lane would hold a gradient of the whole base
    if base.device.type != "cpu" or shares_state or draws_random or is_large:
        return 1
    return min(MOST, torch.get_num_threads(), recipe.micro_batch)


def run_in_order(
    act: Callable[[Batch], T], batches: Iterable[Batch], lanes: int, *, before: Callable[[], None]
) -> Iterator[T]:
    """What `act` makes of each, in order. `before` is called by this thread ahead of every `lanes` of them.

    All of a round have ended before an error of one of them is raised: nothing runs on behind the caller's back.
    """
    rest = iter(batches)
    while group := list(islice(rest, lanes)):
        before()
        if len(group) == 1:
            yield act(group[0])
            continue
        futures = [_threads(lanes, torch.get_num_threads()).submit(act, batch) for batch in group]
        wait(futures)
        yield from [future.result() for future in futures]


@lru_cache(maxsize=1)
def _threads(lanes: int, cores: int) -> ThreadPoolExecutor:
    """They share the cores out among themselves."""
    return ThreadPoolExecutor(
        lanes, thread_name_prefix="lane", initializer=torch.set_num_threads, initargs=(max(1, cores // lanes),)
    )


def _rotary_kinds(model: torch.nn.Module) -> Iterator[object]:
    """Of positions that are rotated; some of them are reckoned anew for each length, and kept in the module."""
    return (kind for module in model.modules() if (kind := getattr(module, "rope_type", None)) is not None)
