"""The plan counts exactly what training will see."""

from __future__ import annotations

import pytest

from shared.errors import TrainingFailed
from worker.trainer.prepare import prepare

from .conftest import MakeTask, WriteRows

ROWS = [{"prompt": "p" * 4, "completion": "c" * 4}] * 3


def test_plan_counts_tokens_and_trained_tokens(make_task: MakeTask, write_rows: WriteRows) -> None:
    plan = prepare(make_task(write_rows(ROWS)))
    assert (plan.rows, plan.heldout_rows, plan.tokens, plan.trained_tokens) == (3, 3, 3 * 9, 3 * 5)
    assert plan.longest_row == 9
    assert any("none is held out" in warning for warning in plan.warnings)


def test_plan_tells_what_the_cut_costs(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = [*ROWS, {"prompt": "p" * 8, "completion": "c"}, {"prompt": "p", "completion": "c" * 20}]
    plan = prepare(make_task(write_rows(rows), trainer={"max_length": 8}))
    assert (plan.rows, plan.truncated_rows, plan.dropped_rows) == (5, 5, 1)
    assert plan.tokens == 4 * 8
    assert any("5 rows are cut at 8 tokens" in warning for warning in plan.warnings)
    assert any("1 rows are dropped" in warning for warning in plan.warnings)


def test_nothing_left_to_train_is_refused(make_task: MakeTask, write_rows: WriteRows) -> None:
    with pytest.raises(TrainingFailed, match="first 8 tokens") as failed:
        prepare(make_task(write_rows([{"prompt": "p" * 9, "completion": "c"}]), trainer={"max_length": 8}))
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")
