"""Running out of memory makes a run slower and changes nothing else. In the last test memory really runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.estimation.defaults import PACK_LENGTH
from shared.estimation.fallback import Level, fallback_levels
from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import Child, MakeTask, WriteRows, adapter_bytes, quotes, recipe_of, run
from tests.worker.trainer.scarce_memory import Failing, limit_data, warnings_of, wide_base
from worker.trainer.artifact import metrics_file
from worker.trainer.data.dataset import load, split
from worker.trainer.data.encoding import Encoder
from worker.trainer.forward import fallback
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.layout_probe import layout_of
from worker.trainer.model import adapter_weights
from worker.trainer.model import base as base_module
from worker.trainer.model.base import load_base
from worker.trainer.planning.prepare import prepare
from worker.trainer.protocol import CheckpointSaved, Done, Failed, Measured, Notice, Task, Train
from worker.trainer.training import checkpoint

WIDEST = Layout(packing=True, chunked=True, micro_batch=5, pad=2)


@pytest.fixture
def task(make_task: MakeTask, write_rows: WriteRows) -> Task:
    """Steps of eight rows in micro-batches of four, which draw random numbers."""
    return make_task(
        write_rows(quotes(24)),
        hyperparameters={"n_epochs": 2, "batch_size": 8},
        lora={"dropout": 0.2},
        trainer={"micro_batch": 4, "packing": False, "eval_every": 3, "save_every": 2},
    )


def test_levels_halve_the_micro_batch_then_checkpoint_and_then_stop_packing(llama: str) -> None:
    base = load_base(llama, Quantization.NONE)
    narrow = [replace(WIDEST, micro_batch=rows) for rows in (5, 2, 1)]
    checkpointing = replace(WIDEST, micro_batch=1, checkpointing=True)
    unpacked = replace(checkpointing, packing=False)
    assert fallback.levels(WIDEST, base, longest=PACK_LENGTH) == [*narrow, checkpointing]
    assert fallback.levels(WIDEST, base, longest=PACK_LENGTH - 1) == [*narrow, checkpointing, unpacked]
    assert fallback.levels(checkpointing, base, longest=PACK_LENGTH - 1) == [checkpointing, unpacked]
    assert fallback.levels(replace(checkpointing, packing=False), base, longest=9) == [unpacked]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
def test_the_trainer_has_as_many_levels_as_the_planner_counts(llama: str, checkpointing: bool, packing: bool) -> None:
    base = load_base(llama, Quantization.NONE)
    for micro_batch in (1, 2, 5, 32):
        for longest in (9, PACK_LENGTH - 1, PACK_LENGTH, 300):
            widest = replace(WIDEST, micro_batch=micro_batch, checkpointing=checkpointing, packing=packing)
            counted = fallback_levels(Level(micro_batch, checkpointing, packing), longest=longest)
            assert len(fallback.levels(widest, base, longest=longest)) == len(counted)


@pytest.mark.parametrize("trainer", [{}, {"packing": False}, {"gradient_checkpointing": True}, {"micro_batch": 1}])
def test_the_plan_of_a_job_counts_the_levels_of_its_run(
    llama: str, make_task: MakeTask, write_rows: WriteRows, trainer: dict[str, Any]
) -> None:
    task = make_task(write_rows(quotes(24)), trainer=trainer)
    plan, base, encoder = prepare(task), load_base(llama, Quantization.NONE), Encoder(llama)
    rows = split(load(task, encoder), plan.recipe.max_length, seed=task.seed).train
    layout, _ = layout_of(plan.recipe, base, rows, encoder)
    assert plan.fallback_levels == len(fallback.levels(layout, base, longest=max(map(len, rows))))


def test_lower_levels_give_the_same_result_up_to_rounding(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 and without dropout, so that results can be compared."""
    monkeypatch.setattr(base_module, "_fast_bfloat16", lambda device: False)
    runs = [run(task, tmp_path / str(n), fallback_level=n, dropout=0.0, learning_rate=1e-4) for n in (0, 1, 2)]
    widest, *narrower = [load_file(tmp_path / str(n) / "adapter" / adapter_weights.ADAPTER) for n in (0, 1, 2)]
    assert len({adapter_bytes(tmp_path / str(n)) for n in (0, 1, 2)}) == 3
    for tensors in narrower:
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, widest[name], rtol=1e-3, atol=2e-6)
    losses = [[e.metrics.train_loss or e.metrics.valid_loss for e in found.of(Measured)] for found in runs]
    assert all(found == pytest.approx(losses[0], rel=1e-4) for found in losses)


def test_run_resumed_on_a_lower_level_ends_with_the_same_bytes(task: Task, tmp_path: Path) -> None:
    run(task, tmp_path / "whole", fallback_level=1)
    saved = run(task, tmp_path / "first", fallback_level=1, stop_at=3).of(CheckpointSaved)[-1]
    second = run(task, tmp_path / "second", resume_from=saved.path)
    assert any("micro-batch 4 → 2" in notice.message for notice in second.of(Notice))
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")


def test_failed_step_leaves_no_trace(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the second micro-batch of step 4, after gradients were added and random numbers drawn."""
    saved = run(task, tmp_path / "first", stop_at=3).of(CheckpointSaved)[-1]
    run(task, tmp_path / "expected", resume_from=saved.path, fallback_level=1)
    failing: Failing = Failing(monkeypatch, lambda batch: failing.calls == 2 and len(batch.input_ids) == 4)
    observer = run(task, tmp_path / "found", resume_from=saved.path)
    assert warnings_of(observer) == [
        "out of memory at step 4: micro-batch 4 → 2; the result is the same up to rounding"
    ]
    assert adapter_bytes(tmp_path / "found") == adapter_bytes(tmp_path / "expected")


def test_lowest_level_is_one_example_without_packing(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, lambda batch: torch.is_grad_enabled() and batch.attention_mask is None)
    observer = run(task, tmp_path, packing=True, micro_batch=2)
    assert [message.partition(",")[0] for message in warnings_of(observer)] == [
        "out of memory at step 1: micro-batch 2 → 1; the result is the same up to rounding",
        "out of memory at step 1: activations are recomputed in the backward pass; "
        "the result is the same up to rounding",
        "out of memory at step 1: one example a row",
    ]
    assert observer.of(Done)


def test_evaluation_falls_back_too(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(write_rows(quotes(8)), trainer={"max_steps": 1, "packing": False, "micro_batch": 4})
    Failing(monkeypatch, lambda batch: not torch.is_grad_enabled() and len(batch.input_ids) > 2)
    observer = run(task, tmp_path)
    assert warnings_of(observer) == [
        "out of memory in the evaluation after step 0: micro-batch 4 → 2; the result is the same up to rounding"
    ]
    assert observer.of(Done)


def test_run_fails_on_the_lowest_level_and_leaves_the_base_unchanged(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(task.base_dir, task.quantization)
    names = set(base.model.state_dict())
    monkeypatch.setattr(base_module, "load_base", lambda *args: base)
    Failing(monkeypatch, lambda batch: torch.is_grad_enabled())
    with pytest.raises(MemoryError):
        run(task, tmp_path)
    assert set(base.model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_missing_or_too_high_fallback_levels_are_limited_to_valid_ones(task: Task, tmp_path: Path) -> None:
    saved = run(task, tmp_path / "first", stop_at=2).of(CheckpointSaved)[-1]
    state = Path(saved.path, checkpoint.STATE)
    stored = json.loads(state.read_text())
    del stored["run"]["fallback_level"]
    state.write_text(json.dumps(stored))
    assert run(task, tmp_path / "second", resume_from=saved.path).of(Done)
    assert run(task, tmp_path / "third", resume_from=saved.path, fallback_level=99).of(Done)


def test_child_with_limited_memory_continues_with_smaller_micro_batches(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    """With the wide base, eight rows take over 600 MB, one row a tenth of that; the limit is 350 MB.

    A run with one row comes first, so that the limit counts activations and not libraries. The setting of oneDNN makes
    everything fp32: in bf16 oneDNN itself may reach the limit first, which no process survives.
    """
    task = make_task(
        write_rows([{"text": f"{i} " + "0123456789" * 22} for i in range(8)]),
        base_dir=wide_base(tmp_path / "base"),
        hyperparameters={"n_epochs": 2, "batch_size": 8},
        lora={"r": 2},
        trainer={"packing": False, "eval_every": 9},
    )
    with Child(ONEDNN_MAX_CPU_ISA="AVX2") as child:

        def train(name: str, **changes: Any) -> list[str]:
            """Train to the end and return the warnings."""
            recipe = recipe_of(task, **changes)
            child.send(Train(job=name, task=task, recipe=recipe, work_dir=str(tmp_path / name)))
            warnings = []
            while not isinstance(event := child.next(), Done):
                assert not isinstance(event, Failed), event
                if isinstance(event, Notice) and event.level == "warn":
                    warnings.append(event.message)
            return warnings

        assert train("small", micro_batch=1, total_steps=1) == []
        limit_data(child.process.pid, megabytes=350)
        warnings = train("limited", micro_batch=8)
        limit_data(child.process.pid, megabytes=None)
        assert train("unlimited", micro_batch=8) == []
    assert warnings
    assert all(message.startswith("out of memory ") for message in warnings)
    for name in ("train_loss", "grad_norm"):
        limited, unlimited = (
            [
                getattr(line, name)
                for line in metrics_file.read_metrics(tmp_path / job / "adapter" / metrics_file.METRICS)
            ]
            for job in ("limited", "unlimited")
        )
        assert limited == pytest.approx(unlimited, rel=0.02)
