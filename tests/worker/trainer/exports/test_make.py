"""Every export of every architecture: made, read back by others' code, and as good as the adapter; faults are seen."""

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
    """How far from the adapter, as a share of its loss."""
    assert found.loss is not None
    assert found.difference == found.loss - command.proof.tuned.loss
    return abs(found.difference) / command.proof.tuned.loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_of_this_kind(make_command: MakeCommand, kind: str) -> None:
    """On the values that it was trained against, an adapter scores as it did; on the original ones a little otherwise,
    by what quantization does to them.
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
def test_what_else_is_merged(
    make_command: MakeCommand, quantization: Quantization, lora: dict[str, Any], tolerance: float
) -> None:
    command = make_command("llama", quantization, **lora)
    dequantized = quantization is not Quantization.NONE
    found = made(command, ExportName.MERGED_DEQUANTIZED if dequantized else ExportName.MERGED)
    assert off(found, command) < tolerance


def test_of_preferences_the_chosen_answers_are_compared(make_command: MakeCommand) -> None:
    """A merged model has no base left to gain on."""
    command = make_command("llama", method="dpo")
    found, chosen = made(command, ExportName.MERGED), command.proof.tuned.chosen_loss
    assert chosen is not None
    assert found.loss == pytest.approx(chosen, rel=TOLERANCE)
    assert found.loss is not None
    assert found.difference == pytest.approx(found.loss - chosen)


def test_a_merged_folder_is_a_model_of_its_own(make_command: MakeCommand, tmp_path: Path) -> None:
    command = make_command("gpt2")
    before = {path.name: path.read_bytes() for path in Path(command.task.base_dir).iterdir()}
    made(command, ExportName.MERGED)
    folder = tmp_path / "exports" / "merged"
    assert {path.name: path.read_bytes() for path in Path(command.task.base_dir).iterdir()} == before
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_llama_cpp_scales_an_rs_lora_as_peft_does(make_command: MakeCommand, tmp_path: Path) -> None:
    """Its scale is alpha / r."""
    command = make_command("llama", use_rslora=True, alpha=8)
    made(command, ExportName.GGUF_ADAPTER)
    fields = GGUFReader(tmp_path / "exports" / "gguf_adapter" / "adapter.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(8 * 4**0.5)
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"


def test_a_base_may_stop_by_several_tokens(make_command: MakeCommand) -> None:
    """As Llama 3's config says; a GGUF file has one EOS, which is the tokenizer's."""
    command = make_command("llama")
    path = Path(command.task.base_dir) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 2]}))
    assert made(command, ExportName.GGUF_MERGED).error is None


def test_a_stop_is_heard(make_command: MakeCommand) -> None:
    command = make_command("llama")
    with pytest.raises(Interrupted):
        export(command, stopping=lambda: True, tick=lambda: None)
    assert not list((Path(command.work_dir) / "exports").iterdir())


def test_what_has_no_room_on_a_gpu_is_merged_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 GB, 13B take 7 in nf4, and 26 merged."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 << 30, 24 << 30))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert merged.place(gpu, 13_000_000_000 * 2) == cpu
    assert merged.place(gpu, 7_000_000_000 * 2) == gpu
    assert merged.place(cpu, 13_000_000_000 * 2) == cpu


# ---------------------------------------------------------------- planted faults

Patch = pytest.MonkeyPatch


def halves_left_apart(patch: Patch) -> None:
    patch.setattr(forms, "with_paired_rotary", lambda name, tensor, config: tensor)


def halves_paired_twice(patch: Patch) -> None:
    once = forms.with_paired_rotary
    patch.setattr(forms, "with_paired_rotary", lambda name, t, config: once(name, once(name, t, config), config))


def names_exchanged(patch: Patch) -> None:
    """q and o are of one shape."""
    right = forms.names

    def wrong(config: Any) -> Callable[[str], str | None]:
        return lambda module: right(config)(
            module.replace("q_proj", "?").replace("o_proj", "q_proj").replace("?", "o_proj")
        )

    patch.setattr(forms, "names", wrong)


def another_theta(patch: Patch) -> None:
    patch.setattr(GGUFWriter, "add_rope_freq_base", lambda self, value: self.add_float32("llama.rope.freq_base", 500.0))


def merges_lost(patch: Patch) -> None:
    right = vocabulary.of

    def wrong(tokenizer: Any, size: int) -> vocabulary.Vocabulary:
        found = right(tokenizer, size)
        return replace(found, merges=found.merges[:5])

    patch.setattr(vocabulary, "of", wrong)


def the_adapter_lost(patch: Patch) -> None:
    patch.setattr(LoraModel, "merge_and_unload", lambda self, **options: self.unload())


def the_adapter_scaled(patch: Patch) -> None:
    right = LoraModel.merge_and_unload

    def wrong(self: LoraModel, **options: Any) -> Any:
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(0.5)
        return right(self, **options)

    patch.setattr(LoraModel, "merge_and_unload", wrong)


def a_tensor_lost(patch: Patch) -> None:
    """In its place, transformers prints a line and draws random numbers."""
    right = merged.write

    def wrong(folder: Path, *others: Any) -> None:
        right(folder, *others)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    patch.setattr(merged, "write", wrong)


def a_tensor_changed(patch: Patch) -> None:
    right = merged.write

    def wrong(folder: Path, *others: Any) -> None:
        right(folder, *others)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] *= 2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    patch.setattr(merged, "write", wrong)


def an_unshifted_norm(patch: Patch) -> None:
    patch.setitem(forms.FORMS, "gemma2", replace(forms.FORMS["gemma2"], norm_offset=0.0))


@pytest.mark.parametrize(
    ("kind", "name", "plant"),
    [
        ("llama", ExportName.MERGED, the_adapter_lost),
        ("llama", ExportName.MERGED, the_adapter_scaled),
        ("llama", ExportName.GGUF_MERGED, the_adapter_scaled),
        ("llama", ExportName.MERGED, a_tensor_lost),
        ("llama", ExportName.MERGED, a_tensor_changed),
        ("llama", ExportName.GGUF_ADAPTER, halves_left_apart),
        ("llama", ExportName.GGUF_MERGED, halves_left_apart),
        ("llama", ExportName.GGUF_ADAPTER, halves_paired_twice),
        ("llama", ExportName.GGUF_MERGED, halves_paired_twice),
        ("llama", ExportName.GGUF_ADAPTER, names_exchanged),
        ("llama", ExportName.GGUF_MERGED, names_exchanged),
        ("llama", ExportName.GGUF_MERGED, another_theta),
        ("llama", ExportName.GGUF_MERGED, merges_lost),
        ("gemma2", ExportName.GGUF_MERGED, an_unshifted_norm),
    ],
)
def test_a_planted_fault_is_no_export(
    make_command: MakeCommand, monkeypatch: Patch, kind: str, name: ExportName, plant: Callable[[Patch], None]
) -> None:
    command = make_command(kind)
    plant(monkeypatch)
    with pytest.raises(TrainingFailed, match="does not read back as it was made") as failed:
        made(command, name)
    assert failed.value.code == "export_unlike"


# ---------------------------------------------------------------- llama.cpp's own arithmetic


def test_stretched_rotary_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    """Llama 3.1's scaling, which llama.cpp keeps as divisors."""
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain, stretched = (
        AutoConfig.for_model("llama", vocab_size=8, **shape, rope_parameters=rope)
        for rope in ({"rope_type": "default", "rope_theta": 500000.0}, llama3)
    )
    one, other = (AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq for config in (plain, stretched))
    factors = forms.rope_factors(stretched)
    assert factors is not None
    torch.testing.assert_close(torch.tensor(factors), one / other)
    assert forms.rope_factors(plain) is None
