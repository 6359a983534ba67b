"""Micro-batch and checkpointing are chosen by device memory, and a job that fits nowhere is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import TrainingFailed
from shared.schemas.memory import Kind, KnownDevice, Weighing
from shared.schemas.results import Recipe
from tests.results import RECIPE
from tests.shared.architectures import REAL
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes
from worker.trainer.data.encoding import Encoded
from worker.trainer.planning.prepare import prepare
from worker.trainer.planning.sizing import Sized, size
from worker.trainer.protocol import Task

GB = 10**9
LLAMA_8B = dict(REAL["Llama-3.1-8B"][1])


@pytest.fixture
def sized(tmp_path: Path, make_task: MakeTask) -> Any:
    def choose(devices: list[KnownDevice], *, length: int = 512, config: Any = LLAMA_8B, **trainer: Any) -> Sized:
        (tmp_path / "config.json").write_text(json.dumps(config))
        task: Task = make_task("", base_dir=str(tmp_path), trainer=trainer, devices=devices)
        rows = [row(i, length) for i in range(64)]
        checkpointing = task.trainer.gradient_checkpointing
        recipe: Recipe = RECIPE.model_copy(
            update={
                "batch_size": 32,
                "total_steps": 2,
                "max_length": 2048,
                "micro_batch": 4 if task.trainer.micro_batch == "auto" else task.trainer.micro_batch,
                "gradient_checkpointing": None if checkpointing == "auto" else checkpointing,
            }
        )
        return size(task, recipe, rows)

    return choose


def row(line: int, length: int) -> Encoded:
    return Encoded(line, np.zeros(length, np.int32), np.ones(length, bool))


def device(gigabytes: float, kind: Kind = "cuda", **fields: Any) -> KnownDevice:
    return KnownDevice(kind=kind, name=f"{kind} {gigabytes:g}", memory_bytes=round(gigabytes * GB), **fields)


@pytest.mark.parametrize(
    ("devices", "micro_batch", "checkpointing"),
    [
        ([device(160)], 32, False),
        ([device(26)], 4, False),
        ([device(24)], 32, True),
        ([device(16)], 16, True),
        ([device(9)], 4, True),
        ([device(160), device(16)], 16, True),
        ([device(160), device(2)], 32, False),
        ([device(160, "cpu")], 4, False),
        ([device(13, "cpu")], 1, False),
        ([device(9, "cpu")], 2, True),
    ],
    ids=lambda value: ",".join(one.name for one in value) if isinstance(value, list) else str(value),
)
def test_auto_is_the_largest_that_fits_every_device(
    sized: Any, devices: list[KnownDevice], micro_batch: int, checkpointing: bool
) -> None:
    found: Sized = sized(devices)
    assert (found.recipe.micro_batch, found.recipe.gradient_checkpointing) == (micro_batch, checkpointing)
    assert found.fit is not None
    assert (found.fit.rows, found.fit.length) == (micro_batch, 512)
    fitting = [peak for peak in found.fit.peaks if peak.fits]
    assert fitting
    assert all(peak.predicted_bytes <= 0.9 * (peak.memory_bytes or 0) for peak in fitting)


@pytest.mark.parametrize(
    ("asked", "micro_batch", "checkpointing"),
    [
        ({"gradient_checkpointing": True}, 32, True),
        ({"gradient_checkpointing": False}, 8, False),
        ({"micro_batch": 2}, 2, False),
        ({"micro_batch": 30}, 30, True),
    ],
)
def test_given_settings_are_kept(sized: Any, asked: dict[str, Any], micro_batch: int, checkpointing: bool) -> None:
    found: Sized = sized([device(48)], **asked)
    assert (found.recipe.micro_batch, found.recipe.gradient_checkpointing) == (micro_batch, checkpointing)
    assert found.warnings == []


def test_a_given_micro_batch_that_does_not_fit_causes_a_warning(sized: Any) -> None:
    """The trainer lowers it by itself when memory runs out."""
    found: Sized = sized([device(10)], micro_batch=64)
    assert found.recipe.micro_batch == 64
    (warning,) = found.warnings
    assert warning.startswith("micro-batch 64 needs about ")
    assert "cuda 10 has 10.0: there, memory will run out" in warning


def test_without_a_known_device_both_kinds_are_predicted_and_nothing_is_chosen(sized: Any) -> None:
    found: Sized = sized([])
    assert (found.recipe.micro_batch, found.recipe.gradient_checkpointing) == (4, None)
    assert found.fit is not None
    assert [(peak.kind, peak.name, peak.fits) for peak in found.fit.peaks] == [
        ("cuda", None, None),
        ("cpu", None, None),
    ]


def test_a_job_that_fits_nowhere_fails_and_names_a_change_that_would_fit(sized: Any) -> None:
    with pytest.raises(TrainingFailed) as failed:
        sized([device(7), device(4)], length=2048)
    assert (failed.value.code, failed.value.param) == ("does_not_fit", "trainer.max_length")
    assert "7.0 GB (cuda 7), 4.0 GB (cuda 4)" in failed.value.message
    assert (failed.value.hint or "").startswith("trainer.max_length = ")
    with pytest.raises(TrainingFailed, match="the longest row alone needs") as hopeless:
        sized([device(2)])
    assert hopeless.value.param == "model"
    assert "take a smaller base" in (hopeless.value.hint or "")


def test_earlier_runs_correct_the_choice(sized: Any) -> None:
    plain: Sized = sized([device(26)])
    assert plain.fit is not None
    (peak,) = plain.fit.peaks
    weighing = Weighing(computed_bytes=peak.computed_bytes, measured_bytes=round(1.5 * peak.computed_bytes))
    found: Sized = sized([device(26, weighings=[weighing])])
    assert found.fit is not None
    (corrected,) = found.fit.peaks
    assert corrected.predicted_bytes == pytest.approx(1.5 * corrected.computed_bytes)
    assert found.recipe.gradient_checkpointing is True


def test_an_unknown_architecture_is_not_predicted(sized: Any) -> None:
    found: Sized = sized([device(1)], config={"model_type": "mamba"})
    assert found.fit is None
    assert found.recipe.micro_batch == 4


def test_a_plan_contains_the_choice(make_task: MakeTask, write_rows: WriteRows) -> None:
    file = write_rows(quotes(24))
    plan = prepare(make_task(file, devices=[device(16, "cpu")]))
    assert plan.fit is not None
    assert plan.fit.peaks[0].fits is True
    assert plan.recipe.gradient_checkpointing is False
    with pytest.raises(TrainingFailed, match=r"the workers have 0\.1 GB"):
        prepare(make_task(file, devices=[device(0.1, "cpu")]))
