"""Jobs as the API sends them, for tests of the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from client.connect import disconnect
from shared.schemas.responses import Job

RECIPE = {
    "method": "supervised",
    "beta": None,
    "n_epochs": 1,
    "batch_size": 32,
    "learning_rate_multiplier": 1.0,
    "learning_rate": 1.32e-3,
    "schedule": "cosine",
    "warmup_steps": 3,
    "total_steps": 70,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "r": 16,
    "alpha": 32.0,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
    "quantization": "nf4",
    "max_length": 256,
    "packing": True,
    "micro_batch": 8,
    "save_every": 25,
    "eval_every": None,
    "early_stopping": None,
    "seed": 7,
}
DATA = {
    "rows": 13438,
    "bad_rows": 3,
    "format": "chat",
    "problems": [],
    "tokens": 612345,
    "trained_tokens": 598907,
    "lengths": [{"upto": 32, "rows": 1000}, {"upto": 64, "rows": 8000}, {"upto": 128, "rows": 4438}],
    "length_p50": 45,
    "length_p95": 98,
    "length_max": 301,
    "truncated_rows": 2,
    "dropped_rows": 1,
    "duplicate_rows": 4,
    "duplicates": [{"line": 9, "of": 3}],
    "heldout_overlap_rows": 5,
    "heldout_overlap": [{"line": 1, "of": 7}],
    "stop_rows": 13437,
    "stop_token": "<|im_end|>",
    "double_bos_rows": 6,
    "chat_template_sha256": "0123456789abcdef" * 4,
}
PLAN = {
    "rows": 13438,
    "heldout_rows": 128,
    "tokens": 612345,
    "trained_tokens": 598907,
    "longest_row": 301,
    "truncated_rows": 2,
    "dropped_rows": 1,
    "warnings": [
        "2 rows are cut at 256 tokens (trainer.max_length)",
        "1 rows are dropped: no trained token is left within 256 tokens",
        "only 70 optimizer steps",
    ],
    "recipe": RECIPE,
    "data": DATA,
}
SCORE = {"loss": 3.25, "token_accuracy": 0.375, "tokens": 4096}
CHANGE = {
    "loss": -0.75,
    "low": -0.8125,
    "high": -0.6875,
    "rows": 128,
    "resamples": 2000,
    "verdict": "better",
    "caveats": [],
}
SAMPLE = {
    "line": 3,
    "prompt": "Quote by [b]A[/b]:",
    "reference": '"A hat is felt."',
    "base": {"text": " the user has asked", "ended": False},
    "tuned": {"text": '"A hat."', "ended": True},
}
FULL = {
    "weights_bytes": 538_060_032,
    "gradients_bytes": 538_060_032,
    "optimizer_bytes": 1_076_120_064,
    "total_bytes": 2_152_240_128,
}
REPORT: dict[str, Any] = {
    "base": SCORE,
    "tuned": SCORE | {"loss": 2.5, "token_accuracy": 0.5},
    "change": CHANGE,
    "samples": [SAMPLE],
    "heldout_source": "training_file_carved",
    "heldout_lines": [3, 9],
    "quantization": "nf4",
    "compute_dtype": "bfloat16",
    "steps": 70,
    "trained_tokens": 98765,
    "trainable_parameters": 4884480,
    "total_parameters": 139399488,
    "adapter_bytes": 19_537_920,
    "base_bytes": 112_000_000,
    "base_fp32_bytes": 538_060_032,
    "full_finetuning": FULL,
    "train_seconds": 200.4,
    "tokens_per_second": 492.8,
    "peak_memory_bytes": 2_500_000_000,
}
PROOF = {
    "base": SCORE,
    "tuned": REPORT["tuned"],
    "base_deviation": 0,
    "tuned_deviation": 2e-4,
    "tolerance": 0.005,
    "max_logit_difference": 3.5,
    "tensors": 420,
    "tokenizer_sha256": "0" * 64,
    "vllm": {"servable": False, "max_lora_rank": 16, "reasons": ["it is a DoRA"]},
}
JOB = {
    "id": "ftjob-1",
    "created_at": 1_800_000_000,
    "error": None,
    "fine_tuned_model": None,
    "finished_at": None,
    "hyperparameters": {},
    "method": {},
    "model": "small",
    "organization_id": "org-1",
    "result_files": [],
    "status": "queued",
    "trained_tokens": None,
    "training_file": "file-1",
    "validation_file": None,
    "seed": 7,
    "suffix": "quotes",
    "estimated_finish": None,
    "integrations": [],
    "metadata": {"demo": "quotes"},
    "phase": None,
    "reason": "planned",
    "queue_position": 3,
    "attempt": 1,
    "priority": 0,
    "lora": {},
    "quantization": "nf4",
    "trainer": {},
    "dry_run": False,
    "plan": PLAN,
    "progress": None,
    "report": None,
    "adapter": None,
}


@pytest.fixture(autouse=True)
def _disconnected() -> Iterator[None]:
    """Close connections after each test: a warning about an open one would fail another test."""
    yield
    disconnect()


@pytest.fixture
def queued() -> Job:
    return Job.model_validate(JOB)


@pytest.fixture
def running() -> Job:
    progress = {"step": 12, "total_steps": 70, "percent": 17.1, "tokens_per_second": 598.4, "eta_seconds": 92}
    moved = {"status": "running", "phase": "training", "queue_position": None, "progress": progress}
    return Job.model_validate(JOB | moved)


@pytest.fixture
def succeeded() -> Job:
    adapter = {"uri": "s3://bucket/adapters/org-1/ftjob-1/", "bytes": 23_100_000, "files": [], "proof": PROOF}
    ended = {"status": "succeeded", "queue_position": None, "report": REPORT, "adapter": adapter}
    return Job.model_validate(JOB | ended)


@pytest.fixture
def failed() -> Job:
    error = {
        "code": "poison",
        "message": "the trainer died three times",
        "hint": "lower batch_size",
        "step": 4,
        "last_log_lines": ["Killed [9]"],
    }
    return Job.model_validate(JOB | {"status": "failed", "queue_position": None, "error": error})
