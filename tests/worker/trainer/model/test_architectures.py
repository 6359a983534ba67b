"""Every supported kind of base overfits and resumes bit for bit, and stock PEFT loads its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, WriteRows, adapter_bytes, quotes, run
from worker.trainer.protocol import CheckpointSaved, Done

#: model_type → settings that differ from those of a tiny Llama.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}


# peft 0.21 uses an attribute that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_this_kind_is_trained_resumed_and_loaded(
    kind: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_base(base, kind, **KINDS[kind])
    rows = quotes(2)
    task = make_task(
        write_rows(rows), base_dir=str(base), quantization="nf4", hyperparameters={"n_epochs": 25, "batch_size": 2}
    )
    [done] = run(task, tmp_path / "whole", eval_every=None, learning_rate=1e-2).of(Done)
    assert done.report.base.loss > 3
    assert done.report.tuned.loss < 0.5

    stopped = run(task, tmp_path / "first", eval_every=None, learning_rate=1e-2, stop_at=9)
    saved = stopped.of(CheckpointSaved)[-1].path
    run(task, tmp_path / "second", eval_every=None, learning_rate=1e-2, resume_from=saved)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")

    folder = tmp_path / "whole" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned, tokenizer = PeftModel.from_pretrained(plain, folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer(rows[0]["text"])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        assert tuned(ids, labels=ids).loss < 1
        with tuned.disable_adapter():
            assert tuned(ids, labels=ids).loss > 3
