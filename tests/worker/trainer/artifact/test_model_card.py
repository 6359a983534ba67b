"""The model card has the measurements, and metadata that model hubs can read, and nothing about the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shared.schemas.results import Metrics
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes, recipe_of, run
from worker.trainer.artifact import model_card
from worker.trainer.protocol import Done


@pytest.fixture
def lines(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> list[str]:
    task = make_task(
        write_rows(quotes(24)), base_license="apache-2.0", lora={"r": 4, "use_rslora": True},
        trainer={"max_steps": 4, "eval_every": 2},
    )  # fmt: skip
    done = run(task, tmp_path).of(Done)[0]
    return Path(done.path, "README.md").read_text().splitlines()


def test_a_card_has_metadata_for_hubs_and_the_measurements(lines: list[str], tmp_path: Path) -> None:
    text = "\n".join(lines)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["library_name"], front["license"]) == ("acme/tiny", "peft", "apache-2.0")
    assert "lora" in front["tags"]
    assert "| LoRA | r 4, alpha 8, dropout 0, rsLoRA |" in lines
    assert any(line.startswith("| 2 | ") for line in lines)
    assert any(line.startswith("| 4 | ") for line in lines)
    assert "--max-lora-rank 8 --lora-modules hat=DIR" in text
    assert f'revision="{"0" * 40}"' in text
    assert str(tmp_path) not in text


def test_a_card_omits_a_missing_licence_and_depends_on_the_data(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    first = make_task(write_rows(quotes(4)), trainer={"max_steps": 1})
    report = run(first, tmp_path).of(Done)[0].report
    ours = model_card.text(first, recipe_of(first), report, [])
    assert "license:" not in ours
    assert "## Loss" not in ours
    assert "the training rows themselves" in ours
    other = make_task(write_rows(quotes(5)), trainer={"max_steps": 1})
    assert model_card.text(other, recipe_of(first), report, []) != ours
    odd = first.model_copy(update={"base_name": "acme/tiny: 1 # no comment"})
    front = yaml.safe_load(model_card.text(odd, recipe_of(first), report, []).split("---\n")[1])
    assert front["base_model"] == odd.base_name


def test_a_long_curve_stays_one_line() -> None:
    assert model_card.sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert model_card.sparkline([1.0, 1.0]) == "▁▁"
    assert len(model_card.sparkline([float(i) for i in range(10_000)])) <= model_card.POINTS


def test_the_table_of_evaluations_ends_with_the_last_evaluation(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 1})
    report = run(task, tmp_path).of(Done)[0].report
    metrics = [Metrics(step=i, total_steps=99, train_loss=1.0, full_valid_loss=2.0) for i in range(1, 100)]
    shown = [
        line
        for line in model_card.text(task, recipe_of(task), report, metrics).splitlines()
        if line.endswith("| 2.0000 |")
    ]
    assert len(shown) <= model_card.MOST_EVALUATIONS + 1
    assert shown[-1] == "| 99 | 2.0000 |"


def test_a_card_shows_how_to_use_the_requested_exports(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 1, "exports": ["merged", "gguf_merged"]})
    text = (Path(run(task, tmp_path).of(Done)[0].path) / "README.md").read_text()
    exports = text.partition("## Exports")[2]
    assert "vllm serve DIR/exports/merged\nllama-cli -m DIR/exports/gguf_merged/model.gguf\n" in exports
    assert "gguf_adapter" not in exports
