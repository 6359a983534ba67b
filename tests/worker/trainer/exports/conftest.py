"""A random adapter on a tiny base of any architecture, and the command for one of its exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.schemas.requests import ExportName, Method, MethodName, Quantization
from shared.schemas.results import Export, Proof
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import quotes
from worker.trainer.artifact import verify
from worker.trainer.artifact.vllm import lora_support
from worker.trainer.artifact.write import adapter_config
from worker.trainer.data import dataset
from worker.trainer.data.dataset import split
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate
from worker.trainer.exports.make import export
from worker.trainer.forward import layout_probe
from worker.trainer.model import adapter_weights
from worker.trainer.model.base import attach, load_base, trainable
from worker.trainer.planning.prepare import prepare
from worker.trainer.protocol import MakeExport, Task

#: Config fields by architecture, so that llama.cpp supports the base.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"dtype": "float16"},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {"dtype": "float32"},
}

PAIRS = [{"prompt": f"Hat {i}?", "chosen": "a felt hat " * (1 + i % 3), "rejected": "a cap"} for i in range(8)]

MakeCommand = Callable[..., MakeExport]


@pytest.fixture
def make_command(tmp_path: Path) -> MakeCommand:
    """Returns a function that makes a `MakeExport` command. Use `made` to run it for an export's name."""

    def make(
        kind: str, quantization: Quantization = Quantization.NONE, *, method: MethodName = "supervised", **lora: Any
    ) -> MakeExport:
        base_dir, rows = tmp_path / "base", tmp_path / "rows.jsonl"
        tiny_base(base_dir, kind, **{"dtype": "bfloat16"} | KINDS[kind])
        examples = quotes(24) if method == "supervised" else PAIRS
        rows.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
        task = Task.model_validate(
            {
                "base_dir": str(base_dir), "base_name": "acme/tiny", "base_revision": "0" * 40,
                "training_file": str(rows), "validation_file": None, "method": Method.of(method),
                "lora": {"r": 4} | lora, "quantization": quantization, "trainer": {}, "seed": 7, "torch_threads": 1,
                "max_row_bytes": 1 << 20,
            }
        )  # fmt: skip
        return _command(task, tmp_path)

    return make


def made(command: MakeExport, name: ExportName) -> Export:
    """Make the export `name` of the command's adapter. Its folder is under the command's `work_dir`."""
    done = export(command.model_copy(update={"name": name}), stopping=lambda: False, tick=lambda: None)
    assert done.path == str(Path(command.work_dir) / "exports" / name)
    assert done.export.bytes == sum(path.stat().st_size for path in Path(done.path).iterdir())
    return done.export


def _command(task: Task, work_dir: Path) -> MakeExport:
    recipe, encoder = prepare(task).recipe, Encoder(task.base_dir)
    rows = split(dataset.load(task, encoder), recipe.max_length, seed=recipe.seed)
    base = load_base(task.base_dir, recipe.quantization)
    layout, _ = layout_probe.layout(base, rows.train, packing=True, micro_batch=recipe.micro_batch, pad=encoder.eos)
    torch.manual_seed(1)
    adapted = attach(base, recipe).adapted
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = work_dir / "adapter"
    folder.mkdir()
    save_file(adapter_weights.adapter_tensors(adapted), folder / adapter_weights.ADAPTER)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(adapted, task, recipe)))
    off, on = (
        evaluate.score(base, adapted, rows.heldout, recipe, adapter=which, layout=layout).mean
        for which in (False, True)
    )
    tolerance = verify.TOLERANCE_INT8 if recipe.quantization is Quantization.INT8 else verify.TOLERANCE
    proof = Proof(
        base=off, tuned=on, base_deviation=0, tuned_deviation=0, tolerance=tolerance, max_logit_difference=1, tensors=1,
        tokenizer_sha256="", vllm=lora_support({"r": recipe.r}, "LlamaForCausalLM"),
    )  # fmt: skip
    return MakeExport(
        job="j", task=task, recipe=recipe, name=ExportName.MERGED, adapter_dir=str(folder), work_dir=str(work_dir),
        proof=proof,
    )  # fmt: skip
