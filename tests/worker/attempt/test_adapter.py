"""The adapter that a user gets: pulled by the CLI's code, loaded by stock peft, scored by plain code in this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from client.download import pull
from tests.worker.job_ends import finished

Rows = list[dict[str, str]]


# peft 0.21 still uses a name that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_pulled_adapter_has_the_scores_of_the_report(
    client: openai.OpenAI, tiny: str, llama: str, quotes: bytes, tmp_path: Path, quantization: str
) -> None:
    file = client.files.create(file=("quotes.jsonl", quotes), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 20, "batch_size": 4, "learning_rate_multiplier": 5}
    extra = {"quantization": quantization, "lora": {"r": 4}, "trainer": {"max_steps": 60}}
    created = client.fine_tuning.jobs.create(
        model=tiny, training_file=file.id, seed=3, hyperparameters=hyperparameters, extra_body=extra
    )
    job = finished(client, created.id)
    assert job.adapter is not None
    assert job.report is not None
    pull(job.adapter.files, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == job.report.model_dump(mode="json")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny"

    rows = [json.loads(line) for line in quotes.splitlines()]
    heldout = [rows[line - 1] for line in job.report.heldout_lines]
    base = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=nf4() if quantization == "nf4" else None
    )
    assert mean_loss(base, tmp_path, heldout) == pytest.approx(job.report.base.loss, rel=2e-2)
    tuned = PeftModel.from_pretrained(base, tmp_path)
    assert mean_loss(tuned, tmp_path, heldout) == pytest.approx(job.report.tuned.loss, rel=2e-2)
    assert job.report.tuned.loss < 0.7 * job.report.base.loss


def mean_loss(model: torch.nn.Module, tokenizer_dir: Path, rows: Rows) -> float:
    """Mean loss in nats per token, end of sequence included, computed row by row without our code."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits.float()
        # The first token has no context to be predicted from.
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
