"""A complete run in this process: it learns, resumes bit for bit, and writes an adapter that anyone can load."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from shared.errors import TrainingFailed
from shared.schemas.results import Report
from tests.worker.trainer.conftest import MakeTask, Observer, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer.artifact import metrics_file
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import Loss, sft
from worker.trainer.model.base import attach, load_base
from worker.trainer.protocol import CheckpointSaved, Done, Measured, Notice, Stopped, Train
from worker.trainer.training import loop
from worker.trainer.training.loop import train


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_overfits_a_tiny_model(
    request: pytest.FixtureRequest,
    folder: str,
    quantization: str,
    make_task: MakeTask,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    task = make_task(
        write_rows(quotes(1)),
        base_dir=request.getfixturevalue(folder),
        quantization=quantization,
        hyperparameters={"n_epochs": 50, "batch_size": 1},
    )
    done = run(task, tmp_path, eval_every=None, learning_rate=1e-2).of(Done)[0]
    assert done.report.base.loss > 4
    assert done.report.tuned.loss < 0.5
    assert done.report.tuned.token_accuracy > 0.9
    assert done.report.heldout_source == "training_file"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_resumed_run_ends_with_the_same_bytes(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, quantization: str, stop_at: int
) -> None:
    task = make_task(
        write_rows(quotes(24)),
        quantization=quantization,
        hyperparameters={"n_epochs": 1, "batch_size": 4},
        lora={"dropout": 0.2},
        trainer={"eval_every": 2, "save_every": 3, "early_stopping": 9, "micro_batch": 1},
    )
    whole = run(task, tmp_path / "whole")
    first = run(task, tmp_path / "first", stop_at=stop_at)
    assert first.of(Stopped) == [Stopped(job="j", step=stop_at)]
    saved = first.of(CheckpointSaved)[-1]
    assert saved.step == stop_at
    torch.manual_seed(999)
    second = run(task, tmp_path / "second", resume_from=saved.path)
    times = {"train_seconds": 0.0, "tokens_per_second": 0.0, "peak_memory_bytes": 0, "fit": None}
    reports = [done.report.model_copy(update=times) for observer in (second, whole) for done in observer.of(Done)]
    assert reports[0] == reports[1]

    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")

    def losses(name: str) -> list[tuple[int, float | None, float | None]]:
        lines = metrics_file.read_metrics(tmp_path / name / "adapter" / "metrics.jsonl")
        return [(m.step, m.train_loss, m.valid_loss) for m in lines]

    assert losses("second") == losses("whole")


def test_stock_peft_loads_the_adapter_and_gets_the_reported_loss(
    llama: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(40)), quantization="nf4", hyperparameters={"n_epochs": 2, "batch_size": 4})
    report = run(task, tmp_path).of(Done)[0].report
    folder = tmp_path / "adapter"
    assert Report.model_validate_json((folder / "report.json").read_text()) == report
    assert report.tuned.loss < report.base.loss
    base = AutoModelForCausalLM.from_pretrained(
        llama,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    with warnings.catch_warnings():
        # peft 0.21 uses an attribute that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = PeftModel.from_pretrained(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama).chat_template
    lines = Path(task.training_file).read_text().splitlines()
    total, tokens = 0.0, 0
    for line in report.heldout_lines:
        ids = tokenizer(json.loads(lines[line - 1])["text"] + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            total += tuned(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert tokens == report.tuned.tokens
    assert total / tokens == pytest.approx(report.tuned.loss, rel=0.01)


def test_adapter_folder_has_no_local_path(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(write_rows(quotes(4)), trainer={"max_steps": 1})
    run(task, tmp_path)
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "0" * 40)
    assert any(name.endswith("q_proj") for name in config["target_modules"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in files if path.suffix != ".safetensors"]
    assert not any(task.base_dir.encode() in text or str(tmp_path).encode() in text for text in texts)
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors", ".jinja", ".md", ".milliner"}


def test_early_stopping_keeps_the_best_adapter(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(
        write_rows(quotes(24)),
        validation_file=write_rows([{"text": "nothing like it 123"}]),
        hyperparameters={"n_epochs": 20, "batch_size": 4},
        trainer={"eval_every": 1, "early_stopping": 3},
    )
    observer = run(task, tmp_path, learning_rate=3e-2)
    report = observer.of(Done)[0].report
    evaluations = [e.metrics.valid_loss for e in observer.of(Measured) if e.metrics.valid_loss is not None]
    assert report.steps == len(evaluations) < 120
    assert report.tuned.loss == min(evaluations)
    assert report.kept_step == 1 + evaluations.index(min(evaluations)) < report.steps
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"; the adapter is that of step {report.kept_step} |" in card
    assert any("stopping early" in notice.message for notice in observer.of(Notice))


def test_early_stopping_also_scores_the_last_step(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    """Otherwise steps after the last regular evaluation could never be kept."""
    trainer = {"eval_every": 2, "early_stopping": 3, "max_steps": 5}
    task = make_task(write_rows(quotes(24)), hyperparameters={"n_epochs": 5, "batch_size": 8}, trainer=trainer)
    observer = run(task, tmp_path, learning_rate=1e-3)
    assert [e.metrics.step for e in observer.of(Measured) if e.metrics.valid_loss is not None] == [2, 4, 5]
    assert observer.of(Done)[0].report.kept_step == 5


def test_a_diverged_run_fails_and_publishes_nothing(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(write_rows(quotes(24)), hyperparameters={"n_epochs": 2, "batch_size": 4})
    with pytest.raises(TrainingFailed) as failed:
        run(task, tmp_path, learning_rate=1e30)
    assert failed.value.code == "diverged"
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("eval_every", [1, None])
def test_divergence_in_the_last_step_is_found_by_the_evaluation(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, eval_every: int | None
) -> None:
    """A step's training loss is computed before its update. A NaN score cannot be stored as JSON either."""
    task = make_task(write_rows(quotes(24)), trainer={"max_steps": 1})
    with pytest.raises(TrainingFailed, match=r"after step 1: loss (nan|inf) on the held-out") as failed:
        run(task, tmp_path, learning_rate=1e30, eval_every=eval_every)
    assert failed.value.code == "diverged"
    assert not (tmp_path / "adapter").exists()


def test_base_with_a_nan_weight_is_refused(
    llama: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingFailed, match="the base model itself has loss nan") as failed:
        run(make_task(write_rows(quotes(24)), base_dir=str(base)), tmp_path)
    assert (failed.value.code, failed.value.param) == ("unsupported_base_model", "model")


def test_a_stop_ends_the_run_within_a_step_and_it_resumes_bit_for_bit(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(
        write_rows(quotes(24)),
        hyperparameters={"n_epochs": 1, "batch_size": 8},
        lora={"dropout": 0.2},
        trainer={"micro_batch": 1, "packing": False, "save_every": 9, "eval_every": 9},
    )
    run(task, tmp_path / "whole")
    observer, losses = Observer(), 0
    ordinary = sft.loss

    def counted(*args: Any) -> Loss:
        nonlocal losses
        losses += bool(observer.of(Measured))
        return ordinary(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sft, "loss", counted)
        command = Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(tmp_path / "first"))
        train(
            command,
            lambda: load_base(task.base_dir, task.quantization),
            emit=observer.events.append,
            stopping=lambda: losses >= 3,
        )
    assert losses == 3
    assert observer.of(Stopped) == [Stopped(job="j", step=1)]
    run(task, tmp_path / "second", resume_from=observer.of(CheckpointSaved)[-1].path)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")


def test_slow_steps_are_saved_by_time_with_the_same_result(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(
        write_rows(quotes(24)), lora={"dropout": 0.2}, trainer={"max_steps": 4, "save_every": 9, "eval_every": 9}
    )
    assert [saved.step for saved in run(task, tmp_path / "fast").of(CheckpointSaved)] == [4]
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    assert [saved.step for saved in run(task, tmp_path / "slow").of(CheckpointSaved)] == [1, 2, 3, 4]
    assert adapter_bytes(tmp_path / "slow") == adapter_bytes(tmp_path / "fast")


def test_an_attempt_that_ends_after_the_last_step_repeats_no_step(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(24)), trainer={"max_steps": 3, "save_every": 2})
    first = run(task, tmp_path / "first")
    again = run(task, tmp_path / "again", resume_from=first.of(CheckpointSaved)[-1].path)
    assert again.of(Measured) == []
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "first")
    assert again.of(Done)[0].report.tuned == first.of(Done)[0].report.tuned


@pytest.mark.parametrize("rows", [4, 24])
@pytest.mark.parametrize("validation", [False, True])
def test_held_out_lines_are_reported_only_if_taken_from_the_training_file(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, rows: int, validation: bool
) -> None:
    validation_file = write_rows(quotes(2)) if validation else None
    task = make_task(write_rows(quotes(rows)), validation_file=validation_file, trainer={"max_steps": 1})
    report = run(task, tmp_path).of(Done)[0].report
    assert len(report.heldout_lines) == (1 if rows == 24 and not validation else 0)


def test_stop_before_the_first_step_leaves_no_checkpoint(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    observer = Observer()
    task = make_task(write_rows(quotes(4)))
    command = Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(tmp_path))
    train(
        command,
        lambda: load_base(task.base_dir, task.quantization),
        emit=observer.events.append,
        stopping=lambda: True,
    )
    assert observer.events[-1] == Stopped(job="j", step=0)
    assert observer.of(CheckpointSaved) == []


def test_checkpoint_is_plain_data_and_valid_for_its_recipe_only(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(8)), trainer={"max_steps": 2, "save_every": 1})
    saved = run(task, tmp_path).of(CheckpointSaved)
    assert [s.step for s in saved] == [1, 2]
    assert saved[0].metrics.train_loss is not None
    assert {p.suffix for s in saved for p in Path(s.path).iterdir()} == {".json", ".jsonl", ".safetensors"}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    with pytest.raises(ValueError, match="another recipe"):
        run(task, tmp_path / "other", resume_from=saved[0].path, learning_rate=1e-9)


def test_the_same_base_serves_the_next_job(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(write_rows(quotes(24)), quantization="nf4", trainer={"max_steps": 3})
    base = load_base(task.base_dir, task.quantization)
    reports = []
    for name in ("one", "two"):
        observer = Observer()
        command = Train(job=name, task=task, recipe=recipe_of(task), work_dir=str(tmp_path / name))
        train(command, lambda: base, emit=observer.events.append, stopping=observer.stopping)
        reports.append(observer.of(Done)[0].report)
    assert reports[0].base == reports[1].base
    assert reports[0].tuned == reports[1].tuned


def test_scoring_can_be_stopped(llama: str, make_task: MakeTask, write_rows: WriteRows, encoder: Encoder) -> None:
    task = make_task(write_rows(quotes(4)))
    base = load_base(llama, task.quantization)
    recipe, rows = recipe_of(task), dataset.load(task, encoder).train
    adapted = attach(base, recipe).adapted
    layout = Layout(packing=True, chunked=True, micro_batch=1, pad=2)
    with pytest.raises(Interrupted):
        evaluate.score(base, adapted, rows, recipe, adapter=True, layout=layout, stopping=lambda: True)
    assert adapted.training
