"""The trial of the longest rows finds a lack of memory before step 1, and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer.conftest import (
    Child,
    MakeTask,
    Observer,
    Rows,
    WriteRows,
    adapter_bytes,
    quotes,
    recipe_of,
    run,
)
from tests.worker.trainer.scarce_memory import Failing, limit_data, warnings_of, wide_base
from worker.trainer.artifact import metrics_file
from worker.trainer.model.base import load_base
from worker.trainer.protocol import CheckpointSaved, Done, Measured, Notice, Stopped, Task, Train
from worker.trainer.training import memory_trial
from worker.trainer.training.loop import train


def with_a_long_row(rows: Rows) -> Rows:
    return [*rows, {"text": "hat " * 60}]


@pytest.fixture
def task(make_task: MakeTask, write_rows: WriteRows) -> Task:
    """Short rows and a long one, and 48 steps, each of which draws random numbers."""
    return make_task(
        write_rows(with_a_long_row(quotes(47))),
        hyperparameters={"n_epochs": 2, "batch_size": 2},
        validation_file=write_rows(quotes(3)),
        lora={"dropout": 0.2},
        trainer={"micro_batch": 2, "packing": False, "eval_every": 30, "save_every": 10},
    )


def trial_messages(observer: Observer) -> list[str]:
    return [notice.message for notice in observer.of(Notice) if "longest rows" in notice.message]


def test_trial_leaves_no_trace(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = run(task, tmp_path / "tried")
    (message,) = trial_messages(tried)
    assert message.startswith("tried the longest rows: 2 x ")
    monkeypatch.setattr(memory_trial, "FEWEST_STEPS", 10**9)
    untried = run(task, tmp_path / "untried")
    assert trial_messages(untried) == []
    assert adapter_bytes(tmp_path / "tried") == adapter_bytes(tmp_path / "untried")
    losses = [[event.metrics.train_loss for event in observer.of(Measured)] for observer in (tried, untried)]
    assert losses[0] == losses[1]
    first, second = (observer.of(Done)[0].report for observer in (tried, untried))
    assert first.tuned == second.tuned
    assert ((first.fit and first.fit.rehearsed_bytes) or 0) > 0
    assert second.fit is not None
    assert second.fit.rehearsed_bytes is None


def test_resumed_run_tries_its_remaining_rows_and_ends_with_the_same_bytes(task: Task, tmp_path: Path) -> None:
    run(task, tmp_path / "whole")
    saved = run(task, tmp_path / "first", stop_at=10).of(CheckpointSaved)[-1]
    second = run(task, tmp_path / "second", resume_from=saved.path)
    assert len(trial_messages(second)) == 1
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"total_steps": memory_trial.FEWEST_STEPS - 1}, {"batch_size": 48}])
def test_no_trial_in_a_short_run_or_if_the_first_step_has_the_longest_rows(
    task: Task, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes |= {"total_steps": 24} if "batch_size" in changes else {}
    changes |= {"save_every": 99, "eval_every": None, "micro_batch": 48}
    assert trial_messages(run(task, tmp_path, **changes)) == []


def test_lack_of_memory_is_found_before_the_first_step(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run then equals one that began with the smaller micro-batch."""
    run(task, tmp_path / "expected", fallback_level=1)
    Failing(monkeypatch, lambda batch: torch.is_grad_enabled() and batch.input_ids.numel() > 100)
    found = run(task, tmp_path / "found")
    (warning,) = warnings_of(found)
    assert warning.startswith("out of memory in the trial of the longest rows: micro-batch 2 → 1")
    events = found.events
    narrowed = next(i for i, event in enumerate(events) if isinstance(event, Notice) and event.message == warning)
    assert not any(isinstance(event, Measured) for event in events[:narrowed])
    assert adapter_bytes(tmp_path / "found") == adapter_bytes(tmp_path / "expected")


def test_stop_during_the_trial_leaves_no_trace(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, tried = Observer(), 0
    ordinary = memory_trial.as_after_steps

    def counted(*args: Any) -> Any:
        nonlocal tried
        tried += 1
        return ordinary(*args)

    monkeypatch.setattr(memory_trial, "as_after_steps", counted)
    command = Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(tmp_path))
    train(
        command,
        lambda: load_base(task.base_dir, task.quantization),
        emit=observer.events.append,
        stopping=lambda: tried > 0,
    )
    assert observer.events[-1] == Stopped(job="j", step=0)
    assert observer.of(CheckpointSaved) == []


def test_child_with_limited_memory_falls_back_in_the_trial(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    """With the wide base, two long rows take some 450 MB, one long row half of that, and short rows almost nothing."""
    short = [{"text": f"{i} hats"} for i in range(46)]
    task = make_task(
        write_rows([*short, {"text": "0123456789" * 44}, {"text": "9876543210" * 44}]),
        base_dir=wide_base(tmp_path / "base", positions=512),
        validation_file=write_rows(short[:2]),
        hyperparameters={"n_epochs": 1, "batch_size": 2},
        lora={"r": 2},
        trainer={"packing": False, "eval_every": 99, "save_every": 99},
    )
    with Child(ONEDNN_MAX_CPU_ISA="AVX2") as child:
        small = recipe_of(task, micro_batch=1, total_steps=1)
        child.send(Train(job="small", task=task, recipe=small, work_dir=str(tmp_path / "small")))
        child.until(Done)
        limit_data(child.process.pid, megabytes=270)
        recipe = recipe_of(task, micro_batch=2)
        child.send(Train(job="limited", task=task, recipe=recipe, work_dir=str(tmp_path / "limited")))
        first = child.until(Measured)
        limit_data(child.process.pid, megabytes=None)
        done = child.until(Done)
    assert first.metrics.step == 1
    assert done.fallback_level == 1
    lines = metrics_file.read_metrics(tmp_path / "limited" / "adapter" / metrics_file.METRICS)
    assert len(lines) == recipe.total_steps
