"""An estimate uses the recipe's numbers, and takes tokens from a plan or from the file's bytes."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.estimation.estimate import Data, Estimate, EstimateCreate, estimate, from_plan, guess
from shared.schemas.requests import Lora, Method, Quantization, TrainerParams
from shared.schemas.results import Plan
from tests.results import RECIPE
from tests.shared.architectures import REAL
from worker.trainer.planning import recipe

SMOL = REAL["SmolLM2-135M"][1] | {"max_position_embeddings": 8192}
PLANNED = Data(rows=500, tokens=40_000, longest_row=300, source="plan")


def asked(data: Data | None = None, **fields: Any) -> Estimate:
    return estimate(EstimateCreate.model_validate({"model": "smol"} | fields), SMOL, data)


@pytest.mark.parametrize("rows", [50, 999, 5_000, 25_000])
@pytest.mark.parametrize("longest", [40, 300, 2048])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_auto_is_what_the_recipe_resolves(rows: int, longest: int, packing: bool) -> None:
    ours = asked(Data(rows, rows * 30, longest, "plan"), trainer={"packing": packing})
    resolved, _ = recipe.resolve(
        Method.of("supervised"),
        Lora(),
        TrainerParams(packing=packing),
        Quantization.NF4,
        seed=1,
        base=recipe.BaseTraits("llama", 576, 8192),
        size=recipe.Size(rows, longest, longest),
    )
    assert (ours.r, ours.n_epochs, ours.micro_batch) == (resolved.r, resolved.n_epochs, resolved.micro_batch)
    assert ours.max_length == min(longest, resolved.max_length)


def test_without_a_file_memory_is_estimated_and_time_is_not() -> None:
    bare = asked()
    assert (bare.tokens, bare.seconds, bare.n_epochs, bare.fits) == (None, None, None, None)
    assert bare.memory.total > 10**9
    assert bare.assumptions == ["the longest row has 2,048 tokens"]


def test_tokens_come_from_a_plan_or_are_guessed_from_the_files_size() -> None:
    planned, guessed = asked(PLANNED), asked(guess(rows=500, size=160_001))
    assert (planned.tokens, planned.tokens_source, planned.max_length) == (40_000, "plan", 300)
    assert (guessed.tokens, guessed.tokens_source, guessed.max_length) == (40_001, "file_size", 2048)
    assert any("divided by 4" in words for words in guessed.assumptions)
    assert not any("divided" in words for words in planned.assumptions)


def test_seconds_are_flop_divided_by_flop_a_second() -> None:
    known = asked(PLANNED, device_flops=1e12, hyperparameters={"n_epochs": 5})
    assert known.seconds == pytest.approx(known.flop_per_token * 5 * 40_000 / 1e12, abs=0.06)
    on_cpu = asked(PLANNED, device="cpu")
    assert on_cpu.gradient_checkpointing is False
    assert any("two cores" in words for words in on_cpu.assumptions)
    short = asked(PLANNED, trainer={"max_steps": 10}, hyperparameters={"batch_size": 5}, device_flops=1e12)
    assert known.seconds is not None
    assert short.seconds == pytest.approx(known.seconds / 50, abs=0.06)
    cut = asked(PLANNED, trainer={"max_length": 50})
    assert cut.tokens == 500 * 50


def test_hyperparameters_count_the_same_in_both_places() -> None:
    settings = {"n_epochs": 7}
    old = asked(PLANNED, hyperparameters=settings)
    new = asked(PLANNED, method={"type": "supervised", "supervised": {"hyperparameters": settings}})
    assert old == new
    assert old.n_epochs == 7


def test_an_estimate_that_does_not_fit_names_a_change_that_would() -> None:
    tight = asked(trainer={"micro_batch": 8}, device_memory_bytes=2_000_000_000)
    assert tight.fits is False
    assert tight.change is not None
    assert (tight.change.param, tight.change.value) == ("trainer.micro_batch", 4)
    assert asked(trainer={"micro_batch": 8}, device_memory_bytes=24 * 10**9).fits is True
    hopeless = asked(device_memory_bytes=10**8)
    assert (hopeless.fits, hopeless.change) == (False, None)
    assert hopeless.smallest > 10**8


def test_a_classifier_trains_its_head_and_packs_no_rows() -> None:
    method: dict[str, Any] = {"type": "classification", "classification": {"hyperparameters": {"batch_size": 32}}}
    generates, classifies = asked(PLANNED), asked(PLANNED, method=method)
    assert (generates.n_epochs, classifies.n_epochs) == (3, 10)
    assert classifies.parameters.trained == generates.parameters.trained + 2 * 576
    assert classifies.memory.total < generates.memory.total
    assert classifies.flop_per_token < generates.flop_per_token
    assert "the head has two labels" in classifies.assumptions
    with pytest.raises(InvalidRequest, match="'dpo' is not estimated"):
        asked(method={"type": "dpo"})


def test_settings_that_the_base_does_not_support_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 8,192 tokens"):
        asked(trainer={"max_length": 9000})
    with pytest.raises(InvalidRequest, match="names no linear module"):
        asked(lora={"target_modules": ["c_attn"]})


def test_an_encoder_is_estimated_as_a_classifier() -> None:
    config = REAL["RoBERTa-base"][1]
    unnamed, named = (
        estimate(EstimateCreate.model_validate({"model": "roberta"} | fields), config, PLANNED)
        for fields in ({}, {"method": {"type": "classification"}})
    )
    assert (unnamed.n_epochs, unnamed.memory) == (named.n_epochs, named.memory)
    assert "method is classification, the only one for an encoder" in unnamed.assumptions
    assert not any("classification" in assumption for assumption in named.assumptions)


@pytest.mark.parametrize(
    ("rows", "dropped", "heldout", "trained"),
    [
        (1000, 0, 50, 950),
        (1000, 100, 45, 855),
        (10, 0, 10, 10),  # too few rows to hold any out: the training rows are scored
        (1000, 0, 77, 1000),  # a validation file with 77 rows
        (9000, 0, 200, 8800),
    ],
)
def test_rows_of_a_plan_are_those_that_are_trained_on(rows: int, dropped: int, heldout: int, trained: int) -> None:
    plan = Plan(
        rows=rows,
        heldout_rows=heldout,
        tokens=30_000,
        trained_tokens=20_000,
        longest_row=70,
        truncated_rows=0,
        dropped_rows=dropped,
        warnings=[],
        recipe=RECIPE,
    )
    assert from_plan(plan) == Data(rows=trained, tokens=30_000, longest_row=70, source="plan")


def test_rows_of_a_file_leave_out_those_that_will_be_held_out() -> None:
    assert guess(rows=1000, size=4000) == Data(rows=950, tokens=1000, longest_row=None, source="file_size")
    # 1,000 rows are two epochs, 950 are three.
    assert asked(guess(rows=1000, size=4000)).n_epochs == 3
