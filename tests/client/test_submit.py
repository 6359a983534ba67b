"""The request's body: what was said is in it, what was not is left to the server."""

from __future__ import annotations

from typing import Any

import pytest

from client.submit import body_of, model_of
from shared.errors import InvalidRequest
from shared.schemas.requests import JobCreate

NOTHING: dict[str, Any] = {"hyperparameters": {"n_epochs": None}, "lora": {"r": None}, "trainer": {}}


def test_what_was_not_said_is_not_sent() -> None:
    assert body_of(model="small", **NOTHING, suffix=None, seed=None) == {"model": "small"}


def test_everything_said_arrives_in_its_place() -> None:
    body = body_of(
        model="small",
        hyperparameters={"n_epochs": 2, "batch_size": None, "learning_rate_multiplier": 0.5},
        lora={"r": 8, "alpha": None, "dropout": 0.0},
        trainer={"max_steps": 5, "packing": False},
        quantization="int8",
        priority=0,
    )
    job = JobCreate.model_validate(body | {"training_file": "file-1"})
    assert job.hyperparameters is not None
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert (job.lora.r, job.lora.alpha, job.quantization) == (8, "auto", "int8")
    assert (job.trainer.max_steps, job.trainer.packing) == (5, False)
    assert body["lora"] == {"r": 8, "dropout": 0.0}
    assert body["priority"] == 0


def test_an_adapter_to_start_from_brings_its_base_along() -> None:
    assert (model_of("small", None), model_of("small", "ftckpt_1")) == ("small", "small")
    assert model_of(None, "ft:small:me::1") == "ft:small:me::1"
    with pytest.raises(InvalidRequest, match="neither --model nor --from"):
        model_of(None, None)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"lora": {"r": 0}}, "lora.r"),
        ({"hyperparameters": {"n_epochs": 51}}, "method.supervised.hyperparameters.n_epochs"),
        ({"suffix": "two words"}, "suffix"),
        ({"trainer": {"max_length": 4}}, "trainer.max_length"),
    ],
)
def test_a_value_the_server_would_refuse_is_found_before_the_upload(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="found") as caught:
        body_of(model="small", **(NOTHING | change))
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)
