"""Every "auto" resolves to the documented number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrainingFailed
from shared.estimation import defaults
from shared.schemas.requests import Lora, Method, MethodName, Quantization, TrainerParams
from shared.schemas.results import Recipe
from worker.trainer.planning import recipe
from worker.trainer.planning.recipe import BaseTraits, Size

SMOL = BaseTraits("llama", 576, 8192)


def resolve(
    rows: int = 1000,
    longest: int = 50,
    base: BaseTraits = SMOL,
    method: MethodName = "supervised",
    **asked: dict[str, Any],
) -> tuple[Recipe, list[str]]:
    return recipe.resolve(
        Method.of(method, **asked.get("hyperparameters", {})),
        Lora.model_validate(asked.get("lora", {})),
        TrainerParams.model_validate(asked.get("trainer", {})),
        Quantization.NF4,
        seed=1,
        base=base,
        size=Size(rows, longest, min(longest, asked.get("trainer", {}).get("max_length", defaults.LONGEST_AUTO_ROW))),
    )


@pytest.mark.parametrize(
    ("rows", "n_epochs", "batch_size", "total_steps", "r"),
    [
        (1, 3, 1, 3, 16),
        (50, 3, 1, 150, 16),
        (500, 3, 8, 189, 16),
        (999, 3, 16, 189, 16),
        (2_233, 2, 32, 140, 16),
        (9_999, 2, 32, 626, 16),
        (20_000, 1, 32, 625, 32),
    ],
)
def test_auto_depends_on_the_number_of_rows(
    rows: int, n_epochs: int, batch_size: int, total_steps: int, r: int
) -> None:
    found, _ = resolve(rows)
    assert (found.n_epochs, found.batch_size, found.total_steps, found.r) == (n_epochs, batch_size, total_steps, r)


@pytest.mark.parametrize(
    ("model_type", "hidden", "rate"),
    [("llama", 2000, 5e-4), ("llama", 576, 1.320e-3), ("llama", 4096, 2.858e-4), ("qwen3", 4096, 4.721e-4)],
)
def test_learning_rate_falls_with_width(model_type: str, hidden: int, rate: float) -> None:
    base = BaseTraits(model_type, hidden, 8192)
    assert resolve(base=base)[0].learning_rate == pytest.approx(rate, rel=1e-3)
    doubled, _ = resolve(base=base, hyperparameters={"learning_rate_multiplier": 2})
    assert doubled.learning_rate == pytest.approx(2 * rate, rel=1e-3)


def test_full_finetuning_has_a_tenth_of_the_learning_rate_and_no_rank() -> None:
    full, _ = resolve(trainer={"full_finetuning": True})
    assert full.learning_rate == pytest.approx(resolve()[0].learning_rate / 10)
    assert (full.full_finetuning, full.r, full.alpha) == (True, 0, 0)


@pytest.mark.parametrize(("r", "alpha"), [("auto", 32), (4, 8), (16, 32), (64, 32)])
def test_alpha_is_twice_the_rank_up_to_32(r: Any, alpha: float) -> None:
    assert resolve(lora={"r": r})[0].alpha == alpha


@pytest.mark.parametrize(
    ("longest", "context", "length"), [(50, 8192, 64), (65, 8192, 128), (9000, 8192, 2048), (200, 100, 100)]
)
def test_max_length_fits_the_longest_row_and_the_base(longest: int, context: int, length: int) -> None:
    assert resolve(longest=longest, base=BaseTraits("llama", 576, context))[0].max_length == length


def test_max_length_above_the_bases_context_is_refused() -> None:
    with pytest.raises(TrainingFailed, match="at most 8,192") as failed:
        resolve(trainer={"max_length": 9000})
    assert failed.value.param == "trainer.max_length"


@pytest.mark.parametrize(
    ("trainer", "longest", "micro_batch"),
    [
        ({}, 50, 12),
        ({"max_length": 2048}, 50, 12),
        ({"max_length": 2048}, 9000, 1),
        ({"max_length": 256}, 9000, 6),
        ({"packing": False}, 50, 30),
        ({"packing": False, "max_length": 2048}, 512, 3),
        ({"micro_batch": 3}, 50, 3),
    ],
)
def test_micro_batch_holds_about_1536_tokens(trainer: dict[str, Any], longest: int, micro_batch: int) -> None:
    assert resolve(5000, longest, trainer=trainer)[0].micro_batch == micro_batch


def test_max_steps_limits_a_run_and_few_steps_cause_a_warning() -> None:
    found, warnings = resolve(trainer={"max_steps": 7})
    assert (found.total_steps, found.warmup_steps, found.save_every, found.eval_every) == (7, 1, 2, 2)
    assert any("only 7 optimizer steps" in warning for warning in warnings)
    assert resolve(5000)[1] == []


def test_given_settings_are_used() -> None:
    found, warnings = resolve(
        hyperparameters={"n_epochs": 2, "batch_size": 5},
        lora={"r": 3, "alpha": 7, "dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True, "use_dora": True},
        trainer={"eval_every": 11, "save_every": 13, "early_stopping": 2},
    )
    assert (found.n_epochs, found.batch_size, found.total_steps) == (2, 5, 400)
    assert (found.r, found.alpha, found.dropout, found.target_modules) == (3, 7, 0.1, ["q_proj"])
    assert (found.eval_every, found.save_every, found.early_stopping) == (11, 13, 2)
    assert (found.use_rslora, found.use_dora) == (True, True)
    assert any("DoRA" in warning for warning in warnings)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_warms_up_and_decays_towards_zero(schedule: str) -> None:
    found = resolve(3200, hyperparameters={"n_epochs": 1, "batch_size": 32})[0].model_copy(
        update={"schedule": schedule}
    )
    rates = [recipe.learning_rate_at(found, step) / found.learning_rate for step in range(found.total_steps)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama", "hidden_size": 64, "max_position_embeddings": 99}, BaseTraits("llama", 64, 99)),
        ({"model_type": "gpt2", "n_embd": 64, "n_positions": 99}, BaseTraits("gpt2", 64, 99)),
        ({"model_type": "g", "text_config": {"model_type": "t", "hidden_size": 8}}, BaseTraits("t", 8, None)),
    ],
)
def test_traits_are_read_from_config(tmp_path: Path, config: dict[str, Any], found: BaseTraits) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recipe.read_traits(str(tmp_path)) == found


def test_folder_without_a_text_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as failed:
        recipe.read_traits(str(tmp_path))
    assert failed.value.code == "unsupported_base_model"


def test_io_error_of_config_is_not_reported_as_the_users_error(unreadable: Callable[[str], str]) -> None:
    with pytest.raises(OSError, match="Errno 5"):
        recipe.read_traits(unreadable("config.json"))
