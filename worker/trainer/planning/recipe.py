"""`auto` → numbers: every hyperparameter that training uses, resolved before a job is queued.

Owns: the defaults, and why they are what they are. A pure function of the request, the dataset's size and the base's
architecture. Must not import torch or read a file, apart from `architecture`, which reads one config.json.

Where the numbers come from: LoRA learns best at about ten times the rate of full fine-tuning, and that rate falls with
width, 5e-4 x (2000 / hidden)^p (Schulman et al., "LoRA Without Regret", 2025; p as tinker-cookbook fits it).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto import modeling_auto

from shared.errors import TrainingFailed
from shared.estimation.defaults import PACK_LENGTH
from shared.schemas.requests import (
    DpoHyperparameters,
    Hyperparameters,
    Lora,
    Method,
    MethodName,
    Quantization,
    TrainerParams,
)
from shared.schemas.results import Recipe

BASE_RATE = 5e-4
BASE_WIDTH = 2000
WIDTH_EXPONENT = 0.78
WIDTH_EXPONENT_QWEN = 0.08
#: Full fine-tuning's rate, as a share of LoRA's.
FULL_RATE = 1 / 10

#: Of an adapter beside a head that is trained in full: 4e-4 to 5e-4 at RoBERTa-base's width (Hu et al. 2021, table 9).
CLASSIFICATION_RATE = 1 / 2
#: DPO wants a fraction of the rate that answers are learned at; its `beta` auto is that of the paper.
DPO_RATE = 1 / 40
BETA = 0.1
RATES: dict[MethodName, float] = {"supervised": 1.0, "dpo": DPO_RATE, "classification": CLASSIFICATION_RATE}

WARMUP_SHARE = 0.03
MAX_GRAD_NORM = 1.0
#: An adapter starts at zero and is small: decay only slows it. Weights that are trained whole it would pull away from
#: the base, towards zero.
WEIGHT_DECAY = 0.0

LARGEST_AUTO_BATCH = 32
#: Fewer optimizer steps than this seldom teach a format reliably; `batch_size` auto keeps to it, the rest is warned of.
ENOUGH_STEPS = 100
#: `r` auto: 16, and 32 once there is enough data to fill it.
MANY_ROWS = 20_000
#: `alpha` auto stops growing here, so that the best rate does not depend on the rank.
LARGEST_AUTO_ALPHA = 32
#: `max_length` auto goes no further, whatever the base's context: activations grow with it.
LONGEST_AUTO_ROW = 2048
ROUND_LENGTH_TO = 64
#: `micro_batch` auto: rows that together hold about this many tokens.
MICRO_BATCH_TOKENS = 1536
#: Model types that fill in masked words: encoders, unless their config says otherwise; and those that classify.
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
#: RoBERTa and its kin count positions from the one after their padding's.
POSITIONS_AFTER_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod"),
        *("mpnet", "longformer", "luke", "ibert", "esm", "markuplm", "lilt", "layoutlmv3"),
    }
)
#: `eval_every` and `save_every` auto: this often in a run, but a checkpoint at least every so many steps.
PARTS_OF_A_RUN = 5
LONGEST_WITHOUT_CHECKPOINT = 100


@dataclass(frozen=True, slots=True)
class BaseTraits:
    """What the recipe needs to know of a base. One that `writes` is a decoder; an encoder only reads."""

    model_type: str
    hidden_size: int
    context: int | None
    writes: bool = True


@dataclass(frozen=True, slots=True)
class Size:
    """What the recipe needs to know of a dataset: rows that are trained on, the longest document in tokens as it came,
    and the longest row after the cut. A pair is one row of two documents.
    """

    rows: int
    longest: int
    longest_row: int


def read_traits(base_dir: str) -> BaseTraits:
    """Read a base's config.json. Raises TrainingFailed if it is not one of a text model."""
    try:
        config = json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        model_type, width = config["model_type"], config.get("hidden_size") or config.get("dim") or config["n_embd"]
        context = config.get("max_position_embeddings") or config.get("n_positions")
        if context is not None and model_type in POSITIONS_AFTER_PADDING:
            context -= (config.get("pad_token_id") or 0) + 1
        reads = model_type in MASKED and not (config.get("is_decoder") or config.get("is_encoder_decoder"))
        return BaseTraits(model_type, int(width), context, writes=not reads)
    except (FileNotFoundError, ValueError, KeyError, AttributeError) as error:
        raise TrainingFailed(
            f"the base model's config.json cannot be used: {error!r}",
            code="unsupported_base_model",
            param="model",
            hint="choose a text-generation base; `milliner models` lists what is imported",
        ) from error


def check_method(method: MethodName, base: BaseTraits) -> None:
    """Raises TrainingFailed for a base that cannot do what the method trains."""
    if method == "classification":
        if base.model_type in CLASSIFIERS:
            return
        found, hint = "has no classification model in transformers", "choose another base, an encoder for instance"
    else:
        if base.writes:
            return
        found = f"is an encoder, which reads and does not write; method {method!r} trains what is written"
        hint = 'choose method "classification", with rows of text and label, or a base that generates text'
    raise TrainingFailed(
        f"the base, a {base.model_type}, {found}", code="unsupported_base_model", param="model", hint=hint
    )


def max_length(trainer: TrainerParams, base: BaseTraits, longest: int) -> int:
    """Tokens of a row that are kept. Raises TrainingFailed if more is asked for than the base can attend to."""
    if trainer.max_length == "auto":
        rounded = -(-longest // ROUND_LENGTH_TO) * ROUND_LENGTH_TO
        return min(rounded, LONGEST_AUTO_ROW, base.context or LONGEST_AUTO_ROW)
    if base.context is not None and trainer.max_length > base.context:
        raise TrainingFailed(
            f"max_length is {trainer.max_length:,}; this base attends to at most {base.context:,} tokens",
            code="invalid_max_length",
            param="trainer.max_length",
            hint=f'"auto", or at most {base.context}',
        )
    return trainer.max_length


def resolve(
    method: Method,
    lora: Lora,
    trainer: TrainerParams,
    quantization: Quantization,
    *,
    seed: int,
    base: BaseTraits,
    size: Size,
    labels: list[str] | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe, and what its user should be warned of. `labels` are a classification's."""
    asked = method.hyperparameters
    # A classifier answers once a row, and an encoder's attention sees all of it.
    packing = trainer.packing and labels is None
    n_epochs = _n_epochs(method, size.rows) if asked.n_epochs == "auto" else asked.n_epochs
    batch_size = _batch_size(size.rows, n_epochs) if asked.batch_size == "auto" else asked.batch_size
    total_steps = -(-size.rows // batch_size) * n_epochs
    if trainer.max_steps is not None:
        total_steps = min(total_steps, trainer.max_steps)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    share = FULL_RATE if trainer.full_finetuning else 1.0
    r, alpha = (0, 0.0) if trainer.full_finetuning else _rank(lora, size.rows)
    length = max_length(trainer, base, size.longest)
    part = -(-total_steps // PARTS_OF_A_RUN)
    recipe = Recipe(
        method=method.type,
        full_finetuning=trainer.full_finetuning,
        beta=_beta(asked),
        labels=labels,
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=multiplier,
        learning_rate=learning_rate(base) * multiplier * RATES[method.type] * share,
        schedule="cosine",
        warmup_steps=math.ceil(WARMUP_SHARE * total_steps),
        total_steps=total_steps,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        r=r,
        alpha=alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        loraplus_lr_ratio=lora.loraplus_lr_ratio,
        quantization=quantization,
        max_length=length,
        packing=packing,
        micro_batch=_micro_batch(trainer, size.longest_row, batch_size, packing=packing),
        gradient_checkpointing=None if trainer.gradient_checkpointing == "auto" else trainer.gradient_checkpointing,
        save_every=trainer.save_every or min(part, LONGEST_WITHOUT_CHECKPOINT),
        eval_every=trainer.eval_every or part,
        early_stopping=trainer.early_stopping,
        seed=seed,
    )
    return recipe, _warnings(recipe)


def learning_rate(base: BaseTraits) -> float:
    exponent = WIDTH_EXPONENT_QWEN if base.model_type.startswith("qwen") else WIDTH_EXPONENT
    return float(BASE_RATE * (BASE_WIDTH / base.hidden_size) ** exponent)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step `step` (0-based): a linear warm-up to the peak, then down towards 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.total_steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done)


def _beta(asked: Hyperparameters) -> float | None:
    if not isinstance(asked, DpoHyperparameters):
        return None
    return BETA if asked.beta == "auto" else asked.beta


def _rank(lora: Lora, rows: int) -> tuple[int, float]:
    r = (32 if rows >= MANY_ROWS else 16) if lora.r == "auto" else lora.r
    return r, min(2 * r, LARGEST_AUTO_ALPHA) if lora.alpha == "auto" else lora.alpha


def _n_epochs(method: Method, rows: int) -> int:
    """Preferences are soon known by heart, and then the margin grows at the cost of the answers.

    Of a label there is less to learn by heart, and a head to be trained from nothing.
    """
    if method.type == "dpo":
        return 1
    if method.type == "classification":
        return 10 if rows < 1_000 else 5 if rows < 10_000 else 3
    return 3 if rows < 1_000 else 2 if rows < 10_000 else 1


def _batch_size(rows: int, n_epochs: int) -> int:
    """The largest power of two up to 32 that still leaves enough steps; 1 where nothing does."""
    batch = LARGEST_AUTO_BATCH
    while batch > 1 and -(-rows // batch) * n_epochs < ENOUGH_STEPS:
        batch //= 2
    return batch


def _micro_batch(trainer: TrainerParams, longest: int, batch_size: int, *, packing: bool) -> int:
    """Rows of a forward pass, by the longest that there is. It changes memory and speed, never the gradient."""
    if trainer.micro_batch != "auto":
        return trainer.micro_batch
    row = max(longest, PACK_LENGTH) if packing else longest
    return max(1, min(batch_size, MICRO_BATCH_TOKENS // row))


def _warnings(recipe: Recipe) -> list[str]:
    warnings = []
    if recipe.total_steps < ENOUGH_STEPS:
        warnings.append(
            f"only {recipe.total_steps} optimizer steps: under {ENOUGH_STEPS}, a tuned model often keeps its old "
            "habits; add rows or epochs, or lower batch_size"
        )
    if recipe.use_dora:
        warnings.append("use_dora: vLLM refuses DoRA adapters, and merging one into a quantized base is inexact")
    return warnings
