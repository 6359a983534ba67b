"""Statistics of a dataset: the data report on the job, and the warnings that follow from it.

Owns: the counting. Duplicates are found by hashes of 8 bytes: with ten million rows, the chance that any two different
rows have the same hash is 3 in a million. Must not change or drop a row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.datasets import formats
from shared.schemas.results import DataReport, FileReport, LengthBucket, Repeat
from worker.trainer.data import labels
from worker.trainer.data.dataset import Dataset
from worker.trainer.data.encoding import Encoder, Row, longest_document

#: A report names at most this many duplicate rows.
NAMED = 10
#: Share of duplicate rows from which the user is warned.
MANY_DUPLICATES = 0.05
#: If a smaller share of rows ends in a trained stop token, the tuned model may not learn when to stop.
ENOUGH_STOPS = 0.5

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def statistics(
    dataset: Dataset,
    encoder: Encoder,
    *,
    max_length: int,
    train: Sequence[Row],
    heldout: Sequence[Row],
    classes: Sequence[str] | None = None,
) -> DataReport:
    """Compute the report on the training file.

    `dataset` has the rows before truncation. `train` and `heldout` are truncated already; `heldout` is empty if the
    training rows themselves are scored. `classes` are the labels of a classification, in the recipe's order.
    """
    rows, read = dataset.train, dataset.report
    lengths = np.sort(np.fromiter((longest_document([row]) for row in rows), dtype=np.int64, count=len(rows)))
    duplicates, duplicate_rows = _duplicates(rows)
    overlap, overlap_rows = _overlap(train, heldout)
    stops = Counter(_stop(row, max_length, encoder.stops) for row in rows)
    stop_rows = stops.total() - stops.pop(None, 0)
    return DataReport(
        rows=read.rows,
        bad_rows=read.bad_rows,
        format=read.format,
        problems=read.problems,
        tokens=sum(map(len, rows)),
        trained_tokens=sum(row.trained_tokens for row in rows),
        lengths=_histogram(lengths),
        length_p50=_percentile(lengths, 50),
        length_p95=_percentile(lengths, 95),
        length_max=int(lengths[-1]),
        truncated_rows=int((lengths > max_length).sum()),
        dropped_rows=sum(not row.cut(max_length).learnable for row in rows),
        duplicate_rows=duplicate_rows,
        duplicates=duplicates,
        heldout_overlap_rows=overlap_rows,
        heldout_overlap=overlap,
        stop_rows=stop_rows,
        stop_token=encoder.tokenizer.convert_ids_to_tokens(stops.most_common(1)[0][0]) if stops else None,
        double_bos_rows=sum(encoder.has_double_bos(row) for row in rows),
        chat_template_sha256=encoder.template_sha256 if read.format == "chat" else None,
        labels=labels.label_counts(rows, classes or []),
    )


def data_warnings(report: DataReport, validation: FileReport | None, *, heldout_rows: int) -> list[str]:
    """Warnings for the user that follow from the report."""
    warnings = []
    if report.bad_rows:
        warnings.append(f"skipped in the training file: {formats.describe(report)}")
    if validation is not None and validation.bad_rows:
        warnings.append(f"skipped in the validation file: {formats.describe(validation)}")
    if report.duplicate_rows >= MANY_DUPLICATES * report.rows and report.duplicate_rows:
        share = report.duplicate_rows / report.rows
        warnings.append(
            f"{report.duplicate_rows} rows ({share:.0%}) repeat an earlier one ({_named(report.duplicates)}): the "
            "tuned model may memorize them; keep one of each unless that is intended"
        )
    if report.heldout_overlap_rows:
        warnings.append(
            f"{report.heldout_overlap_rows} of {heldout_rows} held-out rows are also trained on "
            f"({_named(report.heldout_overlap)}): the held-out loss is too low"
        )
    if report.stop_rows < ENOUGH_STOPS * report.rows and not report.labels:
        warnings.append(
            f"only {report.stop_rows} of {report.rows} rows end in a trained stop token: the tuned model may not stop "
            "by itself; raise trainer.max_length if truncation removes the token"
        )
    if report.double_bos_rows:
        warnings.append(
            f"{report.double_bos_rows} rows begin with two beginning-of-sequence tokens, which the base never saw in "
            "training: remove the one that is written in the rows"
        )
    return warnings


def _histogram(lengths: Integers) -> list[LengthBucket]:
    """Buckets by powers of two, from that of the shortest row to that of the longest."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    first, last = int(powers[0]), int(powers[-1])
    counts = np.bincount(powers - first, minlength=last - first + 1)
    return [LengthBucket(upto=2 ** (first + i), rows=int(count)) for i, count in enumerate(counts)]


def _percentile(lengths: Integers, percent: int) -> int:
    """Percentile by the nearest-rank method, so that some row has this length."""
    return int(lengths[max(0, -(-len(lengths) * percent // 100) - 1)])


def _duplicates(rows: Sequence[Row]) -> tuple[list[Repeat], int]:
    """The first rows that repeat an earlier row, and the number of all such rows."""
    hashes = _hashes(rows)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    new = np.concatenate(([True], hashes[1:] != hashes[:-1]))
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    repeats = np.flatnonzero(~new)
    named = repeats[np.argsort(order[repeats])][:NAMED]
    return [Repeat(line=rows[order[i]].line, of=rows[firsts[i]].line) for i in named], len(repeats)


def _overlap(train: Sequence[Row], heldout: Sequence[Row]) -> tuple[list[Repeat], int]:
    """The first held-out rows that are also trained on, and the number of all such rows."""
    if not heldout:
        return [], 0
    hashes = _hashes(train)
    order = np.argsort(hashes, kind="stable")
    wanted = _hashes(heldout)
    at = np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(train) - 1)
    found = np.flatnonzero(hashes[order[at]] == wanted)
    return [Repeat(line=heldout[i].line, of=train[order[at[i]]].line) for i in found[:NAMED]], len(found)


def _hashes(rows: Sequence[Row]) -> Hashes:
    """A hash of each row's tokens and trained marks."""
    contents = (b"".join(document.content for document in row.documents) for row in rows)
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), dtype=np.uint64, count=len(rows))


def _stop(row: Row, max_length: int, stops: frozenset[int]) -> int | None:
    """The stop token that the row's first document ends in; None unless every document ends in a trained one."""
    ends = [document.ids[document.trained] for document in row.cut(max_length).documents]
    if not all(len(trained) and int(trained[-1]) in stops for trained in ends):
        return None
    return int(ends[0][-1])


def _named(repeats: Sequence[Repeat]) -> str:
    shown = ", ".join(f"line {repeat.line} is line {repeat.of}" for repeat in repeats[:3])
    return f"{shown}, …" if len(repeats) > 3 else shown
