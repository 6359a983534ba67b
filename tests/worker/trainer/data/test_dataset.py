"""Which rows are trained on, which are held out, and in what order."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import TrainingFailed
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder
from worker.trainer.planning.prepare import prepare


def row(line: int, length: int, *, prompt: int = 0) -> Encoded:
    return Encoded(line, np.arange(length, dtype=np.int32), np.arange(length) >= prompt)


@pytest.mark.parametrize(
    ("rows", "heldout", "source"),
    [
        (3, 3, "training_file"),
        (19, 19, "training_file"),
        (20, 1, "training_file_carved"),
        (100, 5, "training_file_carved"),
    ],
)
def test_rows_are_held_out_of_the_training_file(
    encoder: Encoder, make_task: MakeTask, write_rows: WriteRows, rows: int, heldout: int, source: str
) -> None:
    task = make_task(write_rows(quotes(rows)))
    loaded = dataset.load(task, encoder).train
    train, held, found = dataset.carve(loaded, seed=task.seed)
    assert (len(loaded), len(held), found) == (rows, heldout, source)
    assert {r.line for r in train} | {r.line for r in held} == set(range(1, rows + 1))
    if source == "training_file_carved":
        assert len(train) == rows - heldout
    again = dataset.carve(dataset.load(task, encoder).train, seed=task.seed)[1]
    assert [r.line for r in again] == [r.line for r in held]


def test_all_rows_of_a_validation_file_are_held_out(
    encoder: Encoder, make_task: MakeTask, write_rows: WriteRows
) -> None:
    task = make_task(write_rows(quotes(30)), validation_file=write_rows(quotes(4)))
    found = dataset.load(task, encoder)
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (30, 4)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_csv_and_parquet_give_the_same_plan_as_json_lines(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, kind: str
) -> None:
    rows = quotes(24)
    path = tmp_path / "sha256"  # the trainer's copy has no file extension
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert prepare(make_task(str(path))) == prepare(make_task(write_rows(rows)))


def test_tick_is_called_for_each_good_or_bad_row(encoder: Encoder, make_task: MakeTask, write_rows: WriteRows) -> None:
    task = make_task(write_rows(quotes(3)), validation_file=write_rows([*quotes(2), {"txt": "x"}]))
    ticks: list[None] = []
    with pytest.raises(TrainingFailed):
        dataset.load(task, encoder, tick=lambda: ticks.append(None))
    assert len(ticks) == 6


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_bad_lines_are_named(encoder: Encoder, make_task: MakeTask, write_rows: WriteRows, param: str) -> None:
    good = write_rows(quotes(3))
    bad = write_rows([*quotes(2), {"text": ""}, *quotes(1), {"txt": "x"}])
    task = make_task(bad) if param == "training_file" else make_task(good, validation_file=bad)
    with pytest.raises(TrainingFailed) as failed:
        dataset.load(task, encoder)
    assert (failed.value.code, failed.value.param) == (f"invalid_{param}", param)
    assert "2 bad rows: line 3: text" in failed.value.message
    assert "line 5" in failed.value.message


def test_truncated_rows_are_counted_and_rows_without_trained_tokens_dropped() -> None:
    fitted = dataset.fit([row(1, 5), row(2, 12), row(3, 12, prompt=10)], 10)
    assert ([r.line for r in fitted.kept], fitted.truncated, fitted.dropped) == ([1, 2], 2, 1)
    assert len(fitted.kept[1]) == 10


def test_the_order_of_an_epoch_is_computed_once() -> None:
    assert dataset.epoch_order(9, seed=1, epoch=0) is dataset.epoch_order(9, seed=1, epoch=0)


def test_each_epoch_has_every_row_once_in_a_different_order() -> None:
    rows = [row(i, 3) for i in range(10)]
    steps = [dataset.step_examples(rows, step, batch_size=4, seed=1) for step in range(6)]
    assert [len(examples) for examples in steps] == [4, 4, 2, 4, 4, 2]
    first = [r.line for examples in steps[:3] for r in examples]
    second = [r.line for examples in steps[3:] for r in examples]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != [r.line for s in range(3) for r in dataset.step_examples(rows, s, batch_size=4, seed=2)]
