"""What a dataset holds, counted: the report that `prepare` leaves on the job, and what a user should think twice about.

Owns: the counting. Rows are told apart by a hash of eight bytes each: with ten million rows the chance that any two
share one by accident is 3 in a million. Must not change a row, nor drop one.
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

#: Of the rows that repeat others, so many are named.
NAMED = 10
#: Repeats are worth a word from this share of the rows on.
MANY_REPEATS = 0.05
#: Where fewer rows than this end in a trained stop token, a tuned model may not know when to stop.
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
    """The training file's numbers. `train` and `heldout` are cut already; `heldout` is empty where it is `train`.

    `classes` are the labels of a classification, of which the rows are counted.
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
        labels=labels.counted(rows, classes or []),
    )


def doubts(report: DataReport, validation: FileReport | None, *, heldout_rows: int) -> list[str]:
    """What of it a user should be warned of."""
    warnings = []
    if report.bad_rows:
        warnings.append(f"left out of the training file: {formats.describe(report)}")
    if validation is not None and validation.bad_rows:
        warnings.append(f"left out of the validation file: {formats.describe(validation)}")
    if report.duplicate_rows >= MANY_REPEATS * report.rows and report.duplicate_rows:
        share = report.duplicate_rows / report.rows
        warnings.append(
            f"{report.duplicate_rows} rows ({share:.0%}) repeat an earlier one ({_named(report.duplicates)}): a tuned "
            "model may say them by heart; keep one of each, unless that is wanted"
        )
    if report.heldout_overlap_rows:
        warnings.append(
            f"{report.heldout_overlap_rows} of {heldout_rows} held-out rows are trained on as well "
            f"({_named(report.heldout_overlap)}): the held-out loss flatters"
        )
    if report.stop_rows < ENOUGH_STOPS * report.rows and not report.labels:
        warnings.append(
            f"only {report.stop_rows} of {report.rows} rows end in a trained stop token: a tuned model may not stop by "
            "itself; raise trainer.max_length if the cut takes it"
        )
    if report.double_bos_rows:
        warnings.append(
            f"{report.double_bos_rows} rows begin with two beginning-of-sequence tokens, which the base has never "
            "seen: take the one out that is written in the rows"
        )
    return warnings


def _histogram(lengths: Integers) -> list[LengthBucket]:
    """From the shortest row's power of two to the longest's."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    first, last = int(powers[0]), int(powers[-1])
    counts = np.bincount(powers - first, minlength=last - first + 1)
    return [LengthBucket(upto=2 ** (first + i), rows=int(count)) for i, count in enumerate(counts)]


def _percentile(lengths: Integers, percent: int) -> int:
    """By the nearest rank: a length that a row has."""
    return int(lengths[max(0, -(-len(lengths) * percent // 100) - 1)])


def _duplicates(rows: Sequence[Row]) -> tuple[list[Repeat], int]:
    """The first rows that repeat an earlier one, and how many there are."""
    hashes = _hashes(rows)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    new = np.concatenate(([True], hashes[1:] != hashes[:-1]))
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    repeats = np.flatnonzero(~new)
    named = repeats[np.argsort(order[repeats])][:NAMED]
    return [Repeat(line=rows[order[i]].line, of=rows[firsts[i]].line) for i in named], len(repeats)


def _overlap(train: Sequence[Row], heldout: Sequence[Row]) -> tuple[list[Repeat], int]:
    """The first held-out rows that are also trained on, and how many there are."""
    if not heldout:
        return [], 0
    hashes = _hashes(train)
    order = np.argsort(hashes, kind="stable")
    wanted = _hashes(heldout)
    at = np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(train) - 1)
    found = np.flatnonzero(hashes[order[at]] == wanted)
    return [Repeat(line=heldout[i].line, of=train[order[at[i]]].line) for i in found[:NAMED]], len(found)


def _hashes(rows: Sequence[Row]) -> Hashes:
    """Of the tokens and of what is learned of them."""
    said = (b"".join(document.content for document in row.documents) for row in rows)
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in said)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), dtype=np.uint64, count=len(rows))


def _stop(row: Row, max_length: int, stops: frozenset[int]) -> int | None:
    """The token that ends what is trained of a row, if it is one that ends a generation in each of its documents."""
    ends = [document.ids[document.trained] for document in row.cut(max_length).documents]
    if not all(len(trained) and int(trained[-1]) in stops for trained in ends):
        return None
    return int(ends[0][-1])


def _named(repeats: Sequence[Repeat]) -> str:
    shown = ", ".join(f"line {repeat.line} is line {repeat.of}" for repeat in repeats[:3])
    return f"{shown}, …" if len(repeats) > 3 else shown
