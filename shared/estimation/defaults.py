"""Defaults of every recipe setting: what "auto" becomes, and the buffer sizes of the trainer.

Owns: the numbers, the rules, and the reasons for them. The planner (worker/trainer/planning/recipe.py) and the estimate
(shared/estimation/estimate.py) both call `max_length` and `resolve`. The trainer and the memory model import the same
buffer sizes. Pure: must not import torch or transformers, or read a file.

Where the rates come from: LoRA learns best at about ten times the rate of full fine-tuning, and that rate falls with
width, 5e-4 x (2000 / hidden)^p (Schulman et al., "LoRA Without Regret", 2025; p as tinker-cookbook fits it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shared.errors import InvalidRequest
from shared.schemas.requests import DpoHyperparameters, Hyperparameters, Lora, MethodName, TrainerParams

# ---------------------------------------------------------------- buffers of the trainer

#: Tokens of a packed row where all examples are shorter. Attention between documents is computed and then masked, so
#: long rows of short documents waste it: with examples of 30 tokens, SmolLM2-135M on 2 cores trained 518 tokens/s at
#: 128, 473 at 256.
PACK_LENGTH = 128
#: Bytes of fp32 logits that are in memory at a time. A GPU wants large products, a CPU a chunk that stays in its cache.
CHUNK_BYTES: dict[str, int] = {"cpu": 24 * 1024**2, "cuda": 256 * 1024**2}
#: Bytes of 4-bit matrices that stay dequantized while a fused LoRA is attached on a CPU. Each is needed twice in every
#: micro-batch.
RESIDENT_BYTES = 512 * 1024**2

# ---------------------------------------------------------------- learning rate

BASE_RATE = 5e-4
BASE_WIDTH = 2000
WIDTH_EXPONENT = 0.78
WIDTH_EXPONENT_QWEN = 0.08
#: The rate of full fine-tuning, as a share of LoRA's.
FULL_RATE = 1 / 10
#: The rate of an adapter whose classification head is trained in full: 4e-4 to 5e-4 at RoBERTa-base's width (Hu et al.
#: 2021, table 9).
CLASSIFICATION_RATE = 1 / 2
#: DPO needs a fraction of the rate of supervised training.
DPO_RATE = 1 / 40
RATES: dict[MethodName, float] = {"supervised": 1.0, "dpo": DPO_RATE, "classification": CLASSIFICATION_RATE}
#: `beta` "auto": the value of the DPO paper (Rafailov et al. 2023).
BETA = 0.1

SCHEDULE: Literal["cosine"] = "cosine"
WARMUP_SHARE = 0.03
MAX_GRAD_NORM = 1.0
#: An adapter starts at zero and is small, so decay only slows it. In full fine-tuning, decay would pull the weights
#: away from the base, towards zero.
WEIGHT_DECAY = 0.0

# ---------------------------------------------------------------- rows, batches, ranks, lengths

#: Rows held out of the training file where no validation file is given: 5 %, at most 200.
HELDOUT_SHARE = 0.05
HELDOUT_MOST = 200
#: Below this many rows, 5 % would be no row, or one row that proves nothing: the training rows are scored instead.
CARVE_FROM_ROWS = 20

#: `batch_size` "auto" is at most this.
LARGEST_AUTO_BATCH = 32
#: Fewer optimizer steps seldom teach a format reliably. `batch_size` "auto" aims for this many; fewer cause a warning.
ENOUGH_STEPS = 100
#: `r` "auto": the small rank, and the large one from MANY_ROWS training rows on, enough data to make use of it.
SMALL_RANK, LARGE_RANK = 16, 32
MANY_ROWS = 20_000
#: `alpha` "auto" is twice the rank and stops growing here, so that the best rate does not depend on the rank.
LARGEST_AUTO_ALPHA = 32
#: `max_length` "auto" is at most this, whatever the base's context: activations grow with it.
LONGEST_AUTO_ROW = 2048
ROUND_LENGTH_TO = 64
#: `micro_batch` "auto": rows that together hold at most this many tokens.
MICRO_BATCH_TOKENS = 1536
#: Where devices are known, `micro_batch` "auto" uses this share of a device's memory: an uncorrected prediction is up
#: to 5 % off, and memory has gaps.
DEVICE_MEMORY_SHARE = 0.9
#: `eval_every` and `save_every` "auto": so often in a run, but a checkpoint at least every LONGEST_WITHOUT_CHECKPOINT
#: steps.
PARTS_OF_A_RUN = 5
LONGEST_WITHOUT_CHECKPOINT = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that depend on the number of rows or on the longest row, with nothing left at "auto".

    `alpha` and `r` are 0 with full fine-tuning. `save_every`, `eval_every` and `warmup_steps` are optimizer steps.
    """

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    total_steps: int
    warmup_steps: int
    r: int
    alpha: float
    packing: bool
    micro_batch: int
    save_every: int
    eval_every: int


def resolve(
    method: MethodName,
    asked: Hyperparameters,
    lora: Lora,
    trainer: TrainerParams,
    *,
    rows: int,
    longest_row: int,
) -> Settings:
    """The settings for `rows` training rows, the longest of them `longest_row` tokens after the cut to `max_length`."""
    epochs = n_epochs(method, rows) if asked.n_epochs == "auto" else asked.n_epochs
    batch = batch_size(rows, epochs) if asked.batch_size == "auto" else asked.batch_size
    steps = -(-rows // batch) * epochs
    if trainer.max_steps is not None:
        steps = min(steps, trainer.max_steps)
    # A classifier has one answer a row, and an encoder's attention covers the whole row.
    packing = trainer.packing and method != "classification"
    rank = 0 if trainer.full_finetuning else _rank(rows) if lora.r == "auto" else lora.r
    alpha = min(2 * rank, LARGEST_AUTO_ALPHA) if lora.alpha == "auto" else lora.alpha
    part = -(-steps // PARTS_OF_A_RUN)
    return Settings(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=(1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier),
        total_steps=steps,
        warmup_steps=math.ceil(WARMUP_SHARE * steps),
        r=rank,
        alpha=0.0 if trainer.full_finetuning else alpha,
        packing=packing,
        micro_batch=(
            micro_batch(batch, longest_row, packing=packing) if trainer.micro_batch == "auto" else trainer.micro_batch
        ),
        save_every=trainer.save_every or min(part, LONGEST_WITHOUT_CHECKPOINT),
        eval_every=trainer.eval_every or part,
    )


def max_length(trainer: TrainerParams, *, context: int | None, longest: int) -> int:
    """Tokens that are kept of a document. `longest` is the longest document of the files, in tokens, before the cut.

    Raises InvalidRequest: more than `context`, the most tokens that the base can attend to.
    """
    if trainer.max_length == "auto":
        rounded = -(-longest // ROUND_LENGTH_TO) * ROUND_LENGTH_TO
        return min(rounded, LONGEST_AUTO_ROW, context or LONGEST_AUTO_ROW)
    if context is not None and trainer.max_length > context:
        raise InvalidRequest(
            f"max_length is {trainer.max_length:,}; this base attends to at most {context:,} tokens",
            code="invalid_max_length",
            param="trainer.max_length",
        )
    return trainer.max_length


def heldout_rows(rows: int) -> int:
    """How many of a training file's usable rows are held out where no validation file is given. 0: too few rows."""
    if rows < CARVE_FROM_ROWS:
        return 0
    return min(HELDOUT_MOST, max(1, int(rows * HELDOUT_SHARE)))


def n_epochs(method: MethodName, rows: int) -> int:
    """`n_epochs` "auto".

    DPO memorizes preferences early; after that, the margin grows at the cost of the answers. A label has less to
    memorize than an answer, and the classification head starts from random weights.
    """
    if method == "dpo":
        return 1
    if method == "classification":
        return 10 if rows < 1_000 else 5 if rows < 10_000 else 3
    return 3 if rows < 1_000 else 2 if rows < 10_000 else 1


def batch_size(rows: int, epochs: int) -> int:
    """`batch_size` "auto": the largest power of two up to 32 that leaves ENOUGH_STEPS steps; 1 if none does."""
    batch = LARGEST_AUTO_BATCH
    while batch > 1 and -(-rows // batch) * epochs < ENOUGH_STEPS:
        batch //= 2
    return batch


def micro_batch(batch: int, longest_row: int, *, packing: bool) -> int:
    """`micro_batch` "auto" in rows, where no device is known. It changes memory and speed, never the gradient."""
    row = packed_row(longest_row) if packing else longest_row
    return max(1, min(batch, MICRO_BATCH_TOKENS // row))


def packed_row(longest_row: int) -> int:
    """Tokens of a packed row."""
    return max(longest_row, PACK_LENGTH)


def checkpointing(kind: str) -> bool:
    """`gradient_checkpointing` "auto" where no memory size is known: on for a GPU ("cuda"), off for a CPU.

    A CPU has much memory and little speed.
    """
    return kind == "cuda"


def learning_rate(
    method: MethodName, multiplier: float, *, model_type: str, hidden_size: int, full_finetuning: bool
) -> float:
    """The peak learning rate for a base of that width."""
    exponent = WIDTH_EXPONENT_QWEN if model_type.startswith("qwen") else WIDTH_EXPONENT
    rate = float(BASE_RATE * (BASE_WIDTH / hidden_size) ** exponent)
    return rate * multiplier * RATES[method] * (FULL_RATE if full_finetuning else 1.0)


def beta(asked: Hyperparameters) -> float | None:
    """DPO's `beta`; None for any other method."""
    if not isinstance(asked, DpoHyperparameters):
        return None
    return BETA if asked.beta == "auto" else asked.beta


def _rank(rows: int) -> int:
    return LARGE_RANK if rows >= MANY_ROWS else SMALL_RANK
