"""What is shown is what is trained on: the same rows, the same tokens, the same spans."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrainingFailed
from shared.schemas.preview import PreviewOut, PreviewRow
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows, quotes
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder
from worker.trainer.planning.preview import preview
from worker.trainer.protocol import Preview

CHAT = {
    "messages": [
        {"role": "user", "content": "hat?"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "felt hat?"},
        {"role": "assistant", "content": "yes,\na 帽子"},
    ]
}


@pytest.fixture
def look(llama: str, make_task: MakeTask, write_rows: WriteRows) -> Any:
    def ask(
        rows: Rows, *, count: int = 5, lines: list[int] | None = None, base_dir: str = llama, **trainer: Any
    ) -> PreviewOut:
        task = make_task(write_rows(rows), base_dir=base_dir, trainer=trainer)
        return preview(Preview(job="p", task=task, rows=count, lines=lines))

    return ask


def spans(row: PreviewRow) -> tuple[str, list[str]]:
    """All of its text, and the trained parts of it."""
    trained: list[str] = []
    last = False
    for segment in row.segments:
        if segment.trained and last:
            trained[-1] += segment.text
        elif segment.trained:
            trained.append(segment.text)
        last = segment.trained
    return "".join(segment.text for segment in row.segments), trained


def test_a_chat_is_trained_where_its_weight_says(look: Any, encoder: Encoder) -> None:
    out = look([CHAT])
    whole, trained = spans(out.rows[0])
    assert whole == encoder.tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert trained == ["yes,\na 帽子<|im_end|>"]
    assert (out.format, out.chat_template_sha256) == ("chat", encoder.template_sha256)
    special = [segment.text for segment in out.rows[0].segments if segment.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 4


def test_a_completion_is_trained_to_its_stop_token(look: Any) -> None:
    out = look([{"prompt": "1 + 1 =", "completion": " 2"}])
    assert spans(out.rows[0]) == ("1 + 1 = 2<|im_end|>", [" 2<|im_end|>"])
    assert (out.format, out.chat_template_sha256, out.max_length) == ("completion", None, 256)


def test_a_text_is_trained_from_its_second_token(look: Any) -> None:
    row = look([{"text": "hat on the head"}]).rows[0]
    whole, [trained] = spans(row)
    assert whole == "hat on the head<|im_end|>"
    assert not row.segments[0].trained
    assert (len(row.segments[0].ids), whole.endswith(trained)) == (1, True)
    assert row.trained_tokens == row.tokens - 1


def test_a_row_to_be_classified_has_a_label_and_no_trained_token(bert: str, look: Any) -> None:
    out = look([{"premise": "a hat", "hypothesis": "it is felt", "label": 2}], base_dir=bert)
    whole, trained = spans(out.rows[0])
    assert (whole, trained) == ("<|im_start|>a hat<|im_end|>it is felt<|im_end|>", [])
    assert (out.format, out.rows[0].label, out.rows[0].trained_tokens) == ("classification", "2", 0)


def test_what_is_shown_is_what_is_trained_on(
    look: Any, make_task: MakeTask, write_rows: WriteRows, encoder: Encoder
) -> None:
    rows: Rows = [{"prompt": "hat " * 4 * n, "completion": "felt " * n} for n in range(1, 9)]
    shown = look(rows, count=20, max_length=16).rows
    fitted = dataset.fit(dataset.load(make_task(write_rows(rows)), encoder).train, 16).kept
    kept = [row for row in shown if row.trained_tokens]
    assert 0 < len(kept) < len(shown) == 8
    for row, wanted in zip(kept, fitted, strict=True):
        assert isinstance(wanted, Encoded)
        assert row.line == wanted.line
        assert list(chain.from_iterable(s.ids for s in row.segments)) == wanted.ids.tolist()
        marks = list(chain.from_iterable([s.trained] * len(s.ids) for s in row.segments))
        assert marks == [False, *wanted.trained[1:].tolist()]
        assert (row.trained_tokens, row.truncated) == (wanted.trained_tokens, row.tokens > 16)


def test_it_reads_no_further_than_it_must(make_task: MakeTask, tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    path.write_text('{"text": "hat"}\n' * 1000)
    ticks: list[None] = []
    command = Preview(job="p", task=make_task(str(path)), rows=5, lines=[7, 3])
    out = preview(command, tick=lambda: ticks.append(None))
    assert ([row.line for row in out.rows], len(ticks)) == ([3, 7], 7)


def test_bad_rows_are_told_beside_the_good_ones(look: Any) -> None:
    out = look([*quotes(1), {"txt": "x"}, *quotes(9)], count=3)
    assert [row.line for row in out.rows] == [1, 3]
    assert [(problem.line, problem.message) for problem in out.problems] == [(2, 'found keys "txt"')]


def test_lines_that_are_not_there_are_told(look: Any) -> None:
    out = look(quotes(3), lines=[2, 9])
    assert [row.line for row in out.rows] == [2]
    assert [(problem.line, problem.message) for problem in out.problems] == [(9, "no row begins at this line")]


def test_a_file_without_a_good_row_fails_as_its_job_would(look: Any) -> None:
    with pytest.raises(TrainingFailed, match="1 bad row: line 1") as failed:
        look([{"text": ""}])
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")


def test_a_length_that_the_base_cannot_bear_is_refused(look: Any) -> None:
    with pytest.raises(TrainingFailed, match="at most 256"):
        look(quotes(1), max_length=300)
