"""A classifier from end to end: import an encoder, send a CSV, pull the adapter, run it with stock code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from client.download import pull
from deploy.local.folder import Record
from tests.tiny import tiny_encoder
from tests.worker.job_ends import finished

KINDS = ("felt", "wool", "straw")
TEXTS = [f"hat {i} of {KINDS[i % 3]}" for i in range(60)]


@pytest.fixture(scope="module")
def bert(stack: Record, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an encoder, which the stack's catalog has as `bert`."""
    folder = str(tmp_path_factory.mktemp("bert"))
    tiny_encoder(Path(folder), "bert")
    command = [sys.executable, "-m", "deploy.local", "add-model", "bert", folder, "--data", stack.data]
    subprocess.run([*command, "--public-id", "acme/bert", "--revision", "1"], check=True, capture_output=True)
    return folder


# peft 0.21 still uses a name that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_encoder_learns_labels(client: openai.OpenAI, bert: str, tmp_path: Path) -> None:
    table = "text,label\n" + "".join(f"{text},{KINDS[i % 3]}\n" for i, text in enumerate(TEXTS))
    file = client.files.create(file=("labels.csv", table.encode()), purpose="fine-tune")
    method: Any = {"type": "classification", "classification": {"hyperparameters": {"learning_rate_multiplier": 3}}}
    extra = {"quantization": "none"}
    created = client.fine_tuning.jobs.create(
        model="bert", training_file=file.id, method=method, seed=3, extra_body=extra
    )
    job = finished(client, created.id)
    assert job.plan is not None
    assert job.plan.recipe.labels == sorted(KINDS)
    assert job.plan.data is not None
    assert [(one.label, one.rows) for one in job.plan.data.labels] == [(kind, 20) for kind in sorted(KINDS)]
    assert job.report is not None
    assert (job.report.tuned.token_accuracy, job.report.tuned.macro_f1) == (1.0, 1.0)
    assert job.adapter is not None
    assert job.adapter.proof is not None
    assert not job.adapter.proof.vllm.servable

    pull(job.adapter.files, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=config, dtype=torch.float32)
    tuned, tokenizer = PeftModel.from_pretrained(base, tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    # Line 1 of the file is the header.
    heldout = [line - 2 for line in job.report.heldout_lines]
    wanted = torch.tensor([config.label2id[KINDS[i % 3]] for i in heldout])
    with torch.no_grad():
        inputs = tokenizer([TEXTS[i] for i in heldout], return_tensors="pt", padding=True)
        scored = tuned(**inputs, labels=wanted)
        given = tuned(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits.argmax(dim=-1)
    assert float(scored.loss) == pytest.approx(job.report.tuned.loss, rel=0.1, abs=1e-3)
    right = [config.id2label[int(label)] == KINDS[i % 3] for i, label in enumerate(given)]
    assert sum(right) > 50


def test_an_encoder_fails_a_text_generation_job_before_training(client: openai.OpenAI, bert: str) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    file = client.files.create(file=("texts.jsonl", rows.encode()), purpose="fine-tune")
    created = client.fine_tuning.jobs.create(model="bert", training_file=file.id)
    failed = client.fine_tuning.jobs.retrieve(created.id)
    while failed.status not in {"failed", "queued", "running"}:
        failed = client.fine_tuning.jobs.retrieve(created.id)
    assert failed.error is not None
    assert failed.error.code == "unsupported_base_model"
    assert "generates no text" in failed.error.message
