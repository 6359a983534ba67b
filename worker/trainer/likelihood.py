"""What a model gives to the trained tokens, document by document, without ever holding all logits.

Owns: the forward pass and the chunked head. Must not know what a method makes of it (`methods/`).

Logits are what fills memory (16 bytes × vocabulary a token, 2 MB for Llama 3). The backbone runs alone; the head sees
only the trained positions, a chunk at a time, and each chunk's gradient with respect to the hidden states is taken at
once, while its logits exist. A frozen head needs nothing else, and backward computes no logits again.

A head that learns needs its own gradient too, and in it each document weighs what is known in backward alone. There the
chunks are checkpointed: their logits are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from worker.trainer.batches import IGNORED, Batch, batches
from worker.trainer.encoding import Row

#: Bytes of fp32 logits that a chunk may hold. A GPU wants large products; on a CPU, memory over 32 MB goes back to the
#: kernel after each use, and a chunk that stays in the cache is 3 % faster.
CHUNK_BYTES = {"cpu": 16 * 1024**2, "cuda": 256 * 1024**2}
#: The same where the head learns: each chunk makes a gradient of the whole head, which is added to the others'.
LEARNED_CHUNK_BYTES = 256 * 1024**2

#: (tokens, hidden) → fp32 logits (tokens, vocabulary)
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a base is fed; `selftest.py` finds what it can bear. `chunked`: run the head apart from the backbone.

    `micro_batch` rows are in memory at a time, shared out among `lanes` (see `lanes.py`). With
    `checkpointing` backward computes each layer anew rather than keep its activations.
    """

    packing: bool
    chunked: bool
    micro_batch: int
    pad: int
    lanes: int = 1
    checkpointing: bool = False

    def split(self, examples: Sequence[Row], turn: int | None = None) -> Iterator[Batch]:
        """Examples as micro-batches of this layout; only those of a `turn` (from 0), which are in memory together."""
        cut = batches(examples, packing=self.packing, micro_batch=self.micro_batch, pad=self.pad, lanes=self.lanes)
        return cut if turn is None else islice(cut, turn * self.lanes, (turn + 1) * self.lanes)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of each document of a batch, over its trained tokens: `nats`, the summed negative log-likelihood (documents,),
    fp32 and differentiable; and `hits`, how many were argmax (documents,), int64.
    """

    nats: torch.Tensor
    hits: torch.Tensor


def likelihood(model: PreTrainedModel, batch: Batch, layout: Layout) -> Likelihood:
    """One forward pass over the batch."""
    wanted = batch.targets != IGNORED
    states = backbone(model, batch) if layout.chunked else own_logits(model, batch)
    to_logits = head(model) if layout.chunked else torch.Tensor.float
    lengths = torch.tensor(batch.lengths, device=batch.targets.device)
    if layout.chunked and _learns(model.get_output_embeddings()):
        return _by_autograd(states[wanted], batch.targets[wanted], lengths, to_logits, vocabulary(model))
    pair: tuple[torch.Tensor, torch.Tensor]
    pair = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's
        states[wanted], batch.targets[wanted], lengths, to_logits, vocabulary(model)
    )
    return Likelihood(*pair)


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


def _learns(projection: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in projection.parameters())


def _by_autograd(
    hidden: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor, head: Head, vocabulary: int
) -> Likelihood:
    """As `_ChunkedCrossEntropy`, and differentiable in whatever the head is made of."""
    size = max(1, LEARNED_CHUNK_BYTES // (4 * vocabulary))
    pairs = [
        checkpoint(_cross_entropy, *piece, head, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    nats, hits = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Likelihood(_by_document(nats, lengths), _by_document(hits.float(), lengths).long())


def _cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, hidden) → nats and whether the target was argmax, both (tokens,)."""
    logits = head(hidden)
    return functional.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(dim=-1) == targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy over (tokens, hidden), summed by document; saves one gradient of the size of the hidden states.

    `lengths` (documents,) says how many of the tokens, which come in the order of documents, are each one's.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor, head: Head, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * vocabulary))
        for start in range(0, len(hidden), size):
            end = start + size
            piece = hidden[start:end].detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                logits = head(piece)
            log_likely = functional.log_softmax(logits.detach(), dim=-1)
            wanted = targets[start:end, None]
            nats[start:end] = -log_likely.gather(1, wanted)[:, 0]
            hits[start:end] = logits.detach().argmax(dim=-1) == targets[start:end]
            if gradient is not None:
                # Of cross entropy with respect to the logits: what was predicted less what was there. In place, where
                # autograd would take four more passes over the largest tensor there is.
                excess = log_likely.exp_()
                excess.scatter_add_(1, wanted, excess.new_full(wanted.shape, -1.0))
                (gradient[start:end],) = torch.autograd.grad(logits, piece, excess)
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
