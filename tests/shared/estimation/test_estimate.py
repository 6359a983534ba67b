"""What is asked becomes numbers: "auto" as the recipe would have it, tokens from a plan or from bytes."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.estimation.estimate import Data, Estimate, EstimateCreate, estimate, guess
from shared.schemas.requests import Lora, Method, Quantization, TrainerParams
from tests.shared.architectures import REAL
from worker.trainer.planning import recipe

SMOL = REAL["SmolLM2-135M"][1] | {"max_position_embeddings": 8192}
PLANNED = Data(rows=500, tokens=40_000, longest_row=300, source="plan")


def asked(data: Data | None = None, **fields: Any) -> Estimate:
    return estimate(EstimateCreate.model_validate({"model": "smol"} | fields), SMOL, data)


@pytest.mark.parametrize("rows", [50, 999, 5_000, 25_000])
@pytest.mark.parametrize("longest", [40, 300, 2048])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_auto_is_what_the_recipe_makes_of_it(rows: int, longest: int, packing: bool) -> None:
    ours = asked(
        Data(rows, rows * 30, longest, "plan"), trainer={"packing": packing}, hyperparameters={"batch_size": 32}
    )
    resolved, _ = recipe.resolve(
        Method.of("supervised", batch_size=32),
        Lora(),
        TrainerParams(packing=packing),
        Quantization.NF4,
        seed=1,
        base=recipe.BaseTraits("llama", 576, 8192),
        size=recipe.Size(rows, longest, longest),
    )
    assert (ours.r, ours.n_epochs, ours.micro_batch) == (resolved.r, resolved.n_epochs, resolved.micro_batch)
    assert ours.max_length == min(longest, resolved.max_length)


def test_without_a_file_there_is_memory_and_no_time() -> None:
    bare = asked()
    assert (bare.tokens, bare.seconds, bare.n_epochs, bare.fits) == (None, None, None, None)
    assert bare.memory.total > 10**9
    assert bare.assumptions == ["the longest row has 2,048 tokens"]


def test_a_plan_is_believed_and_a_size_is_a_guess() -> None:
    planned, guessed = asked(PLANNED), asked(guess(rows=500, size=160_001))
    assert (planned.tokens, planned.tokens_source, planned.max_length) == (40_000, "plan", 300)
    assert (guessed.tokens, guessed.tokens_source, guessed.max_length) == (40_001, "file_size", 2048)
    assert any("divided by 4" in words for words in guessed.assumptions)
    assert not any("divided" in words for words in planned.assumptions)


def test_time_is_flop_over_flops() -> None:
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


def test_old_and_new_hyperparameters_are_twins() -> None:
    knobs = {"n_epochs": 7}
    old = asked(PLANNED, hyperparameters=knobs)
    new = asked(PLANNED, method={"type": "supervised", "supervised": {"hyperparameters": knobs}})
    assert old == new
    assert old.n_epochs == 7


def test_the_verdict_names_the_change() -> None:
    tight = asked(trainer={"micro_batch": 8}, device_memory_bytes=2_000_000_000)
    assert tight.fits is False
    assert tight.change is not None
    assert (tight.change.param, tight.change.value) == ("trainer.micro_batch", 4)
    assert asked(trainer={"micro_batch": 8}, device_memory_bytes=24 * 10**9).fits is True
    hopeless = asked(device_memory_bytes=10**8)
    assert (hopeless.fits, hopeless.change) == (False, None)
    assert hopeless.smallest > 10**8


def test_a_classifier_has_a_head_of_its_own_and_no_packed_rows() -> None:
    knobs: dict[str, Any] = {"type": "classification", "classification": {"hyperparameters": {"batch_size": 32}}}
    writes, classifies = asked(PLANNED), asked(PLANNED, method=knobs)
    assert (writes.n_epochs, classifies.n_epochs) == (3, 10)
    assert classifies.parameters.trained == writes.parameters.trained + 2 * 576
    assert classifies.memory.total < writes.memory.total
    assert classifies.flop_per_token < writes.flop_per_token
    assert "the head has two labels" in classifies.assumptions
    with pytest.raises(InvalidRequest, match="'dpo' is not estimated"):
        asked(method={"type": "dpo"})


def test_what_the_base_cannot_bear_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 8,192 tokens"):
        asked(trainer={"max_length": 9000})
    with pytest.raises(InvalidRequest, match="names no linear module"):
        asked(lora={"target_modules": ["c_attn"]})
