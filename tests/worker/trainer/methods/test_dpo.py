"""DPO's loss equals the paper's formula in every layout, and a complete run learns which answer is preferred."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from shared.errors import TrainingFailed
from shared.schemas.requests import Quantization
from shared.schemas.results import Recipe
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows, adapter_bytes, quotes, recipe_of, run
from tests.worker.trainer.rows import preferences
from worker.trainer import methods
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder, Pair, Row
from worker.trainer.forward import layout_probe
from worker.trainer.forward.batches import batches
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base, attach, detach, load_base, trainable
from worker.trainer.protocol import CheckpointSaved, Done, Measured

BETA = 0.5


@pytest.fixture
def rows(encoder: Encoder, make_task: MakeTask, write_rows: WriteRows) -> list[Row]:
    return dataset.load(make_task(write_rows(preferences(7)), method="dpo"), encoder).train


@pytest.fixture
def recipe(make_task: MakeTask, write_rows: WriteRows) -> Recipe:
    return recipe_of(make_task(write_rows(preferences(7)), method="dpo"), beta=BETA)


@pytest.fixture
def base(llama: str) -> Base:
    return load_base(llama, Quantization.NONE, compute_dtype=torch.float32)


def layout(**changes: Any) -> Layout:
    return Layout(**{"packing": True, "chunked": True, "micro_batch": 8, "pad": 2} | changes)


def with_adapter(base: Base, recipe: Recipe) -> Any:
    """The base with an adapter that has an effect."""
    torch.manual_seed(0)
    adapted = attach(base, recipe).adapted
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def log_probability(adapted: Any, document: Encoded) -> torch.Tensor:
    """The log-probability of a document's trained tokens, by the model's own logits."""
    ids = torch.from_numpy(document.ids).long()[None]
    each = functional.cross_entropy(adapted(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return -each[torch.from_numpy(document.trained[1:])].sum()


def test_loss_and_gradient_equal_the_papers_in_every_layout(base: Base, rows: list[Row], recipe: Recipe) -> None:
    adapted = with_adapter(base, recipe)
    parameters = list(trainable(adapted).values())
    wanted, margins = torch.zeros(()), []
    for row in rows:
        assert isinstance(row, Pair)
        with torch.no_grad(), adapted.disable_adapter():
            reference = [log_probability(adapted, document) for document in row.documents]
        gains = [log_probability(adapted, d) - r for d, r in zip(row.documents, reference, strict=True)]
        margins.append(BETA * (gains[0] - gains[1]))
        wanted = wanted - functional.logsigmoid(margins[-1]) / len(rows)
    wanted_gradients = torch.autograd.grad(wanted, parameters)
    for packing, chunked, micro_batch in itertools.product((True, False), (True, False), (1, 3)):
        found = layout(packing=packing, chunked=chunked, micro_batch=micro_batch)
        adapted.zero_grad()
        tally = methods.Tally()
        for batch in batches(rows, packing=packing, micro_batch=micro_batch, pad=2):
            loss = methods.loss(adapted, batch, found, recipe)
            torch.autograd.backward(loss.sums.sum() / methods.weight(rows, recipe))
            tally.add(loss)
        score = tally.score()
        assert score.loss == pytest.approx(wanted.item(), rel=1e-4)
        assert score.reward_margin == pytest.approx(sum(m.item() for m in margins) / len(rows), rel=1e-3, abs=1e-6)
        assert score.reward_accuracy == sum(m > 0 for m in margins) / len(rows)
        for parameter, gradient in zip(parameters, wanted_gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_a_gradient_reaches_the_adapter_in_the_compute_type(
    llama: str, rows: list[Row], recipe: Recipe, quantization: Quantization
) -> None:
    """The reference pass under autocast must not leave casts in a cache, which would have no gradient."""
    base = load_base(llama, quantization)
    adapted = with_adapter(base, recipe)
    with base.precision():
        [batch] = batches(rows, packing=True, micro_batch=8, pad=2)
        loss = methods.loss(adapted, batch, layout(), recipe)
    torch.autograd.backward(loss.sums.sum())
    gradients = [p.grad for p in trainable(adapted).values()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert adapted.training


@pytest.mark.parametrize("quantization", list(Quantization))
def test_a_new_adapter_equals_the_reference(
    llama: str, rows: list[Row], recipe: Recipe, quantization: Quantization
) -> None:
    """Bit for bit, although training uses a forward of its own."""
    base = load_base(llama, quantization)
    adapted = attach(base, recipe).adapted
    tally = methods.Tally()
    for batch in batches(rows, packing=True, micro_batch=8, pad=2):
        with base.precision():
            tally.add(methods.loss(adapted, batch, layout(), recipe))
    score = tally.score()
    assert score.loss == pytest.approx(math.log(2))
    assert (score.reward_accuracy, score.reward_margin) == (0.5, 0.0)


def test_a_bases_own_dropout_is_off_during_training_and_restored(
    rows: list[Row], recipe: Recipe, tmp_path: Path
) -> None:
    """Otherwise the reference, which is the same model, would differ at random."""
    tiny_base(tmp_path, "gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    base = load_base(str(tmp_path), Quantization.NONE)
    attached = attach(base, recipe)
    [batch] = batches(rows, packing=True, micro_batch=8, pad=2)
    with base.precision():
        margins = methods.loss(attached.adapted, batch, layout(), recipe).margins
    assert margins is not None
    assert not margins.any()
    detach(attached)
    assert {m.p for m in base.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_pairs_longer_than_the_context_are_padded_within_it(
    make_task: MakeTask, write_rows: WriteRows, encoder: Encoder, tmp_path: Path
) -> None:
    """A packed row of two documents may be longer. GPT-2 looks up every position in a table, even of padding."""
    tiny_base(tmp_path, "gpt2")
    long = {"prompt": "a ", "chosen": "b" * 200, "rejected": "c" * 190}
    task = make_task(write_rows([long, *preferences(5)]), method="dpo", base_dir=str(tmp_path))
    base, recipe = load_base(str(tmp_path), Quantization.NONE), recipe_of(task)
    adapted, rows = attach(base, recipe).adapted, dataset.load(task, encoder).train
    [batch] = batches(rows, packing=True, micro_batch=9, pad=2)
    assert batch.input_ids.shape[1] > 256 > int(batch.position_ids.max())
    assert methods.loss(adapted, batch, layout(), recipe).sums.isfinite().all()


def test_a_pair_of_equal_answers_is_not_learnable(encoder: Encoder, rows: list[Row]) -> None:
    pair = rows[1]
    assert isinstance(pair, Pair)
    assert pair.learnable
    assert not Pair(pair.chosen, pair.chosen).learnable


def test_pairs_stay_together_and_every_document_appears_once(rows: list[Row]) -> None:
    for packing, micro_batch in itertools.product((True, False), (1, 2, 9)):
        found = list(batches(rows, packing=packing, micro_batch=micro_batch, pad=2))
        assert sorted(line for batch in found for line in batch.lines[0::2]) == [row.line for row in rows]
        assert all(batch.lines[0::2] == batch.lines[1::2] for batch in found)


def test_the_layout_probe_accepts_pairs(base: Base, rows: list[Row]) -> None:
    assert layout_probe.layout(base, rows, packing=True, micro_batch=1, pad=2)[0].packing


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_run_learns_what_is_preferred_and_resumes_bit_for_bit(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, stop_at: int
) -> None:
    task = make_task(
        write_rows(preferences(24)),
        method="dpo",
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        lora={"dropout": 0.1},
        trainer={"eval_every": 4, "micro_batch": 1},
    )
    whole = run(task, tmp_path / "whole", learning_rate=3e-3)
    report = whole.of(Done)[0].report
    assert report.base.loss == pytest.approx(math.log(2))
    assert report.tuned.loss < 0.3
    assert report.tuned.reward_accuracy == 1.0
    assert [m.metrics.train_reward_margin is not None for m in whole.of(Measured) if m.metrics.train_loss]
    first = run(task, tmp_path / "first", learning_rate=3e-3, stop_at=stop_at)
    saved = first.of(CheckpointSaved)[-1]
    run(task, tmp_path / "second", learning_rate=3e-3, resume_from=saved.path)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("rows", "method", "found"),
    [(preferences(2), "supervised", "preference"), (quotes(2), "dpo", "text")],
    ids=["supervised", "dpo"],
)
def test_rows_of_the_other_method_are_refused(
    make_task: MakeTask, write_rows: WriteRows, encoder: Encoder, rows: Rows, method: str, found: str
) -> None:
    with pytest.raises(TrainingFailed, match=f"found {found} rows; method '{method}'") as failed:
        dataset.load(make_task(write_rows(rows), method=method), encoder)
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")
