"""The data report: its numbers on rows with known values, and the warnings that follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import TrainingFailed
from shared.schemas.results import DataReport, FileReport, Plan
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows, quotes
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder, Row
from worker.trainer.data.statistics import statistics
from worker.trainer.planning.prepare import prepare

BOS = "<|bos|>"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose tokenizer has a BOS but does not add it; rows may write it."""
    folder = tmp_path_factory.mktemp("bos")
    tiny_llama(folder)
    tiny_tokenizer(bos_token=BOS).save_pretrained(folder)
    return str(folder)


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def report(plan: Plan) -> DataReport:
    assert plan.data is not None
    return plan.data


def test_all_numbers_of_a_known_file_are_right(make_task: MakeTask, write_rows: WriteRows, encoder: Encoder) -> None:
    rows = [*({"text": "hat " * n} for n in (1, 2, 4, 8, 16)), {"text": "hat " * 2}, {"text": "hat " * 2}]
    found = report(prepare(make_task(write_rows(rows), trainer={"max_length": 10})))
    lengths = sorted(len(row) for row in dataset.load(make_task(write_rows(rows)), encoder).train)
    assert (found.rows, found.bad_rows, found.format, found.chat_template_sha256) == (7, 0, "text", None)
    assert (found.tokens, found.trained_tokens) == (sum(lengths), sum(lengths) - 7)
    assert (found.length_p50, found.length_p95, found.length_max) == (lengths[3], lengths[6], lengths[6])
    assert sum(bucket.rows for bucket in found.lengths) == 7
    for bucket in found.lengths:
        assert bucket.rows == sum(bucket.upto // 2 < length <= bucket.upto for length in lengths)
    over = sum(length > 10 for length in lengths)
    assert (found.truncated_rows, found.dropped_rows, found.stop_rows) == (over, 0, 7 - over)
    assert found.stop_token == "<|im_end|>"
    assert (found.duplicate_rows, [(r.line, r.of) for r in found.duplicates]) == (2, [(6, 2), (7, 2)])
    assert (found.heldout_overlap_rows, found.double_bos_rows) == (0, 0)


def test_a_clean_file_gives_no_warnings(make_task: MakeTask, write_rows: WriteRows) -> None:
    plan = prepare(make_task(write_rows([chat(f"hat {i}?", f"felt {i}") for i in range(120)])))
    found = report(plan)
    assert (found.rows, found.format, found.stop_rows) == (120, "chat", 120)
    assert (found.duplicate_rows, found.heldout_overlap_rows, found.truncated_rows) == (0, 0, 0)
    assert len(found.chat_template_sha256 or "") == 64
    assert plan.warnings == []


def test_duplicates_and_heldout_rows_that_are_trained_on_are_named(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = quotes(30)
    plan = prepare(
        make_task(write_rows([*rows, rows[2], rows[4]]), validation_file=write_rows([rows[9], *quotes(40)[38:]]))
    )
    found = report(plan)
    assert [(r.line, r.of) for r in found.duplicates] == [(31, 3), (32, 5)]
    assert (found.heldout_overlap_rows, [(r.line, r.of) for r in found.heldout_overlap]) == (1, [(1, 10)])
    assert any("2 rows (6%) repeat an earlier one (line 31 is line 3, line 32 is line 5)" in w for w in plan.warnings)
    assert any("1 of 3 held-out rows are also trained on (line 1 is line 10)" in w for w in plan.warnings)


def test_a_heldout_row_with_a_duplicate_in_the_training_rows_is_found(
    make_task: MakeTask, write_rows: WriteRows
) -> None:
    """Every row occurs twice, so each held-out row is also trained on."""
    found = report(prepare(make_task(write_rows([*quotes(30), *quotes(30)]))))
    assert (found.duplicate_rows, len(found.duplicates), found.heldout_overlap_rows) == (30, 10, 3)


def test_rows_with_two_bos_are_counted(with_bos: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    rows: Rows = [*quotes(3), {"text": f"{BOS}{BOS}hat"}, {"text": f"{BOS}hat"}]
    plan = prepare(make_task(write_rows(rows), base_dir=with_bos))
    assert report(plan).double_bos_rows == 1
    assert any("1 rows begin with two beginning-of-sequence tokens" in warning for warning in plan.warnings)


def test_truncation_that_removes_the_stop_token_gives_a_warning(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = [{"prompt": "", "completion": "hat " * 30} for _ in range(3)] + [{"prompt": "hat " * 30, "completion": "x"}]
    plan = prepare(make_task(write_rows(rows), trainer={"max_length": 8}))
    found = report(plan)
    assert (found.truncated_rows, found.dropped_rows, found.stop_rows, found.stop_token) == (4, 1, 0, None)
    assert (plan.truncated_rows, plan.dropped_rows) == (4, 1)
    assert any("only 0 of 4 rows end in a trained stop token" in warning for warning in plan.warnings)


def test_rows_are_duplicates_only_with_the_same_trained_marks(encoder: Encoder) -> None:
    ids = np.arange(5, dtype=np.int32)
    rows: list[Row] = [Encoded(line, ids, np.arange(5) >= first) for line, first in enumerate((1, 2, 1), start=1)]
    read = dataset.Dataset(rows, None, FileReport(rows=3, bad_rows=0, format="text", problems=[]), None)
    found = statistics(read, encoder, max_length=9, train=rows, heldout=[])
    assert [(r.line, r.of) for r in found.duplicates] == [(3, 1)]


# ---------------------------------------------------------------- bad rows

BAD: Rows = [*quotes(12), {"text": ""}, *quotes(24)[12:], {"txt": "x"}]


def test_bad_rows_are_skipped_if_the_user_allows_it(
    make_task: MakeTask, write_rows: WriteRows, encoder: Encoder
) -> None:
    task = make_task(write_rows(BAD), trainer={"skip_bad_rows": 2})
    plan = prepare(task)
    found = report(plan)
    assert (plan.rows, found.rows, found.bad_rows) == (24, 24, 2)
    assert [(p.line, p.field, bool(p.hint)) for p in found.problems] == [(13, "text", True), (26, "", True)]
    assert any(warning.startswith("skipped in the training file: 2 bad rows: line 13") for warning in plan.warnings)
    lines = [row.line for row in dataset.load(task, encoder).train]  # what training will see
    assert lines == [*range(1, 13), *range(14, 26)]


@pytest.mark.parametrize("skip", [0, 1])
def test_too_many_bad_rows_fail_and_the_hint_has_their_number(
    make_task: MakeTask, write_rows: WriteRows, skip: int
) -> None:
    with pytest.raises(TrainingFailed, match="2 bad rows: line 13") as failed:
        prepare(make_task(write_rows(BAD), trainer={"skip_bad_rows": skip}))
    assert failed.value.hint is not None
    assert f"trainer.skip_bad_rows = 2 (it is {skip})" in failed.value.hint


def test_bad_rows_of_the_validation_file_are_skipped_too(make_task: MakeTask, write_rows: WriteRows) -> None:
    task = make_task(write_rows(quotes(24)), validation_file=write_rows(BAD), trainer={"skip_bad_rows": 2})
    plan = prepare(task)
    assert (plan.heldout_rows, report(plan).bad_rows) == (24, 0)
    assert any(warning.startswith("skipped in the validation file: 2 bad rows") for warning in plan.warnings)


def test_an_unreadable_rest_of_a_file_is_never_skipped(make_task: MakeTask, tmp_path: Path) -> None:
    """A damaged Parquet file: the number of lost rows is unknown."""
    table = pa.table({"text": [f"hat {i} " * 40 for i in range(4000)]})
    path = tmp_path / "broken.parquet"
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :])
    with pytest.raises(TrainingFailed) as failed:
        prepare(make_task(str(path), trainer={"skip_bad_rows": 100_000}))
    assert "line 1:" not in failed.value.message
    assert failed.value.hint is not None
    assert "skip_bad_rows" not in failed.value.hint


def test_a_file_without_a_good_row_fails(make_task: MakeTask, write_rows: WriteRows) -> None:
    with pytest.raises(TrainingFailed, match="1 bad row"):
        prepare(make_task(write_rows([{"text": ""}]), trainer={"skip_bad_rows": 9}))
