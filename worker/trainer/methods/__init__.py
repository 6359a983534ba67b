"""Training methods, one file each: the loss of a batch.

To add one: a file with `loss`, its branch here, its settings in `shared.schemas.requests`, its defaults in
`shared/estimation/defaults.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Row
from worker.trainer.forward.batches import Batch, trained_tokens
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import classify, dpo, sft
from worker.trainer.methods.loss import Loss, Tally
from worker.trainer.model.full_weights import Adapted
from worker.trainer.model.initial_adapter import InitialAdapter

__all__ = ["Loss", "Tally", "loss", "weight"]


def loss(
    adapted: Adapted, batch: Batch, layout: Layout, recipe: Recipe, *, start: InitialAdapter | None = None
) -> Loss:
    """Compute the losses of a batch by the recipe's method, not yet divided by anything.

    The caller divides by `weight` of all examples over which it takes a mean. `start` is the adapter from which
    training started, if any.
    """
    if recipe.labels is not None:
        return classify.loss(adapted.get_base_model(), batch, recipe.labels)
    if recipe.beta is not None:
        return dpo.loss(adapted, batch, layout, beta=recipe.beta, start=start)
    return sft.loss(adapted.get_base_model(), batch, layout)


def weight(examples: Sequence[Row], recipe: Recipe) -> int:
    """The denominator of the examples' mean loss: trained tokens for supervised rows, else the number of examples."""
    return trained_tokens(examples) if recipe.method == "supervised" else len(examples)
