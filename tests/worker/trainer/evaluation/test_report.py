"""A report's numbers equal plain arithmetic on the rows, and its verdict follows from its interval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.estimation import architecture, memory_model
from shared.schemas.requests import Quantization
from shared.schemas.results import Report, Score, Verdict
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes, recipe_of, run
from worker.trainer.data import dataset
from worker.trainer.data.dataset import HeldoutSource
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate, report
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.forward.batches import batches
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import log_likelihood
from worker.trainer.model import adapter_weights
from worker.trainer.model.base import attach, load_base
from worker.trainer.protocol import CheckpointSaved, Done
from worker.trainer.training import checkpoint


def scores(nats: list[float], tokens: int = 10) -> RowScores:
    """Scores of rows with `tokens` tokens each."""
    weights = np.full(len(nats), tokens)
    mean = Score(loss=float(sum(nats)) / int(weights.sum()), token_accuracy=0.5, tokens=int(weights.sum()))
    return RowScores(mean, np.array(nats, np.float32), weights)


NOISE = np.random.default_rng(0).normal(30.0, 8.0, 40)


@pytest.mark.parametrize(
    ("gain", "verdict"), [(-1.0, Verdict.BETTER), (0.0, Verdict.SAME), (0.02, Verdict.SAME), (1.0, Verdict.WORSE)]
)
def test_verdict_follows_from_the_interval(gain: float, verdict: Verdict) -> None:
    """Losses of rows vary by 8 nats, and their changes by 0.5 only: a paired interval detects a change of 1."""
    moved = NOISE + gain + (np.random.default_rng(1).normal(0, 0.5, 40) if gain else 0)
    change = report.change(scores(NOISE.tolist()), scores(moved.tolist()), seed=7, source="validation_file")
    assert (change.verdict, change.rows, change.resamples, change.caveats) == (verdict, 40, 2000, [])
    assert change.low is not None
    assert change.high is not None
    assert change.low <= change.loss <= change.high
    assert change.loss == pytest.approx(float((moved - NOISE).sum()) / 400, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "source", "expected"),
    [
        (40, "validation_file", []),
        (5, "training_file_carved", ["only 5 rows"]),
        (5, "training_file", ["measured on the training rows", "only 5 rows"]),
        (1, "validation_file", ["a single row"]),
    ],
)
def test_caveats_name_the_limits_of_the_interval(rows: int, source: HeldoutSource, expected: list[str]) -> None:
    before, after = scores(NOISE[:rows].tolist()), scores((NOISE[:rows] - 1).tolist())
    change = report.change(before, after, seed=7, source=source)
    assert [caveat[: len(words)] for caveat, words in zip(change.caveats, expected, strict=True)] == expected
    assert change.verdict is (Verdict.UNKNOWN if rows == 1 else Verdict.BETTER)
    assert (change.low is None) == (rows == 1)


def test_perplexity_is_always_finite() -> None:
    assert Score(loss=2.0, token_accuracy=0, tokens=1).perplexity == math.exp(2)
    worst = Score(loss=1e6, token_accuracy=0, tokens=1)
    assert math.isfinite(json.loads(worst.model_dump_json())["perplexity"])
    assert Score.model_validate_json(worst.model_dump_json()) == worst


@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_in_the_order_of_the_rows(
    llama: str, make_task: MakeTask, write_rows: WriteRows, encoder: Encoder, packing: bool
) -> None:
    """Each row has the loss that it has alone, whatever batch it was in."""
    task = make_task(write_rows(quotes(11)))
    rows = dataset.load(task, encoder).train[::-1]
    base = load_base(llama, task.quantization, compute_dtype=torch.float32)
    recipe = recipe_of(task)
    adapted = attach(base, recipe).adapted
    layout = Layout(packing=packing, chunked=True, micro_batch=3, pad=2)
    found = evaluate.score(base, adapted, rows, recipe, adapter=False, layout=layout)
    for row, nats, weight in zip(rows, found.nats, found.weights, strict=True):
        (batch,) = batches([row], packing=False, micro_batch=1, pad=2)
        assert log_likelihood(base.model, batch, layout).nats.item() == pytest.approx(float(nats), rel=1e-4)
        assert row.trained_tokens == weight
    assert found.mean.loss == pytest.approx(float(found.nats.sum()) / int(found.weights.sum()), rel=1e-6)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_reported_sizes_equal_those_in_memory(
    llama: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, quantization: Quantization
) -> None:
    task = make_task(write_rows(quotes(24)), quantization=quantization, trainer={"max_steps": 1})
    found = run(task, tmp_path).of(Done)[0].report
    base = architecture.read_config(json.loads((Path(llama) / "config.json").read_text()))
    frozen = found.total_parameters - found.trainable_parameters
    assert frozen == base.total
    element = 2 if found.compute_dtype == "bfloat16" else 4
    # The memory model does not count 64 bytes of rotary frequencies.
    assert found.base_bytes == pytest.approx(memory_model.weights(base, quantization, element_bytes=element), abs=64)
    assert found.base_fp32_bytes == found.full_finetuning.weights_bytes == 4 * frozen
    full = found.full_finetuning
    assert full.total_bytes == full.weights_bytes + full.gradients_bytes + full.optimizer_bytes == 16 * frozen
    assert found.adapter_bytes == 4 * found.trainable_parameters
    assert found.adapter_bytes < (tmp_path / "adapter" / adapter_weights.ADAPTER).stat().st_size
    # The report rounds to milliseconds, and a step on such a small base takes only a few.
    assert found.trained_tokens / found.tokens_per_second == pytest.approx(found.train_seconds, abs=1e-3)


def test_report_json_is_the_report(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 1})
    found = run(task, tmp_path).of(Done)[0].report
    text = (tmp_path / "adapter" / "report.json").read_text()
    assert Report.model_validate_json(text) == found
    assert json.loads(text)["base"]["perplexity"] == pytest.approx(math.exp(found.base.loss))
    assert found.change.caveats[0].startswith("measured on the training rows")


def test_checkpoint_without_row_scores_can_be_resumed(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(60)), trainer={"max_steps": 2, "save_every": 1})
    whole = run(task, tmp_path / "whole")
    folder = Path(whole.of(CheckpointSaved)[0].path)
    (folder / checkpoint.BASE).unlink()
    resumed = run(task, tmp_path / "second", resume_from=str(folder))
    assert resumed.of(Done)[0].report.change == whole.of(Done)[0].report.change
