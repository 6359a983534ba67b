"""The proof: a published adapter is put on the base by stock PEFT, in a process that trained nothing, and measured.

Owns: what must be true of the two together before a job may say "succeeded". The base's score and the adapter's must
come out as the report says, and the two must differ; so must the adapter and the one that it started from. What vLLM
would refuse is recorded, and fails nothing. Must only read.
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

#: How far a loss may be off its report, as a share of it (of one nat, where it is less). The same batches on the same
#: machine give the same bits. This is for a run that began on another: other layouts of the rows give 3e-4 at most in
#: bf16, and fp32 instead of bf16 gives 1e-3 (decision 11).
TOLERANCE = 5e-3
#: LLM.int8() picks its outlier columns over the whole batch, so a row's loss depends on its company: 6e-3.
TOLERANCE_INT8 = 2e-2

TRIED_ROWS = 2
TRIED_TOKENS = 256


def verify(command: Verify, *, stopping: Callable[[], bool], tick: Callable[[], None]) -> Verified:
    """Raises TrainingFailed with the code of what does not hold first, and Interrupted once `stopping` says so.

    The base is loaded for this alone, and is not used again: the one that a job was trained on is what is in doubt.
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
        classification_head.draw(base.model, base.blank, seed=recipe.seed, pad=encoder.pad)
    layout, _ = layout_probe.layout_of(recipe, base, rows.train, encoder)
    levels = fallback.levels(layout, base, longest=max(map(len, rows.train)))
    layout = levels[min(command.fallback_level, len(levels) - 1)]
    architecture = type(base.model).__name__
    adapted: Adapted
    if recipe.full_finetuning:
        adapted = read_full_model.attach_full_model(base, folder)
        count, vllm = len(adapted.weights), model_support(architecture)
    else:
        adapted = _put_on(base, folder, tensors)
        count, vllm = len(tensors), lora_support(config, architecture)
    tried, origin, trained = rows.heldout[:TRIED_ROWS], None, None
    difference = _logit_difference(base, adapted, tried, without=adapted.disable_adapter)
    if task.start_from is not None and isinstance(adapted, PeftModel):
        origin = initial_adapter.load(task.start_from, adapted)
        trained = _logit_difference(base, adapted, tried, without=partial(initial_adapter.applied, adapted, origin))
    off, on = (
        evaluate.score(
            base, adapted, rows.heldout, recipe, adapter=adapter, layout=layout, start=origin, stopping=stopping
        ).mean
        for adapter in (False, True)
    )
    proof = Proof(
        base=off,
        tuned=on,
        base_deviation=abs(off.loss - command.report.base.loss),
        tuned_deviation=abs(on.loss - command.report.tuned.loss),
        tolerance=TOLERANCE_INT8 if recipe.quantization is Quantization.INT8 else TOLERANCE,
        max_logit_difference=difference,
        start_logit_difference=trained,
        tensors=count,
        tokenizer_sha256=fingerprint,
        vllm=vllm,
    )
    check(proof, command.report)
    return Verified(job=command.job, proof=proof, versions={package: version(package) for package in PACKAGES})


def check(proof: Proof, report: Report) -> None:
    """Does what was measured agree with the report? Raises TrainingFailed; `not <=` also catches NaN."""
    if not math.isfinite(proof.max_logit_difference):
        raise TrainingFailed(
            f"the published adapter gives logits that are no numbers on {TRIED_ROWS} held-out rows",
            code="adapter_not_reproducible",
            hint="the worker's memory or accelerator is faulty: its training ended with numbers",
            retryable=True,
        )
    if proof.max_logit_difference == 0:
        raise read.no_effect(f"logits on {TRIED_ROWS} held-out rows are the base's, bit for bit")
    if proof.start_logit_difference == 0:
        raise read.no_effect(
            f"logits on {TRIED_ROWS} held-out rows are those of the adapter that it started from, bit for bit"
        )
    if not _agree(proof.base, report.base, proof.tolerance):
        raise TrainingFailed(
            f"the base alone does not score as the report says: {_told(proof.base, report.base)}",
            code="base_mismatch",
            hint="the worker trained on other weights than it holds now, or its memory or accelerator is faulty",
            retryable=True,
        )
    if not _agree(proof.tuned, report.tuned, proof.tolerance):
        raise TrainingFailed(
            f"the published adapter does not score as the report says: {_told(proof.tuned, report.tuned)}",
            code="adapter_not_reproducible",
            hint="the adapter was damaged when it was saved, or the worker's memory or accelerator is faulty",
            retryable=True,
        )


def _put_on(base: Base, folder: Path, tensors: read.Tensors) -> PeftModel:
    """As any user would; then look whether it took all of the file, and nothing but the file."""
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
    """The largest between the adapter and the model `without` it, row by row through the model's own forward."""
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
    """DPO's loss compares the model with itself and hardly sees the base; the chosen answers' own loss does."""
    pairs = [(found.loss, reported.loss)]
    if found.chosen_loss is not None and reported.chosen_loss is not None:
        pairs.append((found.chosen_loss, reported.chosen_loss))
    return found.tokens == reported.tokens and all(abs(a - b) <= tolerance * max(1.0, b) for a, b in pairs)


def _told(found: Score, reported: Score) -> str:
    return f"{_numbers(found)} over {found.tokens} tokens, reported were {_numbers(reported)} over {reported.tokens}"


def _numbers(score: Score) -> str:
    chosen = "" if score.chosen_loss is None else f" ({score.chosen_loss:.6g} of the chosen answers)"
    return f"loss {score.loss:.6g}{chosen}"
