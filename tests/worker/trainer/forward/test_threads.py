"""Micro-batches in parallel threads give the same results as one after the other."""

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
def test_each_micro_batch_has_the_same_gradient_as_alone(
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
        parallel = list(threads.run_in_order(gradients, batches, 2, before=lambda: None))
        for found, wanted in zip(parallel, alone, strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_a_run_with_threads_is_deterministic_and_resumes_bit_for_bit(
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
def test_an_error_is_raised_after_its_whole_group_has_ended() -> None:
    groups: list[None] = []
    ended: list[int] = []

    def act(batch: Any) -> int:
        if batch == 2:
            raise MemoryError
        (slow if batch == 3 else threading.Event()).wait(0.2)
        ended.append(batch)
        return int(batch)

    slow = threading.Event()
    found = threads.run_in_order(act, iter([0, 1, 2, 3, 4, 5]), 2, before=lambda: groups.append(None))  # type: ignore[arg-type]  # any batch will do
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(MemoryError):
        next(found)
    assert sorted(ended) == [0, 1, 3]
    assert len(groups) == 2


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
def test_threads_are_used_only_if_they_share_no_changing_state(
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
    answer = {"role": "assistant", "content": "felt"}
    rows = (
        quotes(4)
        if method == "supervised"
        else [pair | {"preferred_output": [answer], "non_preferred_output": [answer | {"content": "no"}]}] * 4
    )
    recipe = recipe_of(make_task(write_rows(rows), method=method)).model_copy(update=changes)
    base = load_base(str(tmp_path / "base"), Quantization.NONE)
    assert threads.thread_limit(base, recipe) == expected
