"""Estimates through the official client: from the base model's stored config and the caller's file, without a job."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import FileObject

from shared.estimation.estimate import Estimate

BASE = "SmolLM2-135M-Instruct"


def ask(client: openai.OpenAI, **body: Any) -> Estimate:
    return Estimate.model_validate(client.post("/fine_tuning/estimate", cast_to=object, body={"model": BASE} | body))


def test_parameters_are_counted_from_the_stored_config(client: openai.OpenAI) -> None:
    answer = ask(client, lora={"r": 8}, device_memory_bytes=32 * 10**9)
    base = client.models.retrieve(BASE)
    assert answer.object == "fine_tuning.estimate"
    assert answer.parameters.total == base.to_dict()["parameters"] == 134_515_008
    assert answer.parameters.trained == 2_442_240
    assert answer.fits is True
    assert (answer.tokens, answer.seconds) == (None, None)


def test_an_estimate_for_a_file_creates_no_job(client: openai.OpenAI, dataset: FileObject) -> None:
    before = [job.id for job in client.fine_tuning.jobs.list(limit=5).data]
    answer = ask(client, training_file=dataset.id, hyperparameters={"n_epochs": 1})
    assert answer.tokens_source in ("file_size", "plan")
    assert answer.tokens is not None
    assert answer.seconds is not None
    assert [job.id for job in client.fine_tuning.jobs.list(limit=5).data] == before


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": "gpt-4o"}, "model", f"allowed: {BASE}"),
        ({"training_file": "file-nope"}, "training_file", "no file 'file-nope'"),
        ({"lora": {"target_modules": ["c_attn"]}}, "lora.target_modules", "some of down_proj"),
        ({"trainer": {"max_length": 100_000}}, "trainer.max_length", "at most 8,192 tokens"),
        ({"trainer": {"full_finetuning": True}}, "trainer.full_finetuning", "22 bytes a parameter"),
        ({"device": "tpu"}, "device", "'cuda' or 'cpu' (found 'tpu')"),
        ({"device_memory_bytes": 0}, "device_memory_bytes", "greater than or equal to 1"),
        ({"dry_run": True}, "dry_run", "unknown key 'dry_run'"),
    ],
)
def test_an_invalid_request_says_what_is_allowed(
    client: openai.OpenAI, body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, **body)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param
    assert message in refused.value.message
