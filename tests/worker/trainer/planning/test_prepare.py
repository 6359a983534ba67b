"""The plan counts exactly what training will see."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import TrainingFailed
from tests.tiny import tiny_llama
from tests.worker.trainer.conftest import MakeTask, WriteRows
from worker.trainer.planning.prepare import prepare

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


def test_rows_are_held_out_of_those_that_survive_the_cut(make_task: MakeTask, write_rows: WriteRows) -> None:
    """No seed may carve just the rows that are dropped, and then blame a validation file that nobody gave."""
    rows = [{"prompt": "p" * 9, "completion": "c"}] * 19 + [{"prompt": "p", "completion": "c"}] * 21
    plans = [prepare(make_task(write_rows(rows), trainer={"max_length": 8}, seed=seed)) for seed in range(4)]
    assert [(plan.heldout_rows, plan.dropped_rows) for plan in plans] == [(1, 19)] * 4


def test_validation_file_without_a_usable_row_is_named(make_task: MakeTask, write_rows: WriteRows) -> None:
    bad = write_rows([{"prompt": "p" * 9, "completion": "c"}])
    with pytest.raises(TrainingFailed) as failed:
        prepare(make_task(write_rows(ROWS), validation_file=bad, trainer={"max_length": 8}))
    assert (failed.value.code, failed.value.param) == ("invalid_validation_file", "validation_file")


def test_plan_passes_on_what_the_template_does(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
    plan = prepare(make_task(write_rows([row]), base_dir=str(tmp_path / "base")))
    assert any("<think>" in warning for warning in plan.warnings)


def test_nothing_left_to_train_is_refused(make_task: MakeTask, write_rows: WriteRows) -> None:
    with pytest.raises(TrainingFailed, match="first 8 tokens") as failed:
        prepare(make_task(write_rows([{"prompt": "p" * 9, "completion": "c"}]), trainer={"max_length": 8}))
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")
