"""The report of a run: base against tuned model, how certain the difference is, and what the run cost.

Owns: the content of a Report and the arithmetic behind it. Must not run the model: `evaluate.py` and `samples.py` do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from shared.estimation.memory_model import ADAPTER_BYTES
from shared.schemas.memory import MeasuredFit
from shared.schemas.results import FullFineTuning, LossChange, Majority, Recipe, Report, Sample, Score, Verdict
from worker.trainer.data import labels
from worker.trainer.data.dataset import HeldoutSource, Split
from worker.trainer.evaluation import bootstrap
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.model import adapter_weights
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import Adapted
from worker.trainer.system import peak_memory

#: Below this many rows the interval is too narrow. In simulations it contained the true value in 82 % of the cases with
#: 5 rows and in 90 % with 20.
FEW_ROWS = 20
FP32_BYTES = 4


def make(
    base: Base,
    adapted: Adapted,
    recipe: Recipe,
    rows: Split,
    *,
    before: RowScores,
    after: RowScores,
    samples: list[Sample],
    steps: int,
    kept_step: int,
    start: RowScores | None = None,
    trained_tokens: int,
    seconds: float,
    fit: MeasuredFit | None = None,
) -> Report:
    """Make the report from three scores on `rows.heldout` and from what the run measured.

    `before` is the base's score, `start` that of the adapter from which training started, if any, and `after` that of
    the tuned model. `seconds` is the time spent in optimizer steps.
    """
    trainable_parameters, total_parameters = adapted.get_nb_trainable_parameters()
    base_parameters = total_parameters if recipe.full_finetuning else total_parameters - trainable_parameters
    measured = change(before, after, seed=recipe.seed, source=rows.heldout_source)
    most = labels.majority(rows.train, rows.heldout) if recipe.labels else None
    if most is not None:
        measured.caveats += _label_caveats(most, after.mean, untrained=bool(base.uninitialized))
    carved = rows.heldout_source == "training_file_carved"
    return Report(
        base=before.mean,
        tuned=after.mean,
        change=measured,
        majority=most,
        start=start.mean if start else None,
        start_change=change(start, after, seed=recipe.seed, source=rows.heldout_source) if start else None,
        samples=samples,
        heldout_source=rows.heldout_source,
        heldout_lines=[row.line for row in rows.heldout] if carved else [],
        quantization=recipe.quantization,
        compute_dtype="bfloat16" if base.compute_dtype == torch.bfloat16 else "float32",
        steps=steps,
        kept_step=kept_step,
        trained_tokens=trained_tokens,
        trainable_parameters=trainable_parameters,
        total_parameters=total_parameters,
        adapter_bytes=sum(tensor.nbytes for tensor in adapter_weights.adapter_tensors(adapted).values()),
        base_bytes=held_bytes(adapted),
        base_fp32_bytes=FP32_BYTES * base_parameters,
        full_finetuning=full_finetuning(base_parameters),
        train_seconds=round(seconds, 3),
        tokens_per_second=round(trained_tokens / seconds, 1) if seconds else 0.0,
        peak_memory_bytes=_peak_memory(base.device),
        fit=fit,
    )


def change(before: RowScores, after: RowScores, *, seed: int, source: HeldoutSource) -> LossChange:
    """The change of the mean loss, with its interval. Rows are compared one by one, because some are hard for both."""
    differences = after.nats.astype(np.float64) - before.nats
    interval = bootstrap.interval(differences, after.weights, seed=seed)
    low, high = interval or (None, None)
    return LossChange(
        loss=after.mean.loss - before.mean.loss,
        low=low,
        high=high,
        rows=len(differences),
        resamples=bootstrap.RESAMPLES if interval else 0,
        verdict=_verdict(interval),
        caveats=_caveats(len(differences), source),
    )


def full_finetuning(parameters: int) -> FullFineTuning:
    """The memory of full fine-tuning in fp32: weights, gradients and AdamW's two moments, 16 bytes a parameter.

    The memory model (`shared/estimation/memory_model.py`) uses the same numbers for the parameters of an adapter.
    """
    return FullFineTuning(
        weights_bytes=FP32_BYTES * parameters,
        gradients_bytes=FP32_BYTES * parameters,
        optimizer_bytes=2 * FP32_BYTES * parameters,
        total_bytes=ADAPTER_BYTES * parameters,
    )


def held_bytes(adapted: Adapted) -> int:
    """Bytes of the frozen base in memory: parameters, buffers, and the scales and code books of the quantization."""
    stored: list[torch.Tensor] = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    stored += adapted.buffers()
    return sum(tensor.nbytes for tensor in stored) + sum(_scales(module) for module in adapted.modules())


def _scales(module: torch.nn.Module) -> int:
    """Bytes of a quantized linear's scales and code books, which bitsandbytes does not register as buffers."""
    kept: Iterable[object] = ()
    if isinstance(module, Linear4bit):
        kept = module.weight.quant_state.as_dict().values()
    elif isinstance(module, Linear8bitLt):
        kept = (module.weight.SCB, module.state.SCB)
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def _verdict(interval: tuple[float, float] | None) -> Verdict:
    if interval is None:
        return Verdict.UNKNOWN
    low, high = interval
    return Verdict.BETTER if high < 0 else Verdict.WORSE if low > 0 else Verdict.SAME


def _caveats(rows: int, source: HeldoutSource) -> list[str]:
    caveats = []
    if source == "training_file":
        caveats.append("measured on the training rows themselves: this shows memorization, not generalization")
    if rows == 1:
        caveats.append("a single row was held out, so there is no interval; add a validation file")
    elif rows < FEW_ROWS:
        caveats.append(f"only {rows} rows were held out, so the interval is too narrow; add a validation file")
    return caveats


def _label_caveats(most: Majority, tuned: Score, *, untrained: bool) -> list[str]:
    caveats = []
    if untrained:
        caveats.append("the base's head is untrained, so its score is chance: compare with the majority label instead")
    if tuned.token_accuracy <= most.accuracy:
        caveats.append(
            f"always predicting {most.label!r} is right on {most.accuracy:.1%} of these rows, the tuned model on "
            f"{tuned.token_accuracy:.1%}"
        )
    return caveats


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory.process_peak()
