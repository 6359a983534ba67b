"""AdamW over what is trained, and the rate that each learns at.

Owns: which parameters share a rate. With LoRA+ (Hayou et al. 2024, arXiv:2402.12354) the B matrices learn at a multiple
of A's, because in a wide model no single rate lets both of them learn efficiently. Must not know about steps: the
schedule is `recipe.py`'s.
"""

from __future__ import annotations

import torch

from shared.schemas.results import Recipe
from worker.trainer.model.base import trainable
from worker.trainer.model.full_weights import Adapted

#: A group's own key: what the schedule's rate is multiplied by.
RATIO = "lr_ratio"


def make(adapted: Adapted, recipe: Recipe) -> torch.optim.Optimizer:
    """With one group of parameters, or two."""
    parameters, ratio = trainable(adapted), recipe.loraplus_lr_ratio
    groups = [{"params": list(parameters.values()), RATIO: 1.0}]
    if ratio is not None:
        bs = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
        rest = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
        groups = [{"params": rest, RATIO: 1.0}, {"params": bs, RATIO: ratio}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATIO]
