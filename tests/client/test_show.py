"""Output for people: every important number is there, and a user's text is not treated as markup."""

from __future__ import annotations

import pytest

from client import show
from shared.schemas.responses import File, Job, Model
from shared.schemas.results import DataReport
from tests.client.drawing import drawn


def test_the_plan_names_what_will_happen(queued: Job) -> None:
    assert queued.plan is not None
    text = drawn(show.plan(queued.plan))
    for said in (
        "13,438, 128 of them held out",
        "598,907 trained per epoch",
        "70: 1 epoch ",
        "32 rows per step, packed",
    ):
        assert said in text
    for said in ("1.32e-03, cosine", "16 (alpha 32, dropout 0)", "nf4", "! only 70 optimizer steps"):
        assert said in text
    assert [line[:9] for line in text.splitlines() if line.startswith("!")] == ["! 2 rows ", "! 1 rows ", "! only 70"]


def test_the_plan_shows_what_was_found_in_the_data(queued: Job) -> None:
    assert queued.plan is not None
    assert queued.plan.data is not None
    text = drawn(show.plan(queued.plan))
    for said in (
        "chat, chat template 0123456789ab",
        "≤32 ▁  ≤64 █  ≤128 ▅  median 45, 95 % up to 98, longest 301",
        "13,437 of 13,438 rows end in a trained <|im_end|>",
        "2 cut, 1 dropped, 3 skipped as bad, 4 repeat an earlier row, 5 held out and trained, 6 begin with two BOS",
    ):
        assert said in text
    clean = queued.plan.data.model_copy(
        update=dict.fromkeys([name for name in DataReport.model_fields if name.endswith("_rows")], 0)
    )
    assert "among them" not in drawn(show.plan(queued.plan.model_copy(update={"data": clean})))


def test_a_waiting_job_shows_its_position(queued: Job) -> None:
    text = drawn(show.job(queued))
    assert "position 3" in text
    assert "demo=quotes" in text


def test_a_finished_job_shows_both_losses_and_how_to_download_it(succeeded: Job) -> None:
    text = drawn(show.job(succeeded))
    for said in ("3.2500", "2.5000", "37.5%", "50.0%", "in 3:20", "s3://bucket/adapters/", "milliner pull ftjob-1 DIR"):
        assert said in text
    assert "better: the loss fell by 0.7500 nats" in text
    assert "milliner report ftjob-1" in text
    for said in (
        "loss 3.2500 → 2.5000 reproduced (off by 0.0002)",
        "vLLM cannot serve it (it is a DoRA)",
        "signed by  nobody",
    ):
        assert said in text


def test_a_failed_job_shows_code_step_hint_and_the_last_log_lines(failed: Job) -> None:
    text = drawn(show.outcome(failed))
    assert text.splitlines() == [
        "failed: the trainer died three times (poison, step 4)",
        "  Killed [9]",
        "→ lower batch_size",
    ]


def test_problems_are_a_table_with_a_count_of_the_rest() -> None:
    problem = {"line": 7, "field": "messages[i].role", "message": 'found "bot"', "hint": "one of system, user"}
    report = {"rows": 18, "bad_rows": 22, "format": "chat", "problems": [problem]}
    file = {"id": "file-1", "bytes": 9, "created_at": 0, "filename": "[red]x.jsonl", "purpose": "fine-tune"}
    text = drawn(show.problems(File.model_validate(file | {"status": "error", "sha256": "0" * 64, "report": report})))
    assert "[red]x.jsonl: 22 of 40 rows cannot be trained on" in text
    assert "and 21 more" in text
    assert [word for word in ("7", "messages[i].role", 'found "bot"', "one of system, user") if word not in text] == []


def test_lists_fold_long_names_and_never_cut_them(succeeded: Job) -> None:
    name = "ft:small:org:suffix:" + "x" * 60
    models = [Model(id=name, created=0, owned_by="me", base="small", bytes=23_100_000)]
    assert drawn(show.models(models), width=60).count("x") == name.count("x")
    assert "3.250 → 2.500" in drawn(show.jobs([succeeded]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (92, "1:32"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(None, ""), (5, "5 B"), (4_100, "4.1 kB"), (23_100_000, "23.1 MB"), (2_720_000_000, "2.7 GB")]
)
def test_sizes(number: int | None, text: str) -> None:
    assert show.size(number) == text
