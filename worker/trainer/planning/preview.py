"""Show a few rows of a dataset as text with their trained spans, encoded and cut as in training.

Owns: what a preview shows. Reads no more of the file than it needs. Our code imports no torch here; an import contract
checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, islice, takewhile

from shared.datasets import formats
from shared.datasets.formats import Example, RowError
from shared.errors import TrainingFailed
from shared.estimation import defaults
from shared.schemas.preview import Answer, PreviewOut, PreviewRow, Segment
from shared.schemas.results import FileReport, RowProblem
from worker.trainer.data import dataset
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Encoded, Encoder, Row
from worker.trainer.planning import recipe
from worker.trainer.protocol import Preview

Read = Iterator[tuple[int, Example | RowError]]


def preview(command: Preview, *, tick: Callable[[], None] = lambda: None) -> PreviewOut:
    """Preview the first rows, or the rows at `command.lines`. `tick` is called with each row up to the last such line.

    Raises TrainingFailed, as training would: for the base, a setting, or a file whose first rows are all bad.
    """
    task = command.task
    base = recipe.read_traits(task.base_dir)
    encoder = Encoder(task.base_dir)
    # The longest row of the file is not known. "auto" cuts only rows above its largest value, so that value will do.
    length = recipe.max_length(task.trainer, base, defaults.LONGEST_AUTO_ROW)
    out = PreviewOut(format=None, max_length=length, chat_template_sha256=None, rows=[], problems=[])
    with open(task.training_file, "rb") as stream:
        for line, example in _picked(formats.read_rows(stream, max_row_bytes=task.max_row_bytes), command, tick):
            row = dataset.encode(encoder, line, example)
            if isinstance(row, RowError):
                out.problems.append(row.problem())
            else:
                out.rows += _shown(row, length, encoder)
            if not isinstance(example, RowError):
                out.format = out.format or formats.kind(example)
    if command.lines is not None:
        out.problems += _absent(command.lines, out)
    elif not out.rows:
        report = FileReport(rows=0, bad_rows=len(out.problems), format=None, problems=out.problems)
        raise TrainingFailed(
            formats.describe(report),
            code="invalid_training_file",
            param="training_file",
            hint="fix these lines and upload the file again",
        )
    if out.format == "chat":
        out.chat_template_sha256 = encoder.template_sha256
    return out


def _picked(rows: Read, command: Preview, tick: Callable[[], None]) -> Read:
    """The requested rows, in the file's order."""
    if command.lines is None:
        yield from islice(rows, command.rows)
        return
    wanted, last = frozenset(command.lines), max(command.lines)
    for line, row in takewhile(lambda pair: pair[0] <= last, rows):
        tick()
        if line in wanted:
            yield line, row


def _absent(lines: list[int], out: PreviewOut) -> list[RowProblem]:
    found = {row.line for row in out.rows} | {problem.line for problem in out.problems}
    return [
        RowProblem(line=line, field="", message="no row begins at this line", hint="a line at which a row begins")
        for line in sorted(set(lines) - found)
    ]


def _shown(row: Row, max_length: int, encoder: Encoder) -> list[PreviewRow]:
    """The row, or both answers of a DPO pair."""
    if isinstance(row, Encoded):
        return [_document(row, max_length, encoder, None)]
    chosen = _document(row.chosen, max_length, encoder, "chosen")
    return [chosen, _document(row.rejected, max_length, encoder, "rejected")]


def _document(row: Encoded, max_length: int, encoder: Encoder, answer: Answer | None) -> PreviewRow:
    cut = row.cut(max_length)
    ids, trained = cut.ids.tolist(), cut.trained.tolist()
    trained[0] = False  # nothing comes before the first token, so it is not predicted
    label = row.label if isinstance(row, LabelledRow) else None
    segments: list[Segment] = []
    for (is_trained, is_special), group in groupby(
        zip(ids, trained, strict=True), key=lambda token: (token[1], token[0] in encoder.specials)
    ):
        tokens = [token for token, _ in group]
        text = _text(encoder, segments[-1].ids if segments else [], tokens)
        segments.append(Segment(text=text, trained=is_trained, special=is_special, ids=tokens))
    return PreviewRow(
        line=row.line,
        answer=answer,
        label=label,
        tokens=len(row),
        trained_tokens=cut.trained_tokens if label is None else 0,
        truncated=len(cut) < len(row),
        segments=segments,
    )


def _text(encoder: Encoder, before: list[int], tokens: list[int]) -> str:
    """The text of `tokens` where they follow `before`: some tokenizers decode a token differently at a text's start.

    If a character is split between the two, `tokens` are decoded alone.
    """
    start, whole = encoder.text(before), encoder.text(before + tokens)
    text = whole.removeprefix(start) if whole.startswith(start) else encoder.text(tokens)
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # Postgres cannot store NUL
