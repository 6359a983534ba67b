"""Read and restore torch's random generators, from which dropout draws."""

from __future__ import annotations

import torch

from worker.trainer.model.adapter_weights import Tensors


def torch_random() -> Tensors:
    """The state of torch's generators, on the CPU and on every GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random.cpu": torch.get_rng_state()} | {f"random.cuda.{i}": state for i, state in enumerate(cuda)}


def set_torch_random(tensors: Tensors) -> None:
    """Restore what `torch_random` returned. Other entries of `tensors` are ignored."""
    torch.set_rng_state(tensors["random.cpu"])
    for i in range(torch.cuda.device_count()):
        if (key := f"random.cuda.{i}") in tensors:
            torch.cuda.set_rng_state(tensors[key], i)
