"""A report on the terminal: scores, their confidence, samples, cost."""

from __future__ import annotations

import pytest

from client import report, show
from shared.schemas.requests import ExportName
from shared.schemas.responses import Job
from shared.schemas.results import Export, LossChange, Plan, Report
from tests.client.conftest import CHANGE, DATA, PLAN, RECIPE, REPORT, SAMPLE
from tests.client.drawing import drawn

CLASSIFIED = REPORT | {
    "base": {"loss": 0.71, "token_accuracy": 0.475, "tokens": 40, "macro_f1": 0.33},
    "tuned": {"loss": 0.2, "token_accuracy": 0.925, "tokens": 40, "macro_f1": 0.92},
    "majority": {"label": "good", "accuracy": 0.6},
    "samples": [
        {"line": 3, "prompt": "a felt hat", "reference": "good"}
        | {name: {"text": label, "ended": True} for name, label in (("base", "bad"), ("tuned", "good"))}
    ],
}


@pytest.fixture
def learned(succeeded: Job) -> Report:
    assert succeeded.report is not None
    return succeeded.report


def test_everything_is_shown_once_and_in_order(learned: Report) -> None:
    text = drawn(report.document(learned))
    said = [
        "held-out loss  perplexity  token accuracy  (4,096 tokens)",
        "3.2500         25.79",
        "2.5000         12.18",
        "better: the loss fell by 0.7500 nats per token (95 % interval of the change -0.8125 to -0.6875)",
        "measured on rows held out of the training file: 128 rows",
        "line 3     Quote by [b]A[/b]:",
        'reference  "A hat is felt."',
        "base        the user has asked …",
        'tuned      "A hat."\n',
        "this adapter, measured",
        "full fine-tuning in fp32, computed",
        "4,884,480 parameters (3.50%)",
        "19.5 MB",
        "112.0 MB in nf4",
        "2.2 GB for weights, gradients and AdamW alone",
        "3:20 for 70 steps: 98,765 tokens, 493 per second",
    ]
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    assert [text for text in said if lines.count(text) != 1] == []
    assert [lines.index(text) for text in said] == sorted(lines.index(text) for text in said)


def test_full_finetuning_is_measured_and_not_computed() -> None:
    counts = {"trainable_parameters": REPORT["total_parameters"]}
    text = drawn(report.document(Report.model_validate(REPORT | counts)))
    assert "all weights, measured" in text
    assert "(100.00%)" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"loss": 0.1, "low": -0.2, "high": 0.4, "verdict": "same"},
            "same: the loss rose by 0.1000 nats per token "
            "(95 % interval of the change -0.2000 to +0.4000, which includes 0)",
        ),
        (
            {"loss": 0.5, "low": 0.25, "high": 0.75, "verdict": "worse"},
            "worse: the loss rose by 0.5000 nats per token (95 % interval of the change +0.2500 to +0.7500)",
        ),
        (
            {"loss": -0.5, "low": None, "high": None, "verdict": "unknown"},
            "unknown: the loss fell by 0.5000 nats per token (one row gives no interval)",
        ),
    ],
)
def test_verdict_in_words(change: dict[str, object], text: str) -> None:
    assert show.verdict(LossChange.model_validate(CHANGE | change)).plain == text


def test_a_job_from_an_adapter_is_also_compared_with_its_start() -> None:
    change = CHANGE | {"loss": 0.25, "low": -0.125, "high": 0.5, "verdict": "same"}
    found = Report.model_validate(REPORT | {"start": REPORT["base"] | {"loss": 2.25}, "start_change": change})
    text = drawn(report.document(found.model_copy(update={"kept_step": 60})))
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [
        ["base", "3.2500"], ["start", "2.2500"], ["tuned", "2.5000"]
    ]  # fmt: skip
    assert "against the base, better: the loss fell by 0.7500" in text
    assert "against the start, same: the loss rose by 0.2500" in text
    assert "for 70 steps (the adapter is from step 60):" in " ".join(text.split())


def test_caveats_are_marked_and_a_report_without_samples_has_no_heading_for_them() -> None:
    change = CHANGE | {"caveats": ["only 3 rows were held out"]}
    text = drawn(report.document(Report.model_validate(REPORT | {"samples": [], "change": change})))
    assert "\n! only 3 rows were held out" in text
    assert "samples" not in text


def test_a_classifier_is_compared_with_the_majority() -> None:
    text = drawn(report.document(Report.model_validate(CLASSIFIED)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for said in (
        "held-out loss accuracy macro F1 (40 rows)",
        "base 0.7100 47.5% 0.330",
        "tuned 0.2000 92.5% 0.920",
        "always 'good' 60.0%",
        "samples",
        "reference good",
        "base bad",
    ):
        assert said in lines
    assert "better: the loss fell by 0.7500 nats per row (95 % interval of" in text


def test_a_plan_names_the_labels() -> None:
    counts = [{"label": f"kind {i}", "rows": 100 - i} for i in range(14)]
    recipe = RECIPE | {"method": "classification", "labels": [count["label"] for count in counts], "packing": False}
    item = Plan.model_validate(PLAN | {"recipe": recipe, "data": DATA | {"labels": counts}})
    text = drawn(show.plan(item))
    assert "classification, 14 labels" in text
    assert "'kind 0' 100, 'kind 1' 99," in text
    assert "'kind 11' 89 and 2 more" in text
    assert "stop" not in text


def test_predicted_memory_is_shown_beside_measured_memory() -> None:
    fit = {
        "device": {"kind": "cpu", "name": "a CPU", "memory_bytes": 16_000_000_000},
        "rows": 8,
        "length": 128,
        "computed_bytes": 2_000_000_000,
        "predicted_bytes": 2_500_000_000,
        "rehearsed_bytes": None,
        "measured_bytes": 2_600_000_000,
    }
    text = drawn(report.document(Report.model_validate(REPORT | {"fit": fit})))
    assert "2.6 GB on a CPU; predicted 2.5 GB (+4.0%)" in text


def test_model_output_does_not_control_the_terminal() -> None:
    sample = SAMPLE | {"tuned": {"text": "\x1b]0;owned\x07\n\tfine\x9b2J", "ended": True}}
    text = drawn(report.document(Report.model_validate(REPORT | {"samples": [sample]})))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "�]0;owned�" in text
    assert "fine�2J" in text


def test_exports_are_listed_with_their_difference_or_their_error(learned: Report) -> None:
    exports = [
        Export(
            name=ExportName.MERGED, path="exports/merged/", bytes=272_584_990, loss=3.2552, difference=-0.0725,
            max_logit_difference=9.6875,
        ),
        Export(name=ExportName.GGUF_ADAPTER, path="exports/gguf_adapter/", bytes=19_566_720),
        Export(name=ExportName.GGUF_MERGED, error="the trainer was killed by SIGKILL"),
    ]  # fmt: skip
    assert "exports" not in drawn(report.document(learned))
    text = drawn(report.document(learned, exports))
    for line in (
        "exports/merged/ (272.6 MB): loss 3.2552, -0.0725 against the adapter, logits by at most 9.7",
        "exports/gguf_adapter/ (19.6 MB): bit-identical to the adapter",
        "no gguf_merged: the trainer was killed by SIGKILL",
    ):
        assert line in text
