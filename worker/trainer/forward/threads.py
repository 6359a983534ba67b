"""Run micro-batches in parallel on a CPU, one thread each. CPU only: a GPU run uses one thread, so you can skip this.

Owns: the threads, and how many a run may use. An operator split over cores has to wait for the slowest core, thousands
of times a step; one that is not split leaves the other cores idle. A micro-batch per thread avoids both. Each result is
bit for bit what it would be alone, and results come in order. Must not be used where a forward pass changes state that
the threads share.
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

#: More threads would wait for Python's global interpreter lock between operators. Measured with two cores only.
MOST_THREADS = 4

T = TypeVar("T")


def thread_limit(base: Base, recipe: Recipe) -> int:
    """How many threads may run this recipe on this base; 1 on a GPU, which one stream keeps busy."""
    shares_state = (
        recipe.quantization is Quantization.INT8  # bitsandbytes stores a product's outliers in the layer
        or recipe.method == "dpo"  # disables the adapter for its reference, which all threads would see
        or any("dynamic" in str(kind) or "longrope" in str(kind) for kind in _rotary_kinds(base.model))
    )
    draws_random = recipe.dropout > 0 or own_dropouts(base.model)  # threads would draw in no fixed order
    is_large = recipe.full_finetuning  # each thread would hold a gradient of the whole base
    if base.device.type != "cpu" or shares_state or draws_random or is_large:
        return 1
    return min(MOST_THREADS, torch.get_num_threads(), recipe.micro_batch)


def run_in_order(
    act: Callable[[Batch], T], batches: Iterable[Batch], lanes: int, *, before: Callable[[], None]
) -> Iterator[T]:
    """Yield the results of `act` in order, with `lanes` batches at a time in parallel.

    The calling thread calls `before` ahead of each such group. If `act` raises, the error is raised once the whole
    group has ended, so that nothing is left running.
    """
    rest = iter(batches)
    while group := list(islice(rest, lanes)):
        before()
        if len(group) == 1:
            yield act(group[0])
            continue
        futures = [_executor(lanes, torch.get_num_threads()).submit(act, batch) for batch in group]
        wait(futures)
        yield from [future.result() for future in futures]


@lru_cache(maxsize=1)
def _executor(lanes: int, cores: int) -> ThreadPoolExecutor:
    """Threads that divide the cores evenly among themselves."""
    return ThreadPoolExecutor(
        lanes, thread_name_prefix="forward", initializer=torch.set_num_threads, initargs=(max(1, cores // lanes),)
    )


def _rotary_kinds(model: torch.nn.Module) -> Iterator[object]:
    """The kinds of rotary embeddings in a model. Some recompute frequencies by length and store them in the module."""
    return (kind for module in model.modules() if (kind := getattr(module, "rope_type", None)) is not None)
