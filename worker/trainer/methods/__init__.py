"""Training methods, a file each: what a batch means for the gradient.

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
    """Of a batch, by the recipe's method. Callers divide by the `weight` of all examples that share a mean.

    `start` is the adapter that training began with, if it did with one.
    """
    if recipe.labels is not None:
        return classify.loss(adapted.get_base_model(), batch, recipe.labels)
    if recipe.beta is not None:
        return dpo.loss(adapted, batch, layout, beta=recipe.beta, start=start)
    return sft.loss(adapted.get_base_model(), batch, layout)


def weight(examples: Sequence[Row], recipe: Recipe) -> int:
    """What the examples weigh together in a mean: pairs and labels count alike, answers by their trained tokens."""
    return trained_tokens(examples) if recipe.method == "supervised" else len(examples)
