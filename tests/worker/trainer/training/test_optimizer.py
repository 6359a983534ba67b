"""LoRA+ uses two learning rates, through the whole schedule and across a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import MakeTask, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer.model.base import attach, load_base, trainable
from worker.trainer.protocol import CheckpointSaved, Done
from worker.trainer.training import optimizer


@pytest.mark.parametrize(("ratio", "rates"), [(None, {1e-3}), (16, {1e-3, 16e-3})])
def test_b_learns_at_a_multiple_of_the_rate(
    llama: str, make_task: MakeTask, write_rows: WriteRows, ratio: float | None, rates: set[float]
) -> None:
    task = make_task(write_rows(quotes(4)), lora={"r": 4, "loraplus_lr_ratio": ratio})
    adapted = attach(load_base(llama, Quantization.NONE), recipe_of(task)).adapted
    parameters = trainable(adapted)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    made = optimizer.make(adapted, recipe_of(task))
    optimizer.set_rate(made, 1e-3)
    assert {group["lr"] for group in made.param_groups} == rates
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    for name, parameter in parameters.items():
        # AdamW's first step changes each weight by the learning rate, whatever the gradient.
        wanted = 1e-3 * (ratio or 1) if ".lora_B." in name else 1e-3
        torch.testing.assert_close(
            before[name] - parameter.detach(), torch.full_like(parameter, wanted), rtol=1e-3, atol=1e-7
        )


def test_resumed_run_ends_with_the_same_bytes(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    """With two groups, the optimizer has the parameters in another order than the model."""
    task = make_task(
        write_rows(quotes(24)),
        hyperparameters={"n_epochs": 1, "batch_size": 4},
        lora={"r": 4, "dropout": 0.2, "loraplus_lr_ratio": 8},
    )
    whole = run(task, tmp_path / "whole")
    first = run(task, tmp_path / "first", stop_at=3)
    torch.manual_seed(999)
    run(task, tmp_path / "second", resume_from=first.of(CheckpointSaved)[-1].path)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")
    run(task, tmp_path / "plain", loraplus_lr_ratio=None)
    assert adapter_bytes(tmp_path / "plain") != adapter_bytes(tmp_path / "whole")
    card = (Path(whole.of(Done)[0].path) / "README.md").read_text()
    assert "(8 times that for B: LoRA+)" in card
