"""The request's body: what was given is in it, what was not is left to the server, and errors repeat what was typed."""

from __future__ import annotations

from typing import Any

import pytest

from client.request import Body, Flag, body_of
from shared.errors import InvalidRequest
from shared.estimation.estimate import EstimateCreate
from shared.schemas.preview import PreviewCreate
from shared.schemas.requests import JobCreate

SMALL = Flag("--model", "model", "small")
EPOCHS = Flag("--epochs", "hyperparameters.n_epochs", 2)


def body(*sets: str, flags: tuple[Flag, ...] = (SMALL,)) -> Body:
    return body_of(JobCreate, flags, sets)


def refused(*sets: str, flags: tuple[Flag, ...] = (SMALL,)) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        body(*sets, flags=flags)
    return caught.value


def test_what_was_not_given_is_not_sent() -> None:
    flags = (SMALL, Flag("--suffix", "suffix", None), Flag("--epochs", "hyperparameters.n_epochs", None))
    assert body(flags=flags) == {"model": "small"}
    assert body_of(JobCreate, flags, None) == {"model": "small"}


def test_everything_given_arrives_in_its_place() -> None:
    sent = body(
        "hyperparameters.learning_rate_multiplier=0.5",
        "lora.dropout=0.0",
        "trainer.max_steps=5",
        "trainer.packing=false",
        "quantization=int8",
        "priority=0",
        flags=(SMALL, EPOCHS, Flag("--r", "lora.r", 8)),
    )
    job = JobCreate.model_validate(sent | {"training_file": "file-1"})
    assert job.hyperparameters is not None
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.hyperparameters.learning_rate_multiplier == 0.5
    assert (job.lora.r, job.lora.alpha, job.quantization) == (8, "auto", "int8")
    assert (job.trainer.max_steps, job.trainer.packing) == (5, False)
    assert sent["lora"] == {"r": 8, "dropout": 0.0}
    assert sent["priority"] == 0


def test_an_adapter_to_start_from_brings_its_base() -> None:
    start = "from_checkpoint=ft:small:me::1"
    assert body("from_checkpoint=ftckpt_1") == {"model": "small", "from_checkpoint": "ftckpt_1"}
    assert body(start, flags=()) == {"model": "ft:small:me::1", "from_checkpoint": "ft:small:me::1"}
    assert "no model is given; name one with --model" in refused(flags=()).message


def test_settings_of_one_method_name_the_method() -> None:
    sent = body("method.dpo.hyperparameters.beta=0.2")
    assert sent["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    other = refused("method.dpo.hyperparameters.beta=0.2", flags=(SMALL, Flag("--method", "method.type", "supervised")))
    assert other.message.startswith("--method supervised, --set method.dpo.hyperparameters.beta=0.2: ")
    assert "with type 'supervised' only method.supervised is allowed" in other.message


def test_both_places_for_hyperparameters_are_one() -> None:
    """The server would ignore those at the top beside those of the method."""
    sent = body("method.dpo.hyperparameters.beta=0.2", "hyperparameters.batch_size=4", flags=(SMALL, EPOCHS))
    assert "hyperparameters" not in sent
    assert sent["method"]["dpo"]["hyperparameters"] == {"beta": 0.2, "batch_size": 4, "n_epochs": 2}
    twice = refused("method.supervised.hyperparameters.n_epochs=3", flags=(SMALL, EPOCHS)).message
    assert twice.startswith("--epochs 2 contradicts --set method.supervised.hyperparameters.n_epochs=3: ")


@pytest.mark.parametrize(
    ("sets", "flags", "message"),
    [
        (("model=large",), (SMALL,), "--model small contradicts --set model=large: both set model; keep one of them"),
        (("hyperparameters.n_epochs=3",), (SMALL, EPOCHS), "--epochs 2 contradicts --set hyperparameters.n_epochs=3: "),
        (
            ("dry_run=false",),
            (SMALL, Flag("--dry-run", "dry_run", True)),
            "--dry-run contradicts --set dry_run=false: ",
        ),
        (("seed=1", "seed=2"), (SMALL,), "--set seed=1 contradicts --set seed=2: both set seed; keep one of them"),
    ],
)
def test_two_values_for_one_field_are_named(sets: tuple[str, ...], flags: tuple[Flag, ...], message: str) -> None:
    assert refused(*sets, flags=flags).message.startswith(message)


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert body("hyperparameters.n_epochs=2", "seed=1", "seed=1", flags=(SMALL, EPOCHS))["seed"] == 1


@pytest.mark.parametrize(
    ("flag", "param"),
    [
        (Flag("--r", "lora.r", 0), "lora.r"),
        (Flag("--epochs", "hyperparameters.n_epochs", 51), "method.supervised.hyperparameters.n_epochs"),
        (Flag("--suffix", "suffix", "two words"), "suffix"),
        (Flag("--max-length", "trainer.max_length", 4), "trainer.max_length"),
    ],
)
def test_a_value_the_server_would_refuse_is_found_before_the_upload(flag: Flag, param: str) -> None:
    error = refused(flags=(SMALL, flag))
    assert error.param == param
    assert error.message.startswith(f"{flag.name} {flag.value}: found ")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("lora.r=0", "found 0 for lora.r; allowed: auto or an integer from 1 to 256; example: --set lora.r=8"),
        ("trainer.packing=yes", 'found "yes" for trainer.packing; allowed: true or false; '),
        ("trainer.packing", "no value is given; allowed: true or false; example: --set trainer.packing=false"),
        ("trainer.exports=merged,merged", "names merged more than once; "),
        ("trainer.eval_evry=5", "unknown key 'trainer.eval_evry'; did you mean trainer.eval_every? allowed: trainer."),
        ('integrations=[{"type": "wandb", "wand": {}}]', "integrations.0: unknown key 'wand'; allowed: mlflow, type, "),
        ('integrations=[{"type": "wandb", "wandb": {}}]', "integrations.0.wandb.project is missing; allowed: text"),
        (
            'integrations=[{"type": "wandb", "wandb": {"project": "a/b"}}]',
            'found "a/b" for integrations.0.wandb.project; allowed: text of 1 to 128 characters matching ^',
        ),
        (f"metadata.{'k' * 65}=1", f"found '{'k' * 65}' as a name below metadata; allowed: text of up to 64 char"),
    ],
)
def test_an_error_repeats_what_was_typed(item: str, message: str) -> None:
    assert refused(item).message.startswith(f"--set {item}: {message}")


def test_no_error_has_the_words_of_pydantic() -> None:
    for item in ("hyperparameters.n_epochs=0", "lora.alpha=0", "lora.target_modules=[1]", "priority=101", "seed=-1"):
        error = refused(item)
        assert error.param is not None
        for word in ("literal", "Input should", "constrained", "["):
            assert word not in error.message.removeprefix(f"--set {item}: found [1]") + error.param


def test_a_long_value_is_cut_in_the_error() -> None:
    assert len(refused(f"suffix={'x' * 5000}").message) < 500


@pytest.mark.parametrize(
    ("request_", "item", "expected"),
    [
        (EstimateCreate, "device_memory_bytes=1000", {"device_memory_bytes": 1000}),
        (EstimateCreate, "trainer.micro_batch=4", {"trainer": {"micro_batch": 4}}),
        (PreviewCreate, "trainer.max_length=64", {"trainer": {"max_length": 64}}),
        (PreviewCreate, "lines=3,1", {"lines": [3, 1]}),
    ],
)
def test_the_other_requests_are_built_by_the_same_code(request_: Any, item: str, expected: Body) -> None:
    assert body_of(request_, [SMALL], [item]) == {"model": "small"} | expected
    with pytest.raises(InvalidRequest, match="unknown key 'seed'; "):
        body_of(request_, [SMALL], ["seed=1"])
