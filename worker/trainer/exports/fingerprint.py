"""Is what was read back what was to be written?

Owns: the fingerprint of a model, with which another is compared once it has made room. Must not read or write a file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

#: Norms come back from another's arithmetic: 1 is added to Gemma's, taken off again, and rounded to bf16.
RELATIVE, ABSOLUTE = 2**-8, 1e-6


class Unlike(Exception):
    """What was read back is not what was to be written."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """By the names of a model's tensors, in `dtype`: digests, and what is small itself."""

    dtype: torch.dtype
    prints: dict[str, bytes | torch.Tensor]


def fingerprint(model: PreTrainedModel, dtype: torch.dtype) -> Fingerprint:
    """Of `model` as it would be read in `dtype`."""
    return Fingerprint(dtype, {name: _print(tensor, dtype) for name, tensor in model.state_dict().items()})


def differing(model: PreTrainedModel, wanted: Fingerprint) -> list[str]:
    """Names of the matrices that are not the same to the bit, and of the norms and biases that rounding cannot tell."""
    state = model.state_dict()
    return [
        name
        for name, kept in wanted.prints.items()
        if name not in state or not _agrees(_print(state[name], wanted.dtype), kept)
    ]


def check_tensors(model: PreTrainedModel, wanted: Fingerprint) -> None:
    """Raises Unlike."""
    if names := differing(model, wanted):
        raise Unlike(f"{len(names)} of {len(wanted.prints)} tensors come back otherwise, {names[0]} for one")


def _print(tensor: torch.Tensor, dtype: torch.dtype) -> bytes | torch.Tensor:
    if tensor.ndim == 1:
        return tensor.detach().float().cpu().clone()
    bits = tensor.detach().to(dtype).cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).digest()


def _agrees(found: bytes | torch.Tensor, kept: bytes | torch.Tensor) -> bool:
    if isinstance(found, torch.Tensor) and isinstance(kept, torch.Tensor):
        return found.shape == kept.shape and torch.allclose(found, kept, RELATIVE, ABSOLUTE)
    return type(found) is type(kept) and found == kept
