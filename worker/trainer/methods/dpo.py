"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

The reference is the model before training: the same model with the adapter disabled, or with the adapter from which
training started. So it costs a forward pass but no second model. Both passes run in train mode, because LLM.int8()
computes differently in eval mode. The base's own dropout is therefore switched off (`attach` does that); otherwise
tuned and reference likelihoods would differ at random. Must not know how likelihoods are computed.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from worker.trainer.forward.batches import Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import log_likelihood
from worker.trainer.methods.loss import Loss
from worker.trainer.model.full_weights import Adapted
from worker.trainer.model.initial_adapter import InitialAdapter, applied


def loss(adapted: Adapted, batch: Batch, layout: Layout, *, beta: float, start: InitialAdapter | None = None) -> Loss:
    """-log sigmoid(beta x (gain of the chosen answer - gain of the rejected answer)) of each pair.

    The gain of an answer is its log-likelihood minus its log-likelihood by the reference. Documents come in pairs,
    chosen before rejected, and all pairs have the same weight. `hits` counts tokens of the chosen answers.
    """
    with torch.no_grad(), adapted.disable_adapter() if start is None else applied(adapted, start):
        reference = log_likelihood(adapted.get_base_model(), batch, layout).nats
    tuned = log_likelihood(adapted.get_base_model(), batch, layout)
    gains = reference - tuned.nats
    margins = beta * (gains[0::2] - gains[1::2])
    return Loss(
        lines=batch.lines[0::2],
        sums=-functional.logsigmoid(margins),
        counts=(1,) * len(margins),
        hits=tuned.hits[0::2],
        tokens=batch.lengths[0::2],
        margins=margins.detach(),
        chosen_nats=tuned.nats[0::2].detach(),
    )
