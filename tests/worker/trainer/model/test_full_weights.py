"""Full fine-tuning: gradients equal transformers' own, the base is unchanged, and anyone can load the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import TrainingFailed
from shared.estimation.memory_model import FULL_BYTES
from shared.schemas.requests import Quantization
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, Observer, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoder, Row
from worker.trainer.forward import log_likelihood
from worker.trainer.forward.batches import IGNORED, batches, trained_tokens
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import sft
from worker.trainer.model import adapter_weights
from worker.trainer.model.base import attach, detach, load_base, trainable
from worker.trainer.model.full_weights import FullWeights
from worker.trainer.planning.prepare import prepare
from worker.trainer.protocol import CheckpointSaved, Done, Measured, Notice, Stopped, Task, Train
from worker.trainer.training import checkpoint
from worker.trainer.training.loop import train

#: Bases with tied and untied heads, biases and learned positions, or capped logits.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
}


@pytest.fixture
def full(make_task: MakeTask, write_rows: WriteRows) -> Callable[..., Task]:
    def make(rows: list[dict[str, Any]] | None = None, **fields: Any) -> Task:
        trainer = {"full_finetuning": True} | fields.pop("trainer", {})
        return make_task(write_rows(rows or quotes(24)), trainer=trainer, **fields)

    return make


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_that_of_a_plain_forward(
    kind: str, packing: bool, full: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' model sees each row alone. Ours runs micro-batches, with the head in chunks of five tokens."""
    monkeypatch.setattr(log_likelihood, "LEARNED_CHUNK_BYTES", 5 * 4 * 320)
    tiny_base(tmp_path / "base", kind, **KINDS[kind])
    task = full(quotes(9), base_dir=str(tmp_path / "base"))
    rows = dataset.load(task, Encoder(task.base_dir)).train
    wanted = plain_gradients(task.base_dir, rows)
    base = load_base(task.base_dir, Quantization.NONE, compute_dtype=torch.float32)
    whole = attach(base, recipe_of(task)).adapted
    layout = Layout(packing=packing, chunked=True, micro_batch=2, pad=2)
    for batch in batches(rows, packing=packing, micro_batch=2, pad=2):
        torch.autograd.backward(sft.loss(base.model, batch, layout).sums.sum() / trained_tokens(rows))
    assert trainable(whole).keys() == wanted.keys()
    for name, weight in trainable(whole).items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-3, atol=2e-6, msg=name)


def plain_gradients(folder: str, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    plain.train()
    for row in rows:
        (batch,) = batches([row], packing=False, micro_batch=1, pad=2)
        logits = plain(input_ids=batch.input_ids).logits[0]
        nats = functional.cross_entropy(logits, batch.targets[0], ignore_index=IGNORED, reduction="sum")
        torch.autograd.backward(nats / trained_tokens(rows))
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def test_gradients_use_the_weights_of_documents_from_backward(
    full: Callable[..., Task], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In DPO answers have different signs. The head's gradient must be that of the weighted sum too."""
    monkeypatch.setattr(log_likelihood, "LEARNED_CHUNK_BYTES", 5 * 4 * 320)
    task = full(quotes(3))
    rows = dataset.load(task, Encoder(llama)).train
    base = load_base(llama, Quantization.NONE, compute_dtype=torch.float32)
    whole = attach(base, recipe_of(task)).adapted
    found = {}
    for chunked in (True, False):
        (batch,) = batches(rows, packing=True, micro_batch=9, pad=2)
        nats = log_likelihood.log_likelihood(
            base.model, batch, Layout(packing=True, chunked=chunked, micro_batch=9, pad=2)
        ).nats
        weights = torch.tensor([1.0, -2.0, 0.5])
        gradients = torch.autograd.grad((nats * weights).sum(), list(trainable(whole).values()))
        found[chunked] = dict(zip(trainable(whole), gradients, strict=True))
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name], rtol=1e-3, atol=1e-4, msg=name)


# ---------------------------------------------------------------- the base


def test_the_base_is_unchanged_with_trained_weights_disabled_or_detached(full: Callable[..., Task], llama: str) -> None:
    base = load_base(llama, Quantization.NONE)
    before = {name: parameter.clone() for name, parameter in base.model.state_dict().items()}
    objects = dict(base.model.named_parameters())
    attached = attach(base, recipe_of(full()))
    whole = attached.adapted
    assert isinstance(whole, FullWeights)
    assert base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    assert all(p.dtype == torch.float32 and p.requires_grad for p in base.model.parameters())
    with torch.no_grad():
        for weight in whole.weights.values():
            weight.add_(1e-3)
    embedding = base.model.get_input_embeddings()
    for switch, dtype in ((whole.train, torch.float32), (whole.eval, base.compute_dtype)):
        switch()
        assert embedding.weight.dtype == dtype
        with whole.disable_adapter():
            for name, tensor in base.model.state_dict().items():
                assert torch.equal(tensor.to(before[name].dtype), before[name])
        assert not torch.equal(embedding.weight.to(base.compute_dtype), before["model.embed_tokens.weight"])
    detach(attached)
    assert all(base.model.get_parameter(name) is parameter for name, parameter in objects.items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_next_job_on_the_base_gives_the_same_adapter_as_on_a_new_one(
    full: Callable[..., Task], make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    base = load_base(full().base_dir, Quantization.NONE)
    config = base.model.config.to_dict()
    lora = make_task(write_rows(quotes(24)), trainer={"max_steps": 3})
    for name, task in (("full", full(trainer={"max_steps": 3})), ("second", lora)):
        observer = Observer()
        command = Train(job="j", task=task, recipe=recipe_of(task), work_dir=str(tmp_path / name))
        train(command, lambda: base, emit=observer.events.append, stopping=observer.stopping)
        assert observer.of(Done)
        assert base.model.config.to_dict() == config
    run(lora, tmp_path / "fresh")
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "fresh")


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_and_stock_transformers_loads_the_result(kind: str, full: Callable[..., Task], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_base(base, kind, **KINDS[kind])
    rows = quotes(2)
    task = full(rows, base_dir=str(base), hyperparameters={"n_epochs": 40, "batch_size": 2})
    [done] = run(task, tmp_path, eval_every=None, learning_rate=3e-3).of(Done)
    found = done.report
    assert found.base.loss > 3
    assert found.tuned.loss < 0.5
    assert found.trainable_parameters == found.total_parameters == found.full_finetuning.weights_bytes // 4
    folder = tmp_path / "adapter"
    published, stored = (load_file(place / "model.safetensors") for place in (folder, base))
    assert {name: t.dtype for name, t in published.items()} == {name: t.dtype for name, t in stored.items()}
    assert found.adapter_bytes == sum(tensor.nbytes for tensor in published.values())
    assert json.loads((folder / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += tuned(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert total / tokens == pytest.approx(found.tuned.loss, abs=0.02)
    assert tokens == found.tuned.tokens
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (front["base_model_relation"], front["library_name"]) == ("finetune", "transformers")
    assert front["tags"] == ["milliner"]
    texts = [p.read_text() for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors"]
    assert not any(task.base_dir in text or str(tmp_path) in text for text in texts)
    assert "vllm serve DIR" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_resumed_run_ends_with_the_same_bytes(full: Callable[..., Task], tmp_path: Path, method: str) -> None:
    pairs = [{"prompt": row["text"][:12], "chosen": row["text"][12:], "rejected": "felt"} for row in quotes(24)]
    task = full(
        pairs if method == "dpo" else None,
        method=method,
        hyperparameters={"n_epochs": 1, "batch_size": 4},
        trainer={"eval_every": 2, "save_every": 3, "early_stopping": 9, "micro_batch": 1},
    )
    whole = run(task, tmp_path / "whole", learning_rate=1e-3)
    first = run(task, tmp_path / "first", stop_at=4, learning_rate=1e-3)
    assert first.of(Stopped) == [Stopped(job="j", step=4)]
    saved = first.of(CheckpointSaved)[-1]
    second = run(task, tmp_path / "second", resume_from=saved.path, learning_rate=1e-3)
    assert model_bytes(tmp_path / "second") == model_bytes(tmp_path / "whole")
    tuned = [observer.of(Done)[0].report.tuned for observer in (whole, second)]
    assert tuned[0] == tuned[1]
    if method == "dpo":
        assert (tuned[0].reward_accuracy or 0) > 0.5


def test_early_stopping_keeps_the_best_weights(
    full: Callable[..., Task], write_rows: WriteRows, tmp_path: Path
) -> None:
    task = full(
        validation_file=write_rows([{"text": "nothing like it 123"}]),
        hyperparameters={"n_epochs": 20, "batch_size": 4},
        trainer={"eval_every": 1, "early_stopping": 3},
    )
    observer = run(task, tmp_path, learning_rate=3e-3)
    report = observer.of(Done)[0].report
    evaluations = [e.metrics.valid_loss for e in observer.of(Measured) if e.metrics.valid_loss is not None]
    assert report.steps == len(evaluations) < 120
    assert report.tuned.loss == min(evaluations)
    assert any("stopping early" in notice.message for notice in observer.of(Notice))


def test_a_checkpoint_has_twelve_bytes_for_each_parameter(full: Callable[..., Task], tmp_path: Path) -> None:
    """Weights and two moments in fp32, with tied weights once."""
    observer = run(full(trainer={"max_steps": 1}), tmp_path)
    report = observer.of(Done)[0].report
    folder = Path(observer.of(CheckpointSaved)[0].path)
    weights, moments = load_file(folder / adapter_weights.ADAPTER), load_file(folder / checkpoint.OPTIMIZER)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert sum(t.numel() for t in weights.values()) == report.trainable_parameters
    assert sum(t.numel() for n, t in moments.items() if ".exp_avg" in n) == 2 * report.trainable_parameters


def model_bytes(work: Path) -> bytes:
    return (work / "adapter" / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- refused bases


def test_a_quantized_base_is_refused_and_unchanged(full: Callable[..., Task], llama: str) -> None:
    base = load_base(llama, Quantization.NF4)
    before = dict(base.model.named_parameters())
    with pytest.raises(TrainingFailed, match="quantized weights cannot be trained") as failed:
        attach(base, recipe_of(full()))
    assert failed.value.param == "trainer.full_finetuning"
    assert all(base.model.get_parameter(name) is parameter for name, parameter in before.items())


def test_a_base_that_is_too_large_is_refused_before_training(full: Callable[..., Task]) -> None:
    task = full(base_parameters=1_000_000_000, full_finetuning_bytes=FULL_BYTES * 999_999_999)
    with pytest.raises(TrainingFailed, match=r"22\.0 GB, 22 bytes for each of its 1,000,000,000") as failed:
        prepare(task)
    assert (failed.value.code, failed.value.param) == ("base_too_large", "trainer.full_finetuning")
    prepare(task.model_copy(update={"base_parameters": 999_999_999}))
