"""The result type that all methods share, and how results of batches add up. Must not contain a method's arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from shared.schemas.results import Score
from worker.trainer.data.labels import macro_f1


@dataclass(frozen=True, slots=True)
class Loss:
    """The losses of a batch, one entry for each example; `lines` are their line numbers in the dataset.

    `sums` (examples,) is the loss in nats, differentiable and not yet divided by anything. `counts` is the weight of an
    example in a mean: its trained tokens, or 1. `hits` (examples,) is how many of its `tokens` were the model's most
    likely ones.

    DPO only: `margins` (examples,), the reward margins, and `chosen_nats` (examples,), the negative log-likelihood of
    the chosen answers. Classification only: `answers`, pairs of indices (the row's label, the model's answer).
    """

    lines: tuple[int, ...]
    sums: torch.Tensor
    counts: tuple[int, ...]
    hits: torch.Tensor
    tokens: tuple[int, ...]
    margins: torch.Tensor | None = None
    chosen_nats: torch.Tensor | None = None
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Tally:
    """Sums over the losses of several batches."""

    nats: float = 0.0
    weight: int = 0
    hits: int = 0
    tokens: int = 0
    margins: float = 0.0
    chosen_nats: float = 0.0
    wins: float = 0.0
    pairs: int = 0
    answers: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, loss: Loss) -> None:
        self.nats += loss.sums.detach().sum().item()
        self.weight += sum(loss.counts)
        self.hits += int(loss.hits.sum().item())
        self.tokens += sum(loss.tokens)
        self.answers.update(loss.answers)
        if loss.margins is not None and loss.chosen_nats is not None:
            self.chosen_nats += loss.chosen_nats.sum().item()
            self.margins += loss.margins.sum().item()
            self.wins += (0.5 * (loss.margins.sign() + 1)).sum().item()
            self.pairs += len(loss.margins)

    def score(self) -> Score:
        """The means over everything that was added."""
        return Score(
            loss=self.nats / self.weight,
            token_accuracy=self.hits / self.tokens,
            tokens=self.tokens,
            reward_accuracy=self.wins / self.pairs if self.pairs else None,
            reward_margin=self.margins / self.pairs if self.pairs else None,
            chosen_loss=self.chosen_nats / self.tokens if self.pairs else None,
            macro_f1=macro_f1(self.answers) if self.answers else None,
        )
