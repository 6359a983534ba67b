"""Exports of every architecture read back and score as the adapter does, and planted faults are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import TrainingFailed
from shared.schemas.requests import ExportName, Quantization
from shared.schemas.results import Export
from tests.worker.trainer.exports.conftest import KINDS, MakeCommand, made
from worker.trainer.artifact.verify import TOLERANCE, TOLERANCE_INT8
from worker.trainer.exports import gguf, merged
from worker.trainer.exports.make import export
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.llama_cpp import forms, vocabulary
from worker.trainer.protocol import MakeExport


def off(found: Export, command: MakeExport) -> float:
    """Difference from the adapter's loss, as a share of that loss."""
    assert found.loss is not None
    assert found.difference == found.loss - command.proof.tuned.loss
    return abs(found.difference) / command.proof.tuned.loss


@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_an_adapter_on_a_quantized_base(make_command: MakeCommand, kind: str) -> None:
    """On the values that it was trained against, an adapter has the same score; on the original ones, a slightly
    different one, because of quantization.
    """
    command = make_command(kind, Quantization.NF4)
    merged, dequantized, gguf_adapter, gguf_merged = (made(command, name) for name in ExportName)
    assert off(dequantized, command) < TOLERANCE
    assert merged.max_logit_difference is not None
    assert dequantized.max_logit_difference is not None
    assert merged.max_logit_difference > 2 * dequantized.max_logit_difference
    assert gguf_merged.loss == pytest.approx(merged.loss, rel=1e-6)
    assert gguf_adapter.loss is gguf_adapter.difference is None


@pytest.mark.parametrize(
    ("kind", "dtype", "in_gguf"),
    [("llama", torch.bfloat16, "BF16"), ("mistral", torch.float16, "F16"), ("gpt2", torch.float32, "F32")],
)
def test_weights_stay_in_the_type_of_the_bases_files(
    make_command: MakeCommand, tmp_path: Path, kind: str, dtype: torch.dtype, in_gguf: str
) -> None:
    command = make_command(kind)
    made(command, ExportName.MERGED)
    made(command, ExportName.GGUF_MERGED)
    tensors = load_file(tmp_path / "exports" / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {dtype}
    reader = GGUFReader(tmp_path / "exports" / "gguf_merged" / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight")}
    assert kinds == {in_gguf}
    assert reader.fields["general.file_type"].contents() == gguf.FILE_TYPES[dtype]


@pytest.mark.parametrize(
    ("quantization", "lora", "tolerance"),
    [
        (Quantization.NONE, {}, TOLERANCE),
        (Quantization.NONE, {"use_rslora": True}, TOLERANCE),
        (Quantization.NONE, {"use_dora": True}, TOLERANCE),
        (Quantization.INT8, {}, TOLERANCE_INT8),
    ],
)
def test_a_merged_model_scores_as_the_adapter_does(
    make_command: MakeCommand, quantization: Quantization, lora: dict[str, Any], tolerance: float
) -> None:
    command = make_command("llama", quantization, **lora)
    dequantized = quantization is not Quantization.NONE
    found = made(command, ExportName.MERGED_DEQUANTIZED if dequantized else ExportName.MERGED)
    assert off(found, command) < tolerance


def test_after_dpo_the_loss_on_chosen_answers_is_compared(make_command: MakeCommand) -> None:
    """DPO's own loss needs the base, which a merged model no longer has."""
    command = make_command("llama", method="dpo")
    found, chosen = made(command, ExportName.MERGED), command.proof.tuned.chosen_loss
    assert chosen is not None
    assert found.loss == pytest.approx(chosen, rel=TOLERANCE)
    assert found.loss is not None
    assert found.difference == pytest.approx(found.loss - chosen)


def test_a_merged_folder_is_complete_and_the_base_is_unchanged(make_command: MakeCommand, tmp_path: Path) -> None:
    command = make_command("gpt2")
    before = {path.name: path.read_bytes() for path in Path(command.task.base_dir).iterdir()}
    made(command, ExportName.MERGED)
    folder = tmp_path / "exports" / "merged"
    assert {path.name: path.read_bytes() for path in Path(command.task.base_dir).iterdir()} == before
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_alpha_in_gguf_gives_the_scale_of_rslora(make_command: MakeCommand, tmp_path: Path) -> None:
    """llama.cpp scales by alpha / r."""
    command = make_command("llama", use_rslora=True, alpha=8)
    made(command, ExportName.GGUF_ADAPTER)
    fields = GGUFReader(tmp_path / "exports" / "gguf_adapter" / "adapter.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(8 * 4**0.5)
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"


def test_a_base_with_several_eos_tokens_is_exported(make_command: MakeCommand) -> None:
    """Llama 3's config has several; a GGUF file has one, which is the tokenizer's."""
    command = make_command("llama")
    path = Path(command.task.base_dir) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 2]}))
    assert made(command, ExportName.GGUF_MERGED).error is None


def test_a_requested_stop_interrupts_the_export(make_command: MakeCommand) -> None:
    command = make_command("llama")
    with pytest.raises(Interrupted):
        export(command, stopping=lambda: True, tick=lambda: None)
    assert not list((Path(command.work_dir) / "exports").iterdir())


def test_weights_that_do_not_fit_on_the_gpu_are_merged_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 13B model needs 7 GB in nf4, and 26 GB merged; the GPU has 24 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 << 30, 24 << 30))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert merged.choose_device(gpu, 13_000_000_000 * 2) == cpu
    assert merged.choose_device(gpu, 7_000_000_000 * 2) == gpu
    assert merged.choose_device(cpu, 13_000_000_000 * 2) == cpu


# ---------------------------------------------------------------- planted faults

Patch = pytest.MonkeyPatch


def rotary_not_interleaved(patch: Patch) -> None:
    patch.setattr(forms, "interleave_rotary", lambda name, tensor, config: tensor)


def rotary_interleaved_twice(patch: Patch) -> None:
    once = forms.interleave_rotary
    patch.setattr(forms, "interleave_rotary", lambda name, t, config: once(name, once(name, t, config), config))


def names_swapped(patch: Patch) -> None:
    """q and o have the same shape."""
    correct = forms.names

    def wrong(config: Any) -> Callable[[str], str | None]:
        return lambda module: correct(config)(
            module.replace("q_proj", "?").replace("o_proj", "q_proj").replace("?", "o_proj")
        )

    patch.setattr(forms, "names", wrong)


def wrong_rope_theta(patch: Patch) -> None:
    patch.setattr(GGUFWriter, "add_rope_freq_base", lambda self, value: self.add_float32("llama.rope.freq_base", 500.0))


def merges_missing(patch: Patch) -> None:
    correct = vocabulary.of

    def wrong(tokenizer: Any, size: int) -> vocabulary.Vocabulary:
        found = correct(tokenizer, size)
        return replace(found, merges=found.merges[:5])

    patch.setattr(vocabulary, "of", wrong)


def adapter_not_merged(patch: Patch) -> None:
    patch.setattr(LoraModel, "merge_and_unload", lambda self, **options: self.unload())


def adapter_scaled(patch: Patch) -> None:
    correct = LoraModel.merge_and_unload

    def wrong(self: LoraModel, **options: Any) -> Any:
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(0.5)
        return correct(self, **options)

    patch.setattr(LoraModel, "merge_and_unload", wrong)


def tensor_missing(patch: Patch) -> None:
    """transformers logs a warning and uses random numbers instead."""
    correct = merged.write

    def wrong(folder: Path, *others: Any) -> None:
        correct(folder, *others)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    patch.setattr(merged, "write", wrong)


def tensor_changed(patch: Patch) -> None:
    correct = merged.write

    def wrong(folder: Path, *others: Any) -> None:
        correct(folder, *others)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] *= 2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    patch.setattr(merged, "write", wrong)


def norm_without_offset(patch: Patch) -> None:
    patch.setitem(forms.FORMS, "gemma2", replace(forms.FORMS["gemma2"], norm_offset=0.0))


@pytest.mark.parametrize(
    ("kind", "name", "plant"),
    [
        ("llama", ExportName.MERGED, adapter_not_merged),
        ("llama", ExportName.MERGED, adapter_scaled),
        ("llama", ExportName.GGUF_MERGED, adapter_scaled),
        ("llama", ExportName.MERGED, tensor_missing),
        ("llama", ExportName.MERGED, tensor_changed),
        ("llama", ExportName.GGUF_ADAPTER, rotary_not_interleaved),
        ("llama", ExportName.GGUF_MERGED, rotary_not_interleaved),
        ("llama", ExportName.GGUF_ADAPTER, rotary_interleaved_twice),
        ("llama", ExportName.GGUF_MERGED, rotary_interleaved_twice),
        ("llama", ExportName.GGUF_ADAPTER, names_swapped),
        ("llama", ExportName.GGUF_MERGED, names_swapped),
        ("llama", ExportName.GGUF_MERGED, wrong_rope_theta),
        ("llama", ExportName.GGUF_MERGED, merges_missing),
        ("gemma2", ExportName.GGUF_MERGED, norm_without_offset),
    ],
)
def test_a_planted_fault_fails_the_export(
    make_command: MakeCommand, monkeypatch: Patch, kind: str, name: ExportName, plant: Callable[[Patch], None]
) -> None:
    command = make_command(kind)
    plant(monkeypatch)
    with pytest.raises(TrainingFailed, match="does not read back as it was written") as failed:
        made(command, name)
    assert failed.value.code == "export_unlike"


# ---------------------------------------------------------------- rotary scaling


def test_rotary_divisors_for_llama_cpp_match_transformers(tmp_path: Path) -> None:
    """Llama 3.1's scaling, which llama.cpp stores as divisors."""
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain, scaled = (
        AutoConfig.for_model("llama", vocab_size=8, **shape, rope_parameters=rope)
        for rope in ({"rope_type": "default", "rope_theta": 500000.0}, llama3)
    )
    one, other = (AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq for config in (plain, scaled))
    factors = forms.rope_factors(scaled)
    assert factors is not None
    torch.testing.assert_close(torch.tensor(factors), one / other)
    assert forms.rope_factors(plain) is None
