"""Model configs of every supported architecture, tiny and published ones, and a setup to estimate them with."""

from __future__ import annotations

from typing import Any

from shared.estimation import memory_model
from shared.schemas.requests import Quantization

LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
ENCODERS = ("bert", "roberta", "deberta-v2")
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-biased": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA | {"head_dim": 16}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", LLAMA | {"head_dim": 16}),
    "gemma3": ("gemma3_text", LLAMA),
    "gpt2": ("gpt2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-narrow": ("gpt2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}),
    "bert": ("bert", BERT),
    "roberta": ("roberta", BERT | {"id2label": {0: "a", 1: "b", 2: "c"}, "type_vocab_size": 1}),
    "deberta": ("deberta-v2", BERT),
    "deberta-v2": ("deberta-v2", BERT | RELATIVE | {"conv_kernel_size": 3, "type_vocab_size": 2}),
    "deberta-v3": (
        "deberta-v2",
        BERT | RELATIVE | {"share_att_key": True, "position_buckets": 16, "position_biased_input": False},
    ),
}
REAL = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    ),
    "SmolLM2-135M": (
        134_515_008,
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "GPT-2": (
        124_439_808,
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    # 124,645,632 of the model without a head (its pooler is as large as the classifier's dense layer), and two labels.
    "RoBERTa-base": (
        124_645_632 + 2 * 769,
        {"model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}


def setup_of(**fields: Any) -> memory_model.Setup:
    plain: dict[str, Any] = {"quantization": Quantization.NF4, "r": 3, "micro_batch": 1, "max_length": 64}
    return memory_model.Setup(**plain | fields)
