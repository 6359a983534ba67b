"""An export that cannot be made is refused before training, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from shared.errors import TrainingFailed
from shared.schemas.requests import ExportName
from tests.tiny import tiny_base
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes
from worker.trainer.llama_cpp import forms, vocabulary
from worker.trainer.planning.prepare import prepare

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def refused(task: Any, message: str) -> None:
    with pytest.raises(TrainingFailed, match=message) as failed:
        prepare(task)
    assert (failed.value.code, failed.value.param) == ("invalid_exports", "trainer.exports")
    assert failed.value.hint


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("gpt_neox", {}, "the architecture 'gpt_neox'; supported: gemma2, gemma3_text, gpt2, llama"),
        ("llama", {"hidden_act": "relu"}, "the activation 'relu'; llama.cpp's llama has 'silu'"),
        ("llama", {"rope_parameters": YARN}, "scaled by 'yarn'"),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 32}, "attention scaled by 32"),
        (
            "gemma2",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
            "an untied output head",
        ),
        (
            "gemma3_text",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["full_attention", "sliding_attention"]},
            "an unusual pattern of local layers; llama.cpp's gemma3 has 5 in 6",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scaled by the layer"),
        ("gpt2", {"scale_attn_weights": False}, "unscaled attention"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "a sliding window of 64"),
        ("phi3", {"sliding_window": 128}, "a sliding window of 128 tokens"),
    ],
)
@pytest.mark.parametrize("name", [ExportName.GGUF_ADAPTER, ExportName.GGUF_MERGED])
def test_a_base_that_llama_cpp_computes_differently_is_refused(
    make_task: MakeTask,
    write_rows: WriteRows,
    tmp_path: Path,
    kind: str,
    config: dict[str, Any],
    message: str,
    name: str,
) -> None:
    tiny_base(tmp_path / "base", kind, **config)
    task = make_task(write_rows(quotes(8)), base_dir=str(tmp_path / "base"), trainer={"exports": [name]})
    refused(task, message)
    prepare(task.model_copy(update={"trainer": task.trainer.model_copy(update={"exports": [ExportName.MERGED]})}))


def test_a_sliding_window_as_long_as_the_context_is_allowed() -> None:
    for kind, options in (
        ("phi3", {"sliding_window": 256}),
        ("phi3", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "num_hidden_layers": 2}),
    ):
        assert forms.refusal(AutoConfig.for_model(kind, max_position_embeddings=256, **options)) is None


def test_a_dora_adapter_is_refused_as_gguf_and_allowed_merged(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = write_rows(quotes(8))
    refused(make_task(rows, lora={"use_dora": True}, trainer={"exports": ["gguf_adapter"]}), "does not support DoRA")
    prepare(make_task(rows, lora={"use_dora": True}, trainer={"exports": ["gguf_merged"]}))


def test_a_dequantized_export_of_an_unquantized_base_is_refused(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = write_rows(quotes(8))
    refused(make_task(rows, trainer={"exports": ["merged_dequantized"]}), "the base is not quantized")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
            "a pre-tokenizer without a name in llama.cpp",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "with the normalizer Lowercase"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_describe_is_refused(
    llama: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, part: dict[str, Any], message: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in Path(llama).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    saved = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(saved | part))
    task = make_task(write_rows(quotes(8)), base_dir=str(base), trainer={"exports": ["gguf_merged"]})
    refused(task, message)
    prepare(task.model_copy(update={"trainer": task.trainer.model_copy(update={"exports": [ExportName.GGUF_ADAPTER]})}))


def test_a_vocabulary_is_padded_to_the_number_of_embeddings(llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = vocabulary.of(tokenizer, 400)
    assert (found.kind, found.pre, len(found.tokens)) == ("gpt2", "gpt-2", 400)
    assert found.tokens[399] == "[PAD399]"
    assert [found.tokens[i] for i in range(4)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    with pytest.raises(vocabulary.Unsupported, match="with 200 embeddings"):
        vocabulary.of(tokenizer, 200)


def test_a_classifier_has_no_exports(make_task: MakeTask, write_rows: WriteRows) -> None:
    rows = write_rows([{"text": f"hat {i}", "label": "ab"[i % 2]} for i in range(8)])
    task = make_task(rows, method="classification", trainer={"exports": ["merged"]})
    refused(task, "a classifier has no exports")


def test_full_finetuning_has_no_exports(make_task: MakeTask, write_rows: WriteRows) -> None:
    task = make_task(write_rows(quotes(8)), trainer={"full_finetuning": True, "exports": ["gguf_merged"]})
    refused(task, "full fine-tuning has no exports")
