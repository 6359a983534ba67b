"""A report on the terminal: what was learned, how sure that is, what both write, what it cost."""

from __future__ import annotations

import pytest

from client import report, show
from shared.responses import Job
from shared.training import LossChange, Report

from .conftest import CHANGE, REPORT, SAMPLE
from .test_show import drawn


@pytest.fixture
def learned(succeeded: Job) -> Report:
    assert succeeded.report is not None
    return succeeded.report


def test_everything_is_said_once_and_in_order(learned: Report) -> None:
    text = drawn(report.document(learned))
    said = [
        "held-out loss  perplexity  token accuracy  (4,096 tokens)",
        "3.2500         25.79",
        "2.5000         12.18",
        "better: the loss fell by 0.7500 nats a token (95 % interval of the change -0.8125 to -0.6875)",
        "measured on rows held out of the training file: 128 rows",
        "line 3     Quote by [b]A[/b]:",
        'reference  "A hat is felt."',
        "base        the user has asked …",
        'tuned      "A hat."\n',
        "this adapter, measured",
        "full fine-tuning in fp32, by arithmetic",
        "4,884,480 parameters (3.50%)",
        "19.5 MB",
        "112.0 MB in nf4",
        "2.2 GB for weights, gradients and AdamW alone",
        "3:20 for 70 steps: 98,765 tokens, 493 a second",
    ]
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    assert [text for text in said if lines.count(text) != 1] == []
    assert [lines.index(text) for text in said] == sorted(lines.index(text) for text in said)


def test_a_base_trained_whole_was_measured_and_not_reckoned() -> None:
    counts = {"trainable_parameters": REPORT["total_parameters"]}
    text = drawn(report.document(Report.model_validate(REPORT | counts)))
    assert "all weights, measured" in text
    assert "(100.00%)" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"loss": 0.1, "low": -0.2, "high": 0.4, "verdict": "same"},
            "same: the loss rose by 0.1000 nats a token "
            "(95 % interval of the change -0.2000 to +0.4000, which holds 0)",
        ),
        (
            {"loss": 0.5, "low": 0.25, "high": 0.75, "verdict": "worse"},
            "worse: the loss rose by 0.5000 nats a token (95 % interval of the change +0.2500 to +0.7500)",
        ),
        (
            {"loss": -0.5, "low": None, "high": None, "verdict": "unknown"},
            "unknown: the loss fell by 0.5000 nats a token (one row gives no interval)",
        ),
    ],
)
def test_verdict_in_words(change: dict[str, object], text: str) -> None:
    assert show.verdict(LossChange.model_validate(CHANGE | change)).plain == text


def test_caveats_are_loud_and_a_report_without_samples_has_no_heading_for_them() -> None:
    change = CHANGE | {"caveats": ["only 3 rows were held out"]}
    text = drawn(report.document(Report.model_validate(REPORT | {"samples": [], "change": change})))
    assert "\n! only 3 rows were held out" in text
    assert "samples" not in text


def test_what_a_model_writes_does_not_command_the_terminal() -> None:
    sample = SAMPLE | {"tuned": {"text": "\x1b]0;owned\x07\n\tfine\x9b2J", "ended": True}}
    text = drawn(report.document(Report.model_validate(REPORT | {"samples": [sample]})))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "�]0;owned�" in text
    assert "fine�2J" in text
