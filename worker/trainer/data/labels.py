"""The labels of a classification: which there are, in which order, how many rows each has, and scores over them.

Owns: the one mapping between a label and its place, which training, proof and publishing share through the recipe.
Must not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shared.errors import TrainingFailed
from shared.schemas.results import LabelCount, Majority
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Row

#: A head of this width is trained in full and kept in fp32; more labels are texts, or row numbers, in the wrong column.
MOST = 1000
#: Rows of a label below which it is called rare.
FEW_ROWS = 8
#: Share of a label from which on the rows are called unbalanced.
MOST_SHARE = 0.8
#: Of labels that a message is about, so many are named.
NAMED = 5


def find(train: Sequence[Row], validation: Sequence[Row] | None) -> list[str]:
    """The labels of the training file: integers by their value, all others by their letters.

    Raises TrainingFailed: fewer than two or too many, or a validation row with a label that training never saw.
    """
    found = sorted(counts(train))
    if all(label.removeprefix("-").isdecimal() for label in found):
        found.sort(key=lambda label: (int(label), label))
    if len(found) < 2:
        raise _invalid("training_file", f"found one label, {found[0]!r}", "at least two labels, or nothing is learned")
    if len(found) > MOST:
        raise _invalid("training_file", f"found {len(found):,} labels, {_named(found)}", f"at most {MOST:,} labels")
    known = frozenset(found)
    unseen = {row.label: row.line for row in reversed(_labelled(validation or [])) if row.label not in known}
    if unseen:
        label, line = min(unseen.items(), key=lambda item: item[1])
        raise _invalid(
            "validation_file",
            f"line {line}: label: found {label!r}, which no row of the training file has"
            + (f", nor {len(unseen) - 1} other labels of this file" if len(unseen) > 1 else ""),
            f"labels of the training file: {_named(found)}",
        )
    return found


def counts(rows: Sequence[Row]) -> Counter[str]:
    """How many of the rows have each label."""
    return Counter(row.label for row in _labelled(rows))


def counted(rows: Sequence[Row], labels: Sequence[str]) -> list[LabelCount]:
    """The same, in the recipe's order."""
    found = counts(rows)
    return [LabelCount(label=label, rows=found[label]) for label in labels]


def doubts(found: Sequence[LabelCount], train: Sequence[Row]) -> list[str]:
    """What of the labels a user should be warned of; `train` are the rows that none is held out of."""
    warnings, trained = [], counts(train)
    if untrained := [one.label for one in found if not trained[one.label]]:
        warnings.append(
            f"all rows of {_named(untrained)} are held out, so that nothing is learned of it: add rows, or send a "
            "validation file"
        )
    if rare := [one.label for one in found if one.rows < FEW_ROWS]:
        are = "labels have" if len(rare) > 1 else "label has"
        warnings.append(f"{len(rare)} {are} fewer than {FEW_ROWS} rows ({_named(rare)}): add rows, or merge labels")
    if joint := sum(row.runs_together for row in _labelled(train)):
        warnings.append(
            f"{joint} rows are two texts, between which the base's tokenizer puts nothing: begin the second one with a "
            "line break or a word that parts them, here and when the classifier is asked"
        )
    total, most = sum(one.rows for one in found), max(found, key=lambda one: one.rows)
    if most.rows >= MOST_SHARE * total:
        warnings.append(
            f"{most.rows / total:.0%} of the rows have the label {most.label!r}, and so often is right who always says "
            "it: look at macro_f1 rather than at accuracy"
        )
    return warnings


def majority(train: Sequence[Row], heldout: Sequence[Row]) -> Majority:
    """The label of most training rows, the first by name of several, as an answer to every held-out row."""
    trained, asked = counts(train), counts(heldout)
    label = min(trained, key=lambda label: (-trained[label], label))
    return Majority(label=label, accuracy=asked[label] / asked.total())


def macro_f1(answers: Mapping[tuple[int, int], int]) -> float:
    """Of how many rows had a label (first) and were given one (second): the mean F1 of all labels that occur there."""
    had, given = Counter[int](), Counter[int]()
    for (true, predicted), rows in answers.items():
        had[true] += rows
        given[predicted] += rows
    seen = had.keys() | given.keys()
    return sum(2 * answers.get((label, label), 0) / (had[label] + given[label]) for label in seen) / len(seen)


def _labelled(rows: Sequence[Row]) -> list[LabelledRow]:
    return [row for row in rows if isinstance(row, LabelledRow)]


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:NAMED])
    return f"{shown}, …" if len(labels) > NAMED else shown


def _invalid(param: str, found: str, allowed: str) -> TrainingFailed:
    return TrainingFailed(found, code=f"invalid_{param}", param=param, hint=allowed)
