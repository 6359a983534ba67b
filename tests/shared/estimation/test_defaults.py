"""The planner's recipe and the estimate resolve "auto" to the same numbers, for every shape of data."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidRequest, TrainingFailed
from shared.estimation import architecture, defaults
from shared.estimation.estimate import Data, EstimateCreate, Resolved, estimate, resolve
from shared.schemas.requests import Lora, Method, TrainerParams
from shared.schemas.results import Recipe
from tests.shared.architectures import REAL
from worker.trainer.planning import recipe

CONTEXT = 4096
CONFIG = REAL["SmolLM2-135M"][1] | {"max_position_embeddings": CONTEXT}
ROWS = [1, 19, 20, 50, 200, 999, 1_000, 5_000, 10_000, 20_000, 50_000]
LONGEST = [8, 64, 65, 128, 129, 300, 1537, 2049, 5000]


def by_planner(request: EstimateCreate, rows: int, longest: int) -> Recipe:
    """The recipe of a job with the fields of `request`."""
    method = request.method or Method()
    base = recipe.BaseTraits("llama", 576, CONTEXT)
    cut = recipe.max_length(request.trainer, base, longest)
    found, _ = recipe.resolve(
        method,
        request.lora,
        request.trainer,
        request.quantization,
        seed=1,
        base=base,
        size=recipe.Size(rows, longest, min(longest, cut)),
        labels=["a", "b"] if method.type == "classification" else None,
    )
    return found


def numbers(found: Resolved | Recipe) -> dict[str, Any]:
    settings = found if isinstance(found, Recipe) else found.settings
    names = ("n_epochs", "batch_size", "micro_batch", "r", "alpha", "total_steps", "warmup_steps", "packing")
    return {name: getattr(settings, name) for name in names} | {"max_length": found.max_length}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["supervised", "classification"])
def test_planner_and_estimate_agree(method: str, packing: bool) -> None:
    read = architecture.read_config(CONFIG)
    base = read if method == "supervised" else architecture.classifier(read)
    compared = 0
    for batch, length, steps in product(["auto", 5, 256], ["auto", 8, 300, CONTEXT], [None, 7]):
        settings = {"hyperparameters": {"batch_size": batch}}
        request = EstimateCreate.model_validate(
            {
                "model": "smol",
                "method": {"type": method, method: settings},
                "trainer": {"packing": packing, "max_length": length, "max_steps": steps},
            }
        )
        for rows, longest in product(ROWS, LONGEST):
            ours = resolve(request, base, Data(rows, 30 * rows, longest, "plan"))
            assert numbers(ours) == numbers(by_planner(request, rows, longest)), (batch, length, steps, rows, longest)
            compared += 1
    assert compared == 24 * len(ROWS) * len(LONGEST)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trainer": {"micro_batch": 3}},
        {"lora": {"r": 4, "alpha": 3}},
        {"hyperparameters": {"n_epochs": 9}},
        {"trainer": {"max_length": 100}, "hyperparameters": {"batch_size": 1}},
    ],
    ids=str,
)
def test_an_estimate_shows_the_numbers_of_the_recipe(fields: dict[str, Any]) -> None:
    request = EstimateCreate.model_validate({"model": "smol"} | fields)
    as_job = EstimateCreate.model_validate(
        {"model": "smol"}
        | {name: value for name, value in fields.items() if name != "hyperparameters"}
        | {"method": {"type": "supervised", "supervised": {"hyperparameters": fields.get("hyperparameters", {})}}}
    )
    for rows, longest in product(ROWS, LONGEST):
        answer = estimate(request, CONFIG, Data(rows, 30 * rows, longest, "plan"))
        planned = by_planner(as_job, rows, longest)
        assert (answer.n_epochs, answer.r, answer.micro_batch) == (planned.n_epochs, planned.r, planned.micro_batch)
        assert answer.max_length == min(longest, planned.max_length)


@pytest.mark.parametrize(("rows", "micro_batch"), [(50, 1), (200, 4)])
def test_few_rows_make_a_small_micro_batch(rows: int, micro_batch: int) -> None:
    """The batch is small there, and a micro-batch is at most a batch."""
    request = EstimateCreate.model_validate({"model": "smol"})
    assert estimate(request, CONFIG, Data(rows, 30 * rows, 300, "plan")).micro_batch == micro_batch


def test_rows_of_unknown_length_are_planned_as_long_as_they_may_be() -> None:
    base = architecture.read_config(CONFIG)
    for length, rows in product(["auto", 300, CONTEXT], ROWS):
        request = EstimateCreate.model_validate({"model": "smol", "trainer": {"max_length": length}})
        ours = resolve(request, base, Data(rows, 30 * rows, None, "file_size"))
        assert numbers(ours) == numbers(by_planner(request, rows, 100_000))
        answer = estimate(request, CONFIG, Data(rows, 30 * rows, None, "file_size"))
        assert f"the longest row has {ours.longest_row:,} tokens" in answer.assumptions


def test_a_length_above_the_context_is_refused_with_the_same_words() -> None:
    request = EstimateCreate.model_validate({"model": "smol", "trainer": {"max_length": CONTEXT + 1}})
    with pytest.raises(InvalidRequest) as by_estimate:
        estimate(request, CONFIG, None)
    with pytest.raises(TrainingFailed) as by_recipe:
        by_planner(request, 10, 10)
    answers = [(error.value.message, error.value.code, error.value.param) for error in (by_estimate, by_recipe)]
    assert answers[0] == answers[1]
    assert answers[0][1:] == ("invalid_max_length", "trainer.max_length")
    assert by_recipe.value.hint == '"auto", or at most 4096'


@pytest.mark.parametrize("name", REAL)
def test_planner_and_estimate_read_the_same_context(name: str, tmp_path: Path) -> None:
    config = REAL[name][1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recipe.read_traits(str(tmp_path)).context == architecture.read_config(config).context


@pytest.mark.parametrize(
    ("rows", "heldout"), [(0, 0), (19, 0), (20, 1), (39, 1), (40, 2), (1000, 50), (4000, 200), (50_000, 200)]
)
def test_held_out_rows_are_five_percent_up_to_200(rows: int, heldout: int) -> None:
    assert defaults.heldout_rows(rows) == heldout


def test_full_finetuning_has_no_rank() -> None:
    settings = defaults.resolve(
        "supervised",
        Method().hyperparameters,
        Lora(r=8, alpha=4),
        TrainerParams(full_finetuning=True),
        rows=100,
        longest_row=100,
    )
    assert (settings.r, settings.alpha) == (0, 0)
