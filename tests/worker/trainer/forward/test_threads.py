"""Micro-batches side by side come to what they come to one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.schemas.requests import Quantization
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer import methods
from worker.trainer.data.dataset import load, split
from worker.trainer.data.encoding import Encoder
from worker.trainer.forward import threads
from worker.trainer.forward.batches import Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import attach, load_base, trainable
from worker.trainer.protocol import CheckpointSaved


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.NF4])
@pytest.mark.usefixtures("two_cores")
def test_each_micro_batch_has_the_gradient_that_it_has_alone(
    quantization: Quantization, make_task: MakeTask, write_rows: WriteRows, llama: str
) -> None:
    task = make_task(write_rows(quotes(40)), quantization=quantization)
    recipe = recipe_of(task)
    rows = split(load(task, Encoder(llama)), recipe.max_length, seed=7).train
    base = load_base(llama, quantization)
    adapted = attach(base, recipe).adapted
    parameters = list(trainable(adapted).values())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    layout = Layout(packing=True, chunked=True, micro_batch=2, pad=2, lanes=2)

    def gradients(batch: Batch) -> tuple[torch.Tensor, ...]:
        with base.precision():
            sums = methods.loss(adapted, batch, layout, recipe).sums
        return (sums.detach(), *torch.autograd.grad(sums.sum(), parameters))

    batches = list(layout.split(rows))
    assert len(batches) > 4
    alone = [gradients(batch) for batch in batches]
    for _ in range(3):
        together = list(threads.run_in_order(gradients, batches, 2, before=lambda: None))
        for found, wanted in zip(together, alone, strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_run_in_lanes_is_the_same_each_time_and_resumes_bit_for_bit(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, two_cores: None
) -> None:
    task = make_task(write_rows(quotes(60)), torch_threads=2, hyperparameters={"n_epochs": 2, "batch_size": 16})
    run(task, tmp_path / "once", micro_batch=2)
    run(task, tmp_path / "again", micro_batch=2)
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "once")
    saved = run(task, tmp_path / "first", micro_batch=2, stop_at=4).of(CheckpointSaved)[-1].path
    run(task, tmp_path / "second", micro_batch=2, resume_from=saved)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "once")


@pytest.mark.usefixtures("two_cores")
def test_error_of_one_is_raised_when_its_round_has_ended() -> None:
    rounds: list[None] = []
    ended: list[int] = []

    def act(batch: Any) -> int:
        if batch == 2:
            raise MemoryError
        (slow if batch == 3 else threading.Event()).wait(0.2)
        ended.append(batch)
        return int(batch)

    slow = threading.Event()
    found = threads.run_in_order(act, iter([0, 1, 2, 3, 4, 5]), 2, before=lambda: rounds.append(None))  # type: ignore[arg-type]  # any batch will do
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(MemoryError):
        next(found)
    assert sorted(ended) == [0, 1, 3]
    assert len(rounds) == 2


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("method", "changes", "config", "expected"),
    [
        ("supervised", {"micro_batch": 8}, {}, 2),
        ("supervised", {"micro_batch": 1}, {}, 1),
        ("supervised", {"micro_batch": 8, "dropout": 0.1}, {}, 1),
        ("supervised", {"micro_batch": 8, "quantization": Quantization.INT8}, {}, 1),
        ("dpo", {"micro_batch": 8}, {}, 1),
        ("supervised", {"micro_batch": 8}, {"attention_dropout": 0.1}, 1),
        ("supervised", {"micro_batch": 8}, {"model_type": "opt", "dropout": 0.1}, 1),
        ("supervised", {"micro_batch": 8}, {"model_type": "opt", "dropout": 0.0}, 2),
        (
            "supervised",
            {"micro_batch": 8},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            1,
        ),
    ],
)
def test_lanes_only_where_they_share_nothing_that_changes(
    method: Any,
    changes: dict[str, Any],
    config: dict[str, Any],
    expected: int,
    make_task: MakeTask,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    tiny_base(tmp_path / "base", **({"model_type": "llama"} | config))
    pair = {"input": {"messages": [{"role": "user", "content": "hat"}]}}
    said = {"role": "assistant", "content": "felt"}
    rows = (
        quotes(4)
        if method == "supervised"
        else [pair | {"preferred_output": [said], "non_preferred_output": [said | {"content": "no"}]}] * 4
    )
    recipe = recipe_of(make_task(write_rows(rows), method=method)).model_copy(update=changes)
    base = load_base(str(tmp_path / "base"), Quantization.NONE)
    assert threads.thread_limit(base, recipe) == expected
