"""A preview shows the rows, tokens and trained spans that training uses."""

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
def show(llama: str, make_task: MakeTask, write_rows: WriteRows) -> Any:
    def ask(
        rows: Rows, *, count: int = 5, lines: list[int] | None = None, base_dir: str = llama, **trainer: Any
    ) -> PreviewOut:
        task = make_task(write_rows(rows), base_dir=base_dir, trainer=trainer)
        return preview(Preview(job="p", task=task, rows=count, lines=lines))

    return ask


def spans(row: PreviewRow) -> tuple[str, list[str]]:
    """The row's text, and its trained parts."""
    trained: list[str] = []
    last = False
    for segment in row.segments:
        if segment.trained and last:
            trained[-1] += segment.text
        elif segment.trained:
            trained.append(segment.text)
        last = segment.trained
    return "".join(segment.text for segment in row.segments), trained


def test_only_turns_without_weight_zero_are_trained_in_a_chat(show: Any, encoder: Encoder) -> None:
    out = show([CHAT])
    whole, trained = spans(out.rows[0])
    assert whole == encoder.tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert trained == ["yes,\na 帽子<|im_end|>"]
    assert (out.format, out.chat_template_sha256) == ("chat", encoder.template_sha256)
    special = [segment.text for segment in out.rows[0].segments if segment.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 4


def test_a_completion_is_trained_up_to_its_stop_token(show: Any) -> None:
    out = show([{"prompt": "1 + 1 =", "completion": " 2"}])
    assert spans(out.rows[0]) == ("1 + 1 = 2<|im_end|>", [" 2<|im_end|>"])
    assert (out.format, out.chat_template_sha256, out.max_length) == ("completion", None, 256)


def test_a_text_is_trained_from_its_second_token(show: Any) -> None:
    row = show([{"text": "hat on the head"}]).rows[0]
    whole, [trained] = spans(row)
    assert whole == "hat on the head<|im_end|>"
    assert not row.segments[0].trained
    assert (len(row.segments[0].ids), whole.endswith(trained)) == (1, True)
    assert row.trained_tokens == row.tokens - 1


def test_a_classification_row_has_a_label_and_no_trained_token(bert: str, show: Any) -> None:
    out = show([{"premise": "a hat", "hypothesis": "it is felt", "label": 2}], base_dir=bert)
    whole, trained = spans(out.rows[0])
    assert (whole, trained) == ("<|im_start|>a hat<|im_end|>it is felt<|im_end|>", [])
    assert (out.format, out.rows[0].label, out.rows[0].trained_tokens) == ("classification", "2", 0)


def test_shown_tokens_are_those_of_training(
    show: Any, make_task: MakeTask, write_rows: WriteRows, encoder: Encoder
) -> None:
    rows: Rows = [{"prompt": "hat " * 4 * n, "completion": "felt " * n} for n in range(1, 9)]
    shown = show(rows, count=20, max_length=16).rows
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


def test_no_row_after_the_last_requested_line_is_read(make_task: MakeTask, tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    path.write_text('{"text": "hat"}\n' * 1000)
    ticks: list[None] = []
    command = Preview(job="p", task=make_task(str(path)), rows=5, lines=[7, 3])
    out = preview(command, tick=lambda: ticks.append(None))
    assert ([row.line for row in out.rows], len(ticks)) == ([3, 7], 7)


def test_bad_rows_are_reported_with_the_good_ones(show: Any) -> None:
    out = show([*quotes(1), {"txt": "x"}, *quotes(9)], count=3)
    assert [row.line for row in out.rows] == [1, 3]
    assert [(problem.line, problem.message) for problem in out.problems] == [(2, 'found keys "txt"')]


def test_missing_lines_are_reported(show: Any) -> None:
    out = show(quotes(3), lines=[2, 9])
    assert [row.line for row in out.rows] == [2]
    assert [(problem.line, problem.message) for problem in out.problems] == [(9, "no row begins at this line")]


def test_a_file_without_a_good_row_fails_as_a_job_would(show: Any) -> None:
    with pytest.raises(TrainingFailed, match="1 bad row: line 1") as failed:
        show([{"text": ""}])
    assert (failed.value.code, failed.value.param) == ("invalid_training_file", "training_file")


def test_a_length_above_the_bases_context_is_refused(show: Any) -> None:
    with pytest.raises(TrainingFailed, match="at most 256"):
        show(quotes(1), max_length=300)
