"""Resolve "auto": every number that training uses, fixed before a job is queued.

Owns: which base a method can train, and the recipe as a function of the request, the dataset's size and the base. The
defaults are in shared/estimation/defaults.py. Reads one config.json and no other file. Our code imports no torch here;
an import contract checks it (transformers loads torch by itself).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto import modeling_auto

from shared.errors import InvalidRequest, TrainingFailed
from shared.estimation import architecture, defaults
from shared.schemas.requests import Lora, Method, MethodName, Quantization, TrainerParams
from shared.schemas.results import Recipe

#: Model types with a masked-language model, which are encoders unless their config says otherwise; and those with a
#: classification model.
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


@dataclass(frozen=True, slots=True)
class BaseTraits:
    """What the recipe depends on in a base. `context` is the longest row in tokens, None if there is no limit.

    `generates` is False for an encoder, which can only be trained to classify.
    """

    model_type: str
    hidden_size: int
    context: int | None
    generates: bool = True


@dataclass(frozen=True, slots=True)
class Size:
    """What the recipe depends on in a dataset. A DPO pair is one row of two documents.

    `rows` are trained on. `longest` is the longest document of the files in tokens, before the cut. `longest_row` is
    the longest training row in tokens, after the cut.
    """

    rows: int
    longest: int
    longest_row: int


def read_traits(base_dir: str) -> BaseTraits:
    """Read a base's config.json. Raises TrainingFailed if it does not describe a text model."""
    try:
        config = json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        model_type, width = config["model_type"], config.get("hidden_size") or config.get("dim") or config["n_embd"]
        encodes = model_type in MASKED and not (config.get("is_decoder") or config.get("is_encoder_decoder"))
        return BaseTraits(model_type, int(width), architecture.context_length(config), generates=not encodes)
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TrainingFailed(
            f"the base model's config.json cannot be used: {error!r}",
            code="unsupported_base_model",
            param="model",
            hint="choose a text-generation base; `milliner models` lists what is imported",
        ) from error


def check_method(method: MethodName, base: BaseTraits) -> None:
    """Raises TrainingFailed if the base cannot be trained with this method."""
    if method == "classification":
        if base.model_type in CLASSIFIERS:
            return
        found, hint = "has no classification model in transformers", "choose another base, an encoder for instance"
    else:
        if base.generates:
            return
        found = f"is an encoder and generates no text, which method {method!r} needs"
        hint = 'choose method "classification", with rows of text and label, or a base that generates text'
    raise TrainingFailed(
        f"the base, a {base.model_type}, {found}", code="unsupported_base_model", param="model", hint=hint
    )


def max_length(trainer: TrainerParams, base: BaseTraits, longest: int) -> int:
    """Tokens that are kept of a document; `longest` is the longest document in tokens.

    Raises TrainingFailed: more than the base's context.
    """
    try:
        return defaults.max_length(trainer, context=base.context, longest=longest)
    except InvalidRequest as refused:
        hint = f'"auto", or at most {base.context}'
        raise TrainingFailed(refused.message, code=refused.code, param=refused.param, hint=hint) from refused


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
    """Return the recipe and warnings for its user. `labels` are those of a classification.

    Raises TrainingFailed: `max_length` above the base's context.
    """
    asked = method.hyperparameters
    settings = defaults.resolve(method.type, asked, lora, trainer, rows=size.rows, longest_row=size.longest_row)
    recipe = Recipe(
        method=method.type,
        full_finetuning=trainer.full_finetuning,
        beta=defaults.beta(asked),
        labels=labels,
        n_epochs=settings.n_epochs,
        batch_size=settings.batch_size,
        learning_rate_multiplier=settings.learning_rate_multiplier,
        learning_rate=defaults.learning_rate(
            method.type,
            settings.learning_rate_multiplier,
            model_type=base.model_type,
            hidden_size=base.hidden_size,
            full_finetuning=trainer.full_finetuning,
        ),
        schedule=defaults.SCHEDULE,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.total_steps,
        weight_decay=defaults.WEIGHT_DECAY,
        max_grad_norm=defaults.MAX_GRAD_NORM,
        r=settings.r,
        alpha=settings.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        loraplus_lr_ratio=lora.loraplus_lr_ratio,
        quantization=quantization,
        max_length=max_length(trainer, base, size.longest),
        packing=settings.packing,
        micro_batch=settings.micro_batch,
        gradient_checkpointing=None if trainer.gradient_checkpointing == "auto" else trainer.gradient_checkpointing,
        save_every=settings.save_every,
        eval_every=settings.eval_every,
        early_stopping=trainer.early_stopping,
        seed=seed,
    )
    return recipe, _warnings(recipe)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step `step` (0-based): a linear warm-up to the peak, then a decay towards 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.total_steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done)


def _warnings(recipe: Recipe) -> list[str]:
    warnings = []
    if recipe.total_steps < defaults.ENOUGH_STEPS:
        warnings.append(
            f"only {recipe.total_steps} optimizer steps: under {defaults.ENOUGH_STEPS}, a tuned model often keeps its "
            "old habits; add rows or epochs, or lower batch_size"
        )
    if recipe.use_dora:
        warnings.append("use_dora: vLLM refuses DoRA adapters, and merging one into a quantized base is inexact")
    return warnings
