"""Every export of every architecture: made, read back by others' code, and as good as the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.protocol import MakeExport, Task
from shared.schemas import ExportName, Quantization
from shared.training import Export, Proof
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes
from worker.trainer import adapter, checkpoint, data, evaluate, model, selftest, serving
from worker.trainer.encoding import Encoder
from worker.trainer.exports.make import export
from worker.trainer.prepare import prepare, usable
from worker.trainer.verify import TOLERANCE

#: What llama.cpp takes for granted is as it should be.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {},
}

MakeCommand = Callable[..., MakeExport]


@pytest.fixture
def make_command(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> MakeCommand:
    """An adapter of random numbers on a tiny base, and the command for one of its exports."""

    def make(kind: str, name: ExportName, quantization: Quantization, **options: Any) -> MakeExport:
        base_dir = tmp_path / "base"
        if not base_dir.exists():
            tiny_base(base_dir, kind, **KINDS[kind])
        task = make_task(
            write_rows(quotes(24)), base_dir=str(base_dir), quantization=quantization, lora={"r": 4} | options,
            trainer={"exports": [name]},
        )  # fmt: skip
        return command_of(task, tmp_path)

    return make


def command_of(task: Task, tmp_path: Path) -> MakeExport:
    recipe = prepare(task).recipe
    encoder = Encoder(task.base_dir)
    base = model.load_base(task.base_dir, recipe.quantization)
    rows = usable(data.load(task, encoder), recipe.max_length, seed=recipe.seed)
    layout, _ = selftest.layout(base, rows.train, packing=True, micro_batch=recipe.micro_batch, pad=encoder.eos)
    torch.manual_seed(1)
    adapted = model.put_on(base, recipe)
    for name, parameter in model.trainable(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(checkpoint.adapter_tensors(adapted), folder / checkpoint.ADAPTER)
    (folder / "adapter_config.json").write_text(json.dumps(adapter.adapter_config(adapted, task, recipe)))
    off, on = (
        evaluate.score(base, adapted, rows.heldout, recipe, adapter=which, layout=layout).mean
        for which in (False, True)
    )
    proof = Proof(
        base=off, tuned=on, base_deviation=0, tuned_deviation=0, tolerance=0, max_logit_difference=1, tensors=1,
        tokenizer_sha256="", vllm=serving.vllm({"r": 4}, "LlamaForCausalLM"),
    )  # fmt: skip
    return MakeExport(
        job="j", task=task, recipe=recipe, name=task.trainer.exports[0], adapter_dir=str(folder),
        work_dir=str(tmp_path), proof=proof,
    )  # fmt: skip


def made(command: MakeExport) -> Export:
    done = export(command, stopping=lambda: False, tick=lambda: None)
    assert done.export.bytes == sum(path.stat().st_size for path in Path(done.path).iterdir())
    return done.export


@pytest.mark.parametrize("name", ExportName)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_this_kind_reads_back_and_scores_alike(
    make_command: MakeCommand, kind: str, name: ExportName
) -> None:
    quantization = Quantization.NF4 if name is ExportName.MERGED_DEQUANTIZED else Quantization.NONE
    command = make_command(kind, name, quantization)
    found = made(command)
    print(kind, name, command.proof.base.loss, command.proof.tuned.loss, found)
    if name is ExportName.GGUF_ADAPTER:
        assert found.loss is None
        return
    assert found.difference is not None
    assert abs(found.difference) < TOLERANCE * command.proof.tuned.loss
