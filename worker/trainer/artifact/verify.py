"""The proof: load a published adapter on the base with stock PEFT, in a process that trained nothing, and measure it.

Owns: what must hold before a job may be "succeeded". The scores of base and adapter must equal the report's. The
adapter's logits must differ from the base's, and from those of the adapter from which training started. Whether vLLM
can serve the adapter is recorded only. Must only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from shared.errors import TrainingFailed
from shared.schemas.requests import Quantization
from shared.schemas.results import Proof, Report, Score
from worker.trainer.artifact import read, read_full_model
from worker.trainer.artifact.vllm import lora_support, model_support
from worker.trainer.data import dataset
from worker.trainer.data.dataset import split
from worker.trainer.data.encoding import Encoder, Row
from worker.trainer.evaluation import evaluate
from worker.trainer.forward import fallback, layout_probe
from worker.trainer.forward.batches import collate
from worker.trainer.forward.log_likelihood import own_logits
from worker.trainer.methods import classify
from worker.trainer.model import adapter_weights, classification_head, initial_adapter
from worker.trainer.model.base import Base, load_adapter, load_base
from worker.trainer.model.full_weights import Adapted
from worker.trainer.protocol import Verified, Verify

PACKAGES = ("milliner", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")

#: Allowed difference between a loss and the report's, relative to the loss (to one nat if that is less). The same
#: batches on the same machine give equal bits; this is for a run that began on another machine. There, another layout
#: of the rows changes a loss by at most 3e-4 in bf16, and fp32 instead of bf16 by 1e-3 (decision 11).
TOLERANCE = 5e-3
#: The same for LLM.int8(), which picks outlier columns over the whole batch: other batches change a loss by 6e-3.
TOLERANCE_INT8 = 2e-2

#: Logits are compared on so many held-out rows, cut to so many tokens.
TRIED_ROWS = 2
TRIED_TOKENS = 256


def verify(command: Verify, *, stopping: Callable[[], bool], tick: Callable[[], None]) -> Verified:
    """Verify a published adapter or model and return the proof.

    Raises TrainingFailed with the code of the first check that fails, and Interrupted once `stopping` returns True. The
    base is loaded for this alone, because the copy that training used could be damaged.
    """
    task, recipe, folder = command.task, command.recipe, Path(command.adapter_dir)
    if task.torch_threads > 0:
        torch.set_num_threads(task.torch_threads)
    config: dict[str, Any] = {}
    if recipe.full_finetuning:
        read_full_model.check_config(folder, task)
    else:
        config = read.config(folder, task, recipe.labels)
        tensors = read.tensors(folder, head=config.get("modules_to_save") or ())
    encoder = Encoder(task.base_dir)
    fingerprint = read.tokenizer_sha256(folder, encoder)
    rows = split(dataset.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)
    tick()
    base = load_base(task.base_dir, recipe.quantization, labels=recipe.labels)
    if misnamed := set(config.get("modules_to_save") or ()) ^ set(base.head):
        raise read.foreign_keys(sorted(misnamed))
    if recipe.labels is not None:
        classification_head.initialize(base.model, base.uninitialized, seed=recipe.seed, pad=encoder.pad)
    layout, _ = layout_probe.layout_of(recipe, base, rows.train, encoder)
    levels = fallback.levels(layout, base, longest=max(map(len, rows.train)))
    layout = levels[min(command.fallback_level, len(levels) - 1)]
    architecture = type(base.model).__name__
    adapted: Adapted
    if recipe.full_finetuning:
        adapted = read_full_model.attach_full_model(base, folder)
        count, vllm = len(adapted.weights), model_support(architecture)
    else:
        adapted = _attach_adapter(base, folder, tensors)
        count, vllm = len(tensors), lora_support(config, architecture)
    tried, start, start_difference = rows.heldout[:TRIED_ROWS], None, None
    difference = _logit_difference(base, adapted, tried, without=adapted.disable_adapter)
    if task.start_from is not None and isinstance(adapted, PeftModel):
        start = initial_adapter.load(task.start_from, adapted)
        with_start = partial(initial_adapter.applied, adapted, start)
        start_difference = _logit_difference(base, adapted, tried, without=with_start)
    base_score, tuned_score = (
        evaluate.score(
            base, adapted, rows.heldout, recipe, adapter=adapter, layout=layout, start=start, stopping=stopping
        ).mean
        for adapter in (False, True)
    )
    proof = Proof(
        base=base_score,
        tuned=tuned_score,
        base_deviation=abs(base_score.loss - command.report.base.loss),
        tuned_deviation=abs(tuned_score.loss - command.report.tuned.loss),
        tolerance=TOLERANCE_INT8 if recipe.quantization is Quantization.INT8 else TOLERANCE,
        max_logit_difference=difference,
        start_logit_difference=start_difference,
        tensors=count,
        tokenizer_sha256=fingerprint,
        vllm=vllm,
    )
    check(proof, command.report)
    return Verified(job=command.job, proof=proof, versions={package: version(package) for package in PACKAGES})


def check(proof: Proof, report: Report) -> None:
    """Raise TrainingFailed if the measurements contradict the report, or if the adapter has no effect."""
    if not math.isfinite(proof.max_logit_difference):
        raise TrainingFailed(
            f"the published adapter gives logits with NaN or infinity on {TRIED_ROWS} held-out rows",
            code="adapter_not_reproducible",
            hint="the worker's memory or accelerator is faulty: at the end of training all numbers were finite",
            retryable=True,
        )
    if proof.max_logit_difference == 0:
        raise read.no_effect(f"logits on {TRIED_ROWS} held-out rows equal the base's, bit for bit")
    if proof.start_logit_difference == 0:
        raise read.no_effect(
            f"logits on {TRIED_ROWS} held-out rows equal those of the adapter that training started from, bit for bit"
        )
    if not _agree(proof.base, report.base, proof.tolerance):
        raise TrainingFailed(
            f"the base alone does not score as reported: {_comparison(proof.base, report.base)}",
            code="base_mismatch",
            hint="the base's files on the worker have changed since training, or its memory or accelerator is faulty",
            retryable=True,
        )
    if not _agree(proof.tuned, report.tuned, proof.tolerance):
        raise TrainingFailed(
            f"the published adapter does not score as reported: {_comparison(proof.tuned, report.tuned)}",
            code="adapter_not_reproducible",
            hint="the adapter was damaged when it was saved, or the worker's memory or accelerator is faulty",
            retryable=True,
        )


def _attach_adapter(base: Base, folder: Path, tensors: read.Tensors) -> PeftModel:
    """Load the adapter as a user would, and check that all tensors of the file were used and none was missing."""
    try:
        adapted = load_adapter(base.model, folder)
    except RuntimeError as error:
        if "size mismatch for " not in str(error):
            raise
        names = [line.split()[3].rstrip(":") for line in str(error).splitlines() if "size mismatch for " in line]
        raise read.foreign_keys(names) from error
    except (ValueError, KeyError, TypeError) as error:
        raise read.unreadable("adapter", error) from error
    wanted = adapter_weights.adapter_tensors(adapted).keys()
    if foreign := sorted(tensors.keys() - wanted):
        raise read.foreign_keys(foreign)
    if missing := sorted(wanted - tensors.keys()):
        raise read.unreadable(read.TENSORS, ValueError(f"{len(missing)} tensors are missing: {missing[0]}"))
    return adapted


def _logit_difference(
    base: Base, adapted: Adapted, rows: Sequence[Row], *, without: Callable[[], AbstractContextManager[None]]
) -> float:
    """The largest difference between logits with the adapter and `without` it, by the model's own forward."""
    largest, logits = 0.0, classify.logits if base.head else own_logits
    adapted.eval()
    with torch.no_grad(), base.precision():
        for row in rows:
            batch = collate([[row.documents[0].cut(TRIED_TOKENS)]], packing=False, pad=0).to(base.device)
            tuned = logits(base.model, batch).float()
            with without():
                plain = logits(base.model, batch).float()
            found = float((tuned - plain).abs().max())
            largest = found if math.isnan(found) else max(largest, found)
    return largest


def _agree(found: Score, reported: Score, tolerance: float) -> bool:
    """Whether two scores are equal within the tolerance.

    DPO's loss compares a model with its reference and hardly depends on the base, so the loss of the chosen answers is
    compared too.
    """
    pairs = [(found.loss, reported.loss)]
    if found.chosen_loss is not None and reported.chosen_loss is not None:
        pairs.append((found.chosen_loss, reported.chosen_loss))
    # A comparison with NaN is False, so NaN never agrees.
    return found.tokens == reported.tokens and all(abs(a - b) <= tolerance * max(1.0, b) for a, b in pairs)


def _comparison(found: Score, reported: Score) -> str:
    return f"{_numbers(found)} over {found.tokens} tokens, reported {_numbers(reported)} over {reported.tokens}"


def _numbers(score: Score) -> str:
    chosen = "" if score.chosen_loss is None else f" ({score.chosen_loss:.6g} of the chosen answers)"
    return f"loss {score.loss:.6g}{chosen}"
