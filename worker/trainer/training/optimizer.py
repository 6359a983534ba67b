"""AdamW for the trainable parameters, and their learning rates.

Owns: which parameters share a learning rate. With LoRA+ (Hayou et al. 2024, arXiv:2402.12354) the rate of the B
matrices is a multiple of that of A, because in a wide model both cannot learn efficiently at the same rate. Must not
know about steps: the schedule is in `planning/recipe.py`.
"""

from __future__ import annotations

import torch

from shared.schemas.results import Recipe
from worker.trainer.model.base import trainable
from worker.trainer.model.full_weights import Adapted

#: Key in a parameter group: the factor on the schedule's rate.
RATIO = "lr_ratio"


def make(adapted: Adapted, recipe: Recipe) -> torch.optim.Optimizer:
    """Make AdamW with one group of parameters, or with LoRA+ two."""
    parameters, ratio = trainable(adapted), recipe.loraplus_lr_ratio
    groups = [{"params": list(parameters.values()), RATIO: 1.0}]
    if ratio is not None:
        bs = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
        rest = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
        groups = [{"params": rest, RATIO: 1.0}, {"params": bs, RATIO: ratio}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATIO]
