"""A run that starts from another job's adapter begins as that adapter, is compared with it, and resumes bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from shared.errors import TrainingFailed
from shared.schemas.requests import Quantization
from shared.schemas.results import Proof, Recipe, Report, Verdict
from tests.worker.trainer.conftest import MakeTask, Observer, WriteRows, adapter_bytes, quotes, recipe_of, run
from tests.worker.trainer.rows import preferences
from worker.trainer import methods
from worker.trainer.artifact.verify import verify
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate
from worker.trainer.forward.batches import batches
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import sft
from worker.trainer.model import adapter_weights, initial_adapter
from worker.trainer.model.base import Base, attach, load_base, trainable
from worker.trainer.protocol import CheckpointSaved, Done, Measured, Task, Verify

LAYOUT = Layout(packing=True, chunked=True, micro_batch=8, pad=2)
LORA = {"r": 4, "dropout": 0.1}
NAME = "ft:tiny:local::1"


@pytest.fixture(scope="module")
def source(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """A finished job on quotations: its report and its adapter's folder."""
    work = tmp_path_factory.mktemp("source")
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in quotes(40)))
    task = Task.model_validate(
        {
            "base_dir": llama, "base_name": "acme/tiny", "base_revision": "0" * 40, "training_file": str(rows),
            "validation_file": None, "method": {}, "lora": LORA, "quantization": "none", "trainer": {}, "seed": 7,
            "torch_threads": 1, "max_row_bytes": 1 << 20,
        }
    )  # fmt: skip
    done = run(task, work, total_steps=20, learning_rate=1e-2).of(Done)[0]
    return done.report, done.path


@pytest.fixture
def pairs(make_task: MakeTask, write_rows: WriteRows, source: tuple[Report, str]) -> Task:
    """A DPO task that starts from the adapter of `source`."""
    return make_task(
        write_rows(preferences(24)),
        method="dpo",
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        lora=LORA,
        trainer={"eval_every": 4, "micro_batch": 1},
        start_from=source[1],
        start_name=NAME,
    )


def test_training_starts_with_the_score_of_the_source(
    make_task: MakeTask, write_rows: WriteRows, source: tuple[Report, str], tmp_path: Path
) -> None:
    task = make_task(write_rows(quotes(40)), lora=LORA, start_from=source[1], start_name=NAME)
    observer = run(task, tmp_path, total_steps=3, learning_rate=3e-3)
    report = observer.of(Done)[0].report
    assert (report.base, report.start) == (source[0].base, source[0].tuned)
    assert report.tuned.loss < source[0].tuned.loss
    assert report.start_change is not None
    assert report.start_change.loss == report.tuned.loss - source[0].tuned.loss
    first = observer.of(Measured)[0].metrics.train_loss
    assert first is not None
    assert first < report.base.loss / 2
    card = (Path(observer.of(Done)[0].path) / "README.md").read_text()
    assert f"| training started from | {NAME}, weights SHA-256 `" in card
    assert f"| with the adapter that training started from | {source[0].tuned.loss:.4f} |" in card
    assert_verified(task, observer)


@pytest.mark.parametrize(
    ("quantization", "use_dora"),
    [("none", False), ("nf4", False), ("int8", False), ("none", True), ("nf4", True)],
)
def test_in_dpo_the_source_is_the_reference(
    llama: str, pairs: Task, encoder: Encoder, tmp_path: Path, quantization: str, use_dora: bool
) -> None:
    """Bit for bit, although training uses a forward of its own."""
    recipe = recipe_of(pairs, dropout=0.0, use_dora=use_dora)
    base, rows = load_base(llama, Quantization(quantization)), dataset.load(pairs, encoder).train
    adapted = with_adapter(base, recipe, tmp_path)
    origin = initial_adapter.load(str(tmp_path), adapted)
    initial_adapter.apply(adapted, origin)
    [batch] = batches(rows[:8], packing=True, micro_batch=8, pad=2)
    tally = methods.Tally()
    with base.precision():
        tally.add(methods.loss(adapted, batch, LAYOUT, recipe, start=origin))
    score = tally.score()
    assert score.loss == pytest.approx(math.log(2))
    assert (score.reward_accuracy, score.reward_margin) == (0.5, 0.0)
    with base.precision():
        against_base = methods.loss(adapted, batch, LAYOUT, recipe)
    assert against_base.margins is not None
    assert against_base.margins.abs().max() > 0
    with base.precision():
        torch.autograd.backward(methods.loss(adapted, batch, LAYOUT, recipe, start=origin).sums.sum())
    assert all(p.grad is not None and p.grad.any() for p in trainable(adapted).values())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_reference_has_no_dropout_and_draws_no_random_number(
    llama: str, pairs: Task, encoder: Encoder, tmp_path: Path, quantization: str
) -> None:
    base, rows = load_base(llama, Quantization(quantization)), dataset.load(pairs, encoder).train
    adapted = with_adapter(base, recipe_of(pairs, dropout=0.5), tmp_path)
    origin = initial_adapter.load(str(tmp_path), adapted)
    [batch] = batches(rows[:8], packing=True, micro_batch=8, pad=2)
    drawn = torch.get_rng_state()
    with base.precision(), torch.no_grad(), initial_adapter.applied(adapted, origin):
        first, second = (sft.loss(adapted.get_base_model(), batch, LAYOUT).sums for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(drawn, torch.get_rng_state())


def test_applying_the_initial_adapter_is_undone(llama: str, pairs: Task, encoder: Encoder, tmp_path: Path) -> None:
    """In train mode, and in an evaluation of the base alone, inside which the adapter is disabled."""
    recipe = recipe_of(pairs)
    base, rows = load_base(llama, Quantization.NONE), dataset.load(pairs, encoder).train
    adapted = with_adapter(base, recipe, tmp_path)
    origin = initial_adapter.load(str(tmp_path), adapted)
    initial_adapter.apply(adapted, origin)
    with torch.no_grad():
        for parameter in trainable(adapted).values():
            parameter.mul_(2)
    own = adapter_weights.adapter_tensors(adapted)
    pointers = {name: p.data_ptr() for name, p in trainable(adapted).items()}

    def score(*, adapter: bool, **changes: object) -> float:
        return evaluate.score(
            base, adapted, rows[:4], recipe.model_copy(update=changes), adapter=adapter, layout=LAYOUT, start=origin
        ).mean.loss

    plain = {"method": "supervised", "beta": None}
    alone, tuned = score(adapter=False, **plain), score(adapter=True, **plain)
    with initial_adapter.applied(adapted, origin):
        started = score(adapter=True, **plain)
        assert score(adapter=True) == pytest.approx(math.log(2))
    assert len({alone, tuned, started}) == 3
    assert score(adapter=False) != pytest.approx(math.log(2))
    assert (score(adapter=False, **plain), score(adapter=True, **plain)) == (alone, tuned)
    found = adapter_weights.adapter_tensors(adapted)
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    assert {name: p.data_ptr() for name, p in trainable(adapted).items()} == pointers
    assert all(module.training for module in adapted.modules())


@pytest.mark.parametrize("stop_at", [1, 5])
def test_dpo_after_supervised_training_resumes_bit_for_bit(pairs: Task, tmp_path: Path, stop_at: int) -> None:
    whole = run(pairs, tmp_path / "whole", learning_rate=3e-3)
    report = whole.of(Done)[0].report
    assert report.start is not None
    assert report.start.loss == pytest.approx(math.log(2))
    assert report.start.reward_margin == 0.0
    assert report.base.loss != pytest.approx(math.log(2))
    assert report.tuned.loss < 0.3
    assert report.start_change is not None
    assert report.start_change.verdict in (Verdict.BETTER, Verdict.UNKNOWN)
    first = run(pairs, tmp_path / "first", learning_rate=3e-3, stop_at=stop_at)
    torch.manual_seed(999)
    second = run(pairs, tmp_path / "second", learning_rate=3e-3, resume_from=first.of(CheckpointSaved)[-1].path)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")
    again = second.of(Done)[0].report
    assert (again.base, again.start, again.tuned) == (report.base, report.start, report.tuned)
    assert (again.change, again.start_change) == (report.change, report.start_change)
    assert_verified(pairs, whole, learning_rate=3e-3)


def test_an_adapter_equal_to_its_start_has_no_effect(pairs: Task, source: tuple[Report, str], tmp_path: Path) -> None:
    """It changes the base's logits, but this job has changed nothing in it."""
    observer = run(pairs, tmp_path, total_steps=2)
    done = observer.of(Done)[0]
    (Path(done.path) / adapter_weights.ADAPTER).write_bytes((Path(source[1]) / adapter_weights.ADAPTER).read_bytes())
    with pytest.raises(TrainingFailed, match="those of the adapter that training started from, bit for bit") as failed:
        proof_of(pairs, observer, total_steps=2)
    assert failed.value.code == "adapter_no_effect"


def with_adapter(base: Base, recipe: Recipe, folder: Path) -> PeftModel:
    """The base with a new adapter. Another adapter, with a visible effect, is written to `folder`."""
    torch.manual_seed(0)
    adapted = attach(base, recipe).adapted
    tensors = adapter_weights.adapter_tensors(adapted)
    torch.manual_seed(3)
    changed = {name: torch.randn_like(t) * 0.05 if ".lora_B" in name else t for name, t in tensors.items()}
    save_file(changed, folder / adapter_weights.ADAPTER)
    return adapted


def proof_of(task: Task, observer: Observer, **changes: object) -> Proof:
    done = observer.of(Done)[0]
    command = Verify(job="j", task=task, recipe=recipe_of(task, **changes), adapter_dir=done.path, report=done.report)
    return verify(command, stopping=lambda: False, tick=lambda: None).proof


def assert_verified(task: Task, observer: Observer, **changes: object) -> None:
    proof = proof_of(task, observer, **changes)
    assert (proof.base_deviation, proof.tuned_deviation) == (0, 0)
    assert proof.start_logit_difference is not None
    assert proof.start_logit_difference > 0
    assert load_file(Path(observer.of(Done)[0].path) / adapter_weights.ADAPTER).keys()
