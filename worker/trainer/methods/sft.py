"""Supervised fine-tuning: cross entropy on the trained tokens, without ever holding all logits.

Owns: the loss of a batch. Must not know about optimizers, files or adapters.

Logits are what fills memory (16 bytes x vocabulary a token, 2 MB for Llama 3). The backbone runs alone; the head sees
only the trained positions, a chunk at a time, and each chunk's gradient with respect to the hidden states is taken at
once, while its logits exist. The head is frozen, so nothing else is needed, and backward computes no logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from worker.trainer.batches import IGNORED, Batch

#: Bytes of fp32 logits that a chunk may hold. A GPU wants large products; on a CPU, memory over 32 MB goes back to the
#: kernel after each use, and a chunk that stays in the cache is 3 % faster.
CHUNK_BYTES = {"cpu": 16 * 1024**2, "cuda": 256 * 1024**2}

#: (tokens, hidden) → fp32 logits (tokens, vocabulary)
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a base is fed; `selftest.py` finds what it can bear. `chunked`: run the head apart from the backbone."""

    packing: bool
    chunked: bool
    micro_batch: int
    pad: int


@dataclass(frozen=True, slots=True)
class Loss:
    """`sum` over the trained tokens of the batch, in nats, differentiable; `correct` of `tokens` were argmax."""

    sum: torch.Tensor
    correct: torch.Tensor
    tokens: int


def loss(model: PreTrainedModel, batch: Batch, layout: Layout) -> Loss:
    """The summed loss. Callers divide by the trained tokens of the whole optimizer step."""
    wanted = batch.targets != IGNORED
    targets = batch.targets[wanted]
    states = backbone(model, batch) if layout.chunked else own_logits(model, batch)
    to_logits = head(model) if layout.chunked else torch.Tensor.float
    total, correct = _chunked_cross_entropy(states[wanted], targets, to_logits, vocabulary(model))
    return Loss(total, correct, int(targets.numel()))


def own_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits (rows, length, vocabulary) by the model's own forward: for heads that `head` does not describe."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).logits
    return logits


def backbone(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states (rows, length, hidden) before the head."""
    output = model.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    )
    states: torch.Tensor = output.last_hidden_state
    return states


def head(model: PreTrainedModel) -> Head:
    """The output projection with what its architecture does to logits (Gemma caps them, Cohere and Granite scale)."""
    projection = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    multiplied = float(getattr(config, "logit_scale", None) or 1.0)
    divided = float(getattr(config, "logits_scaling", None) or 1.0)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = projection(hidden).float()
        if multiplied != divided:
            scores = scores * (multiplied / divided)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    return logits


def vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the loss, number of argmax hits)."""
    pair: tuple[torch.Tensor, torch.Tensor]
    pair = _ChunkedCrossEntropy.apply(hidden, targets, head, vocabulary)  # type: ignore[no-untyped-call]  # torch's
    return pair


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropy over (tokens, hidden); saves one gradient of the size of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * vocabulary))
        for start in range(0, len(hidden), size):
            piece = hidden[start : start + size].detach().requires_grad_(wants_gradient)
            labels = targets[start : start + size]
            with torch.set_grad_enabled(wants_gradient):
                logits = head(piece)
                summed = functional.cross_entropy(logits, labels, reduction="sum")
            if gradient is not None:
                (gradient[start : start + size],) = torch.autograd.grad(summed, piece)
            total += summed.detach()
            correct += (logits.detach().argmax(dim=-1) == labels).sum()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, grad_correct: Any) -> tuple[torch.Tensor | None, None, None, None]:
        gradient = None if ctx.gradient is None else ctx.gradient * grad_total.to(ctx.gradient.dtype)
        return gradient, None, None, None
