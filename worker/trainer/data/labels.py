"""The labels of a classification job: their order, the number of rows of each, and scores over them.

Owns: the mapping between a label and its index, which training, proof and publishing share through the recipe. Must not
import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shared.errors import TrainingFailed
from shared.schemas.results import LabelCount, Majority
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Row

#: Most labels that are allowed. The head is trained in full and kept in fp32; more labels than this usually mean that
#: the column holds texts or row numbers.
MAX_LABELS = 1000
#: A label with fewer rows than this is rare.
FEW_ROWS = 8
#: Share of rows with the same label from which the labels are unbalanced.
UNBALANCED_SHARE = 0.8
#: A message names at most this many labels.
NAMED = 5


def find(train: Sequence[Row], validation: Sequence[Row] | None) -> list[str]:
    """Return the labels of the training file in order: numerically if all are integers, otherwise alphabetically.

    Raises TrainingFailed for fewer than two labels, for more than MAX_LABELS, and for a validation row whose label the
    training file does not have.
    """
    found = sorted(counts(train))
    if all(label.removeprefix("-").isdecimal() for label in found):
        found.sort(key=lambda label: (int(label), label))
    if len(found) < 2:
        raise _invalid("training_file", f"found one label, {found[0]!r}", "at least two labels")
    if len(found) > MAX_LABELS:
        allowed = f"at most {MAX_LABELS:,} labels"
        raise _invalid("training_file", f"found {len(found):,} labels, {_named(found)}", allowed)
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
    """Number of rows of each label."""
    return Counter(row.label for row in _labelled(rows))


def label_counts(rows: Sequence[Row], labels: Sequence[str]) -> list[LabelCount]:
    """Number of rows of each of `labels`, in that order."""
    found = counts(rows)
    return [LabelCount(label=label, rows=found[label]) for label in labels]


def label_warnings(found: Sequence[LabelCount], train: Sequence[Row]) -> list[str]:
    """Warnings for the user about the labels. `train` are the rows that are trained on, without held-out ones."""
    warnings, trained = [], counts(train)
    if untrained := [one.label for one in found if not trained[one.label]]:
        warnings.append(
            f"all rows of {_named(untrained)} are held out, so none is trained on: add rows, or send a validation file"
        )
    if rare := [one.label for one in found if one.rows < FEW_ROWS]:
        are = "labels have" if len(rare) > 1 else "label has"
        warnings.append(f"{len(rare)} {are} fewer than {FEW_ROWS} rows ({_named(rare)}): add rows, or merge labels")
    if joint := sum(row.lacks_separator for row in _labelled(train)):
        warnings.append(
            f"{joint} rows are two texts, and the base's tokenizer puts nothing between them: begin the second text "
            "with a line break or a separating word, here and when you use the classifier"
        )
    total, most = sum(one.rows for one in found), max(found, key=lambda one: one.rows)
    if most.rows >= UNBALANCED_SHARE * total:
        warnings.append(
            f"{most.rows / total:.0%} of the rows have the label {most.label!r}, so always predicting it has that "
            "accuracy: look at macro_f1 rather than at accuracy"
        )
    return warnings


def majority(train: Sequence[Row], heldout: Sequence[Row]) -> Majority:
    """Accuracy on the held-out rows of always predicting the most frequent training label (ties: the first by name)."""
    trained, asked = counts(train), counts(heldout)
    label = min(trained, key=lambda label: (-trained[label], label))
    return Majority(label=label, accuracy=asked[label] / asked.total())


def macro_f1(answers: Mapping[tuple[int, int], int]) -> float:
    """Mean F1 over the labels that occur. `answers` maps (true label, predicted label) to the number of rows."""
    trues, predictions = Counter[int](), Counter[int]()
    for (true, predicted), rows in answers.items():
        trues[true] += rows
        predictions[predicted] += rows
    seen = trues.keys() | predictions.keys()
    return sum(2 * answers.get((label, label), 0) / (trues[label] + predictions[label]) for label in seen) / len(seen)


def _labelled(rows: Sequence[Row]) -> list[LabelledRow]:
    return [row for row in rows if isinstance(row, LabelledRow)]


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:NAMED])
    return f"{shown}, …" if len(labels) > NAMED else shown


def _invalid(param: str, found: str, allowed: str) -> TrainingFailed:
    return TrainingFailed(found, code=f"invalid_{param}", param=param, hint=allowed)
