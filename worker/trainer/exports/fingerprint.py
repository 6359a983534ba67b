"""Compare a model that was read back with the one that was written, without keeping both in memory.

Owns: the fingerprint of a model, with which the other is compared. Must not read or write a file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

#: Tolerances for norms and biases. Gemma's norms are stored with 1 added; a reader subtracts it and rounds to bf16.
RELATIVE, ABSOLUTE = 2**-8, 1e-6


class Mismatch(Exception):
    """What was read back differs from what was written, or cannot be written."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """For each tensor of a model in `dtype`, by name: a SHA-256 of a matrix, or the values of a vector."""

    dtype: torch.dtype
    prints: dict[str, bytes | torch.Tensor]


def fingerprint(model: PreTrainedModel, dtype: torch.dtype) -> Fingerprint:
    """Compute the fingerprint of `model` as it would be if it were loaded in `dtype`."""
    return Fingerprint(dtype, {name: _print(tensor, dtype) for name, tensor in model.state_dict().items()})


def differing(model: PreTrainedModel, wanted: Fingerprint) -> list[str]:
    """Names of missing tensors, matrices with any different bit, and norms and biases that differ beyond rounding."""
    state = model.state_dict()
    return [
        name
        for name, kept in wanted.prints.items()
        if name not in state or not _agrees(_print(state[name], wanted.dtype), kept)
    ]


def check_tensors(model: PreTrainedModel, wanted: Fingerprint) -> None:
    """Raise Mismatch if any tensor of `model` differs."""
    if names := differing(model, wanted):
        raise Mismatch(f"{len(names)} of {len(wanted.prints)} tensors differ when read back, such as {names[0]}")


def _print(tensor: torch.Tensor, dtype: torch.dtype) -> bytes | torch.Tensor:
    if tensor.ndim == 1:
        return tensor.detach().float().cpu().clone()
    bits = tensor.detach().to(dtype).cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).digest()


def _agrees(found: bytes | torch.Tensor, kept: bytes | torch.Tensor) -> bool:
    if isinstance(found, torch.Tensor) and isinstance(kept, torch.Tensor):
        return found.shape == kept.shape and torch.allclose(found, kept, RELATIVE, ABSOLUTE)
    return type(found) is type(kept) and found == kept
