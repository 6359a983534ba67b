"""The installed `gguf` and transformers still have the names that `forms` and `vocabulary` write.

A new version that renames or drops one must fail here, and not in a user's copy of llama.cpp. What llama.cpp does with
them is not tested: `worker/trainer/llama_cpp/forms.py` says how to check that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFType, GGUFWriter, Keys, TokenType
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES
from tokenizers import Regex
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from tests.tiny import tiny_tokenizer
from worker.trainer.exports.gguf import FP32
from worker.trainer.llama_cpp import forms, vocabulary

ARCHITECTURES = ["gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3"]
ROTARY = {"rope.dimension_count", "rope.freq_base"}
WITHOUT_ROTARY = {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"}
COMMON = WITHOUT_ROTARY | ROTARY | {
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon",
}  # fmt: skip
#: Keys that llama.cpp reads under the architecture's name, by transformers' `model_type`.
HYPERPARAMETERS = {
    "llama": COMMON,
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON,
    "phi3": COMMON | {"rope.scaling.original_context_length", "attention.sliding_window"},
    "gemma2": COMMON | {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3_text": COMMON | {"attention.sliding_window"},
    "gpt2": WITHOUT_ROTARY | {"attention.layer_norm_epsilon"},
}
#: Keys of a byte-level tokenizer with a chat template.
TOKENIZER = {
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.chat_template",
}  # fmt: skip
SHAPE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def test_architectures_have_the_names_that_llama_cpp_uses() -> None:
    assert sorted({form.name for form in forms.FORMS.values()}) == ARCHITECTURES
    assert set(ARCHITECTURES) <= set(MODEL_ARCH_NAMES.values())
    assert set(ARCHITECTURES) <= set(GGUF_SUPPORTED_ARCHITECTURES)  # transformers' reader, which checks our files


@pytest.mark.parametrize("kind", forms.FORMS)
def test_each_parameter_of_an_architecture_has_a_name(kind: str) -> None:
    """The name must also be one of those that `gguf` lists for that architecture."""
    config = AutoConfig.for_model(kind, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == forms.FORMS[kind].name)
    listed = {
        TENSOR_NAMES[tensor].format(bid=layer)
        for tensor in MODEL_TENSORS[MODEL_ARCH(arch)]
        for layer in range(config.num_hidden_layers)
    }
    name_of = forms.names(config)
    names = {name_of(parameter.rpartition(".")[0]) for parameter, _ in model.named_parameters()}
    assert names <= listed


@pytest.mark.parametrize("kind", forms.FORMS)
def test_hyperparameters_have_the_keys_that_llama_cpp_reads(kind: str, tmp_path: Path) -> None:
    name = forms.FORMS[kind].name
    writer = GGUFWriter(tmp_path / "keys.gguf", name)
    forms.write_hyperparameters(writer, AutoConfig.for_model(kind, **SHAPE))
    assert keys_of(writer, tmp_path) == {f"{name}.{key}" for key in HYPERPARAMETERS[kind]}


def test_linear_scaling_of_rotary_positions_has_the_keys_that_llama_cpp_reads(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    writer = GGUFWriter(tmp_path / "keys.gguf", "llama")
    forms.write_hyperparameters(writer, AutoConfig.for_model("llama", **SHAPE, rope_parameters=linear))
    assert {"llama.rope.scaling.type", "llama.rope.scaling.factor"} <= keys_of(writer, tmp_path)
    assert GGUFReader(tmp_path / "keys.gguf").fields["llama.rope.scaling.type"].contents() == "linear"


def test_a_tokenizer_has_the_keys_that_llama_cpp_reads(tmp_path: Path) -> None:
    tokenizer, writer = tiny_tokenizer(), GGUFWriter(tmp_path / "keys.gguf", "llama")
    vocabulary.write(writer, vocabulary.of(tokenizer, 320), tokenizer, frozenset({0, 2}))
    assert keys_of(writer, tmp_path) == TOKENIZER
    assert (Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES) == ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")
    assert Keys.Tokenizer.ADD_PREFIX == "tokenizer.ggml.add_space_prefix"


def test_token_types_have_the_numbers_that_llama_cpp_reads() -> None:
    names = ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
    assert [TokenType[name].value for name in names] == [1, 2, 3, 4, 5, 6]


def test_an_adapter_and_single_tensors_have_the_names_that_llama_cpp_reads() -> None:
    assert (GGUFType.MODEL, GGUFType.ADAPTER) == ("model", "adapter")
    assert (Keys.Adapter.TYPE, Keys.Adapter.LORA_ALPHA) == ("adapter.type", "adapter.lora.alpha")
    assert (Keys.General.TYPE, Keys.General.FILE_TYPE) == ("general.type", "general.file_type")
    assert f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight" == forms.ROPE_FACTORS
    assert f"{TENSOR_NAMES[MODEL_TENSOR.POS_EMBD]}.weight" in FP32


def test_pre_tokenizers_have_the_names_and_patterns_that_transformers_knows() -> None:
    """`gguf` does not list these names. Each pattern must also differ from the others, or the name is ambiguous."""
    patterns = [GGUF_PRE_TOKENIZER_SPLITS[name] for name in vocabulary.SPLITS]
    assert len(set(patterns)) == len(patterns)
    assert all(Regex(pattern) for pattern in patterns)
    assert set(vocabulary.SPLITS) >= vocabulary.IGNORE_MERGES


def keys_of(writer: GGUFWriter, folder: Path) -> set[str]:
    """Write the file and return its keys, as `gguf` reads them, without those about the file itself."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = GGUFReader(folder / "keys.gguf").fields
    return {key for key in fields if not key.startswith(("GGUF.", "general."))}
