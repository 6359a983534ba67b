"""The plan counts exactly what training will see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrainingFailed
from shared.estimation.estimate import EstimateCreate, estimate, from_plan
from tests.tiny import tiny_llama
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes
from worker.trainer.planning.prepare import prepare

ROWS = [{"prompt": "p" * 4, "completion": "c" * 4}] * 3


def test_plan_counts_tokens_and_trained_tokens(make_task: MakeTask, write_rows: WriteRows) -> None:
    plan = prepare(make_task(write_rows(ROWS)))
    assert (plan.rows, plan.heldout_rows, plan.tokens, plan.trained_tokens) == (3, 3, 3 * 9, 3 * 5)
    assert plan.longest_row == 9
    assert any("none is held out" in warning for warning in plan.warnings)


def test_plan_counts_rows_that_are_cut_or_dropped(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = [*ROWS, {"prompt": "p" * 8, "completion": "c"}, {"prompt": "p", "completion": "c" * 20}]
    plan = prepare(make_task(write_rows(rows), trainer={"max_length": 8}))
    assert (plan.rows, plan.truncated_rows, plan.dropped_rows) == (5, 5, 1)
    assert plan.tokens == 4 * 8
    assert any("5 rows are cut at 8 tokens" in warning for warning in plan.warnings)
    assert any("1 rows are dropped" in warning for warning in plan.warnings)


def test_rows_are_held_out_of_those_left_after_the_cut(make_task: MakeTask, write_rows: WriteRows) -> None:
    """Otherwise a seed could hold out only rows that are dropped, and the error would blame a validation file."""
    rows = [{"prompt": "p" * 9, "completion": "c"}] * 19 + [{"prompt": "p", "completion": "c"}] * 21
    plans = [prepare(make_task(write_rows(rows), trainer={"max_length": 8}, seed=seed)) for seed in range(4)]
    assert [(plan.heldout_rows, plan.dropped_rows) for plan in plans] == [(1, 19)] * 4


def test_validation_file_without_a_usable_row_is_named(make_task: MakeTask, write_rows: WriteRows) -> None:
    bad = write_rows([{"prompt": "p" * 9, "completion": "c"}])
    with pytest.raises(TrainingFailed) as failed:
        prepare(make_task(write_rows(ROWS), validation_file=bad, trainer={"max_length": 8}))
    assert (failed.value.code, failed.value.param) == ("invalid_validation_file", "validation_file")


def test_plan_contains_the_warnings_of_the_chat_template(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
    plan = prepare(make_task(write_rows([row]), base_dir=str(tmp_path / "base")))
    assert any("<think>" in warning for warning in plan.warnings)


def test_file_without_a_trained_token_is_refused(make_task: MakeTask, write_rows: WriteRows) -> None:
    with pytest.raises(TrainingFailed, match="first 8 tokens") as failed:
        prepare(make_task(write_rows([{"prompt": "p" * 9, "completion": "c"}]), trainer={"max_length": 8}))
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize("trainer", [{}, {"max_steps": 3}, {"max_length": 16, "packing": False}], ids=str)
@pytest.mark.parametrize("count", [5, 24, 300])
def test_an_estimate_from_a_plan_has_the_numbers_of_its_recipe(
    llama: str, make_task: MakeTask, write_rows: WriteRows, count: int, trainer: dict[str, Any]
) -> None:
    plan = prepare(make_task(write_rows(quotes(count)), trainer=trainer))
    config = json.loads((Path(llama) / "config.json").read_text())
    answer = estimate(EstimateCreate.model_validate({"model": "tiny", "trainer": trainer}), config, from_plan(plan))
    recipe = plan.recipe
    assert (answer.n_epochs, answer.micro_batch, answer.r) == (recipe.n_epochs, recipe.micro_batch, recipe.r)
    assert answer.max_length == min(plan.longest_row, recipe.max_length)
