"""What a model gives to the trained tokens, document by document, without ever holding all logits.

Owns: the forward pass and the chunked head. Must not know what a method makes of it (`methods/`).

Logits are what fills memory (16 bytes × vocabulary a token, 2 MB for Llama 3). The backbone runs alone; the head sees
only the trained positions, a chunk at a time, and each chunk's gradient with respect to the hidden states is taken at
once, while its logits exist. A frozen head needs nothing else, and backward computes no logits again. Every chunk is
worked on in one and the same buffer: memory that comes new from the kernel costs more than what is done in it.

A head that learns needs its own gradient too, and in it each document weighs what is known in backward alone. There the
chunks are checkpointed: their logits are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.estimation.defaults import CHUNK_BYTES
from worker.trainer.forward.batches import IGNORED, Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.model import fused_lora

#: CHUNK_BYTES where the head learns: each chunk makes a gradient of the whole head, which is added to the others'.
LEARNED_CHUNK_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Of each document of a batch, over its trained tokens: `nats`, the summed negative log-likelihood (documents,),
    fp32 and differentiable; and `hits`, how many were argmax (documents,), int64.
    """

    nats: torch.Tensor
    hits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """(tokens, hidden) → fp32 logits (tokens, vocabulary): a projection times `scale`, kept by tanh within ±`cap`."""

    projection: torch.nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """By autograd."""
        scores: torch.Tensor = self.projection(hidden).float()
        scores = scores if self.scale == 1.0 else scores * self.scale
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap

    def bend(self, scores: torch.Tensor) -> torch.Tensor | None:
        """What the projection gave → logits, in place; what tanh leaves of a gradient, where there is a cap."""
        if self.scale != 1.0:
            scores.mul_(self.scale)
        if self.cap is None:
            return None
        slope = scores.div_(self.cap).tanh_().square().neg_().add_(1.0)
        scores.mul_(self.cap)
        return slope

    def gradient(self, excess: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of the hidden states, (tokens, hidden), by that of the scores, which are written over."""
        return (scores.copy_(excess) @ fused_lora.weight(self.projection).to(scores.dtype)).mul_(self.scale)


def log_likelihood(model: PreTrainedModel, batch: Batch, layout: Layout) -> LogLikelihood:
    """One forward pass over the batch."""
    wanted = batch.targets != IGNORED
    states = backbone(model, batch) if layout.chunked else own_logits(model, batch)
    to_logits = head(model) if layout.chunked else None
    lengths = torch.tensor(batch.lengths, device=batch.targets.device)
    if to_logits is not None and _learns(to_logits.projection):
        return _by_autograd(states[wanted], batch.targets[wanted], lengths, to_logits, vocabulary(model))
    pair: tuple[torch.Tensor, torch.Tensor]
    pair = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's
        states[wanted], batch.targets[wanted], lengths, to_logits, vocabulary(model)
    )
    return LogLikelihood(*pair)


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
    config = model.config.get_text_config()
    multiplied = float(getattr(config, "logit_scale", None) or 1.0)
    divided = float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), multiplied / divided, None if cap is None else float(cap))


def vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _learns(projection: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in projection.parameters())


def _by_autograd(
    hidden: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor, head: Head, vocabulary: int
) -> LogLikelihood:
    """As `_ChunkedCrossEntropy`, and differentiable in whatever the head is made of."""
    size = max(1, LEARNED_CHUNK_BYTES // (4 * vocabulary))
    pairs = [
        checkpoint(_cross_entropy, *piece, head, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    nats, hits = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return LogLikelihood(_by_document(nats, lengths), _by_document(hits.float(), lengths).long())


def _cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, hidden) → nats and whether the target was argmax, both (tokens,)."""
    logits = head(hidden)
    return functional.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(dim=-1) == targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy over (tokens, hidden), summed by document; saves one gradient of the size of the hidden states.

    `lengths` (documents,) says how many of the tokens, which come in the order of documents, are each one's. With no
    head, the states are the logits.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: Any, states: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor, head: Head | None, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, device = max(1, CHUNK_BYTES[states.device.type] // (4 * vocabulary)), states.device
        buffer = torch.empty(min(size, len(states)), vocabulary, dtype=torch.float32, device=device)
        nats, hits = (torch.empty(len(states), dtype=torch.float32, device=device) for _ in range(2))
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), size):
            here = slice(start, start + size)
            scores = states[here] if head is None else head.projection(states[here])
            logits, wanted = buffer[: len(scores)].copy_(scores), targets[here, None]
            slope = None if head is None else head.bend(logits)
            hits[here] = logits.argmax(dim=-1) == targets[here]
            likely = logits.sub_(logits.amax(dim=-1, keepdim=True)).gather(1, wanted)[:, 0]
            total = logits.exp_().sum(dim=-1)
            nats[here] = total.log() - likely
            if gradient is not None:
                # Of cross entropy with respect to the logits: what was predicted less what was there.
                excess = logits.div_(total[:, None])
                excess.scatter_add_(1, wanted, excess.new_full(wanted.shape, -1.0))
                if slope is not None:
                    excess.mul_(slope)
                gradient[here] = excess if head is None else head.gradient(excess, scores)
        ctx.gradient, ctx.lengths = gradient, lengths
        hits_by_document = _by_document(hits, lengths).long()
        ctx.mark_non_differentiable(hits_by_document)
        return _by_document(nats, lengths), hits_by_document

    @staticmethod
    def backward(
        ctx: Any, grad_nats: torch.Tensor, grad_hits: Any
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        if ctx.gradient is None:
            return None, None, None, None, None
        weights = grad_nats.repeat_interleave(ctx.lengths).to(ctx.gradient.dtype)
        return ctx.gradient * weights[:, None], None, None, None, None


def _by_document(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums (documents,) of values (tokens,): one thread a document, so that a GPU adds in the same order each time."""
    return torch.segment_reduce(values, "sum", lengths=lengths)
