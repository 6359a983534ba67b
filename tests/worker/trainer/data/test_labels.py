"""Labels: their order, errors and warnings of `prepare`, and macro F1 on numbers computed by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from shared.errors import TrainingFailed
from shared.schemas.results import Plan
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows
from worker.trainer.data import labels
from worker.trainer.planning.prepare import prepare


def rows_of(*found: str | int) -> Rows:
    return [{"text": f"hat {i}", "label": label} for i, label in enumerate(found)]


@pytest.fixture
def plan(make_task: MakeTask, write_rows: WriteRows) -> Any:
    def make(train: Rows, validation: Rows | None = None, **fields: Any) -> Plan:
        held = write_rows(validation) if validation else None
        return prepare(make_task(write_rows(train), validation_file=held, method="classification", **fields))

    return make


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (("wool", "felt", "wool"), ["felt", "wool"]),
        ((10, 9, -1), ["-1", "9", "10"]),
        (("10", 9, "9"), ["9", "10"]),
        (("10", "9", "none"), ["10", "9", "none"]),
    ],
)
def test_labels_are_ordered_by_value_or_by_name(plan: Any, found: tuple[str | int, ...], wanted: list[str]) -> None:
    made = plan(rows_of(*found))
    assert made.recipe.labels == wanted
    counts = Counter(map(str, found))
    assert [(one.label, one.rows) for one in made.data.labels] == [(label, counts[label]) for label in wanted]
    assert (made.recipe.packing, made.recipe.method, made.recipe.n_epochs) == (False, "classification", 10)
    assert made.data.format == "classification"


@pytest.mark.parametrize(
    ("train", "validation", "param", "expected"),
    [
        (("felt", "felt"), None, "training_file", "found one label, 'felt'"),
        (range(1001), None, "training_file", "found 1,001 labels, '0', '1', '2', '3', '4', …"),
        (("felt", "wool"), ("wool", "silk", "cord", "silk"), "validation_file",
         "line 2: label: found 'silk', which no row of the training file has, nor 1 other labels"),
    ],
)  # fmt: skip
def test_invalid_labels_are_errors(
    plan: Any, train: tuple[str, ...], validation: tuple[str, ...] | None, param: str, expected: str
) -> None:
    with pytest.raises(TrainingFailed) as failed:
        plan(rows_of(*train), rows_of(*validation) if validation else None)
    assert (failed.value.code, failed.value.param) == (f"invalid_{param}", param)
    assert expected in failed.value.message
    assert failed.value.hint


def test_rare_and_unbalanced_labels_give_warnings(plan: Any) -> None:
    warned = plan(rows_of(*["felt"] * 90, *["wool"] * 8, *["silk"] * 2)).warnings
    assert any("1 label has fewer than 8 rows ('silk')" in warning for warning in warned)
    assert any("90% of the rows have the label 'felt'" in warning for warning in warned)
    assert not any("stop token" in warning for warning in warned)
    even = plan(rows_of(*["felt", "wool"] * 60)).warnings
    assert not any("label" in warning for warning in even)


def test_a_label_with_all_rows_held_out_gives_a_warning(plan: Any) -> None:
    plans = [plan(rows_of(*["felt"] * 19, "silk"), seed=seed) for seed in range(40)]
    warned = [any("all rows of 'silk' are held out" in warning for warning in one.warnings) for one in plans]
    assert set(warned) == {True, False}


def test_two_texts_without_a_separator_give_a_warning(plan: Any, bert: str) -> None:
    rows = [row | {"text_pair": "of felt"} for row in rows_of("felt", "wool")]
    decoder, encoder = (plan(rows, **where).warnings for where in ({}, {"base_dir": bert}))
    assert any(
        "2 rows are two texts, and the base's tokenizer puts nothing between them" in warning for warning in decoder
    )
    assert not any("two texts" in warning for warning in encoder)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("supervised", "generates no text, which method 'supervised' needs"),
        ("dpo", "generates no text, which method 'dpo' needs"),
    ],
)
def test_an_encoder_supports_classification_only(
    make_task: MakeTask, write_rows: WriteRows, bert: str, kind: Any, expected: str
) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} if kind == "dpo" else {"text": "a hat"}
    with pytest.raises(TrainingFailed, match=expected) as failed:
        prepare(make_task(write_rows([row]), base_dir=bert, method=kind))
    assert (failed.value.code, failed.value.param) == ("unsupported_base_model", "model")
    assert "classification" in (failed.value.hint or "")


def test_macro_f1() -> None:
    assert labels.macro_f1({(0, 0): 3, (1, 1): 1}) == 1
    # Precision and recall: 2/3 and 1 for label 0, 1 and 1/2 for label 1. Label 2 is predicted once and never true.
    answers = {(0, 0): 2, (1, 0): 1, (1, 1): 1}
    assert labels.macro_f1(answers) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert labels.macro_f1(answers | {(0, 2): 1}) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
